"""Who may come in: the answers to ZeroMQ's questions (ZAP, RFC 27) about the keys of new connections."""

from __future__ import annotations

import logging

import zmq
from zmq.utils import z85

from triptych.cluster.lines.endpoints import ZAP_DOMAIN
from triptych.cluster.lines.keys import AllowList

__all__ = ["Gate"]

_log = logging.getLogger(__name__)


class Gate:
    """Answers for all CURVE sockets of a context. Call `answer` whenever `socket` is readable."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], allowed: AllowList) -> None:
        self.socket = context.socket(zmq.ROUTER)
        self.socket.bind("inproc://zeromq.zap.01")
        self._allowed = allowed

    def answer(self) -> None:
        """Answers what has been asked by now."""
        while self.socket.poll(0):
            parts = self.socket.recv_multipart()
            cut = parts.index(b"") + 1
            envelope, asked = parts[:cut], parts[cut:]
            if len(asked) < 6:
                continue
            name, public = self._client(asked)
            status = [b"200", b"OK"] if name else [b"400", b"this key is not on the list"]
            self.socket.send_multipart([*envelope, b"1.0", asked[1], *status, public.encode(), b""])

    def _client(self, asked: list[bytes]) -> tuple[str | None, str]:
        _, _, domain, address, _, mechanism, *credentials = asked
        if mechanism != b"CURVE" or domain != ZAP_DOMAIN.encode() or len(credentials) != 1:
            return None, ""
        public = z85.encode(credentials[0]).decode()
        if self._allowed.refresh():
            self.report()
        name = self._allowed.name_of(public)
        if name is None:
            _log.warning("refused %s: its key %s is not on the list", address.decode(errors="replace"), public)
        return name, public

    def report(self) -> None:
        """Logs the files of the list that cannot be read."""
        for file, reason in self._allowed.ignored.items():
            _log.warning("ignored %s: %s", file, reason)

    def close(self) -> None:
        """Closes its socket."""
        self.socket.close(linger=0)

"""The socket and the signals, taken before anything slow is begun."""

from __future__ import annotations

import contextlib
import errno
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

from triptych.errors import InvalidRequest

__all__ = ["bind", "on_signals", "url_of"]

_BACKLOG = 128
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def bind(host: str, port: int) -> socket.socket:
    """Takes an address before anything slow is begun: whoever connects waits until `serve_app` answers. Port 0 takes
    any free one. Raises InvalidRequest for a port in use and for a host that is not this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except (OSError, ValueError) as error:  # ValueError: what can be no host's name at all
        reason = getattr(error, "strerror", None) or "no name of a host"
        raise InvalidRequest.of("host", host, f"an address of this machine ({reason})") from None
    try:
        # Without this a server could not come back to its port while old connections to it die down.
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        # Two sockets may be bound alike, and only the listening one keeps another away.
        found.listen(_BACKLOG)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise InvalidRequest.of("host", host, "an address of this machine") from None
        raise InvalidRequest.of(
            "port", port, f"a free one ({host}: {(error.strerror or str(error)).lower()})"
        ) from None
    return found


def url_of(sock: socket.socket) -> str:
    """Where a bound socket can be reached by a browser on this machine."""
    address: tuple[str, int] = sock.getsockname()[:2]
    host, port = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address[0], address[0]), address[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextlib.contextmanager
def on_signals(
    handler: Callable[[int, FrameType | None], Any], signals: Iterable[signal.Signals] = _SIGNALS
) -> Iterator[None]:
    """SIGTERM and SIGINT, or these, are this handler's within the block, on the main thread."""
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)

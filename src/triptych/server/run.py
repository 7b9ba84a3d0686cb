"""The application on a socket, until it is told to stop: once to drain, twice to stop at once."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from triptych.errors import InvalidRequest

__all__ = ["bind", "on_signals", "serve_app", "url_of"]

_BACKLOG = 128
_GRACE = 5
"""Seconds that answers on their way may take once the server stops."""
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
def on_signals(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """SIGTERM and SIGINT are this handler's within the block, on the main thread."""
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


class _Server(uvicorn.Server):
    """uvicorn's own, which leaves signals to us: it would close connections at the first one, draining or not."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Stop:
    """What signals ask for: the first one to drain, the second one to stop at once."""

    def __init__(self, server: _Server, drain: Callable[[], Any], tell: Callable[[str], None]) -> None:
        self._server = server
        self._drain = drain
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._asked = 0

    @property
    def hard(self) -> bool:
        """Whether it was asked twice."""
        return self._asked > 1

    def ask(self) -> None:
        """On the loop's thread."""
        self._asked += 1
        if self._asked == 1:
            self._tell("draining: what runs is finished first; once more stops at once")
            threading.Thread(target=self._drained, name="triptych-drain", daemon=True).start()
        else:
            self._server.force_exit = True
            self._exit()

    def _drained(self) -> None:
        try:
            self._drain()
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is closed: it was asked twice
                self._loop.call_soon_threadsafe(self._exit)

    def _exit(self) -> None:
        self._server.should_exit = True

    def heard(self, number: int, frame: FrameType | None) -> None:
        """A signal's handler."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.ask)


def serve_app(
    app: FastAPI, sock: socket.socket, *, ready: Callable[[str], None] = lambda url: None,
    drain: Callable[[], Any] = lambda: None, tell: Callable[[str], None] = lambda text: None,
) -> bool:  # fmt: skip
    """Answers on a bound socket until SIGTERM or SIGINT. `ready` is given the URL once requests are answered.

    The first signal calls `drain` on a thread of its own, while requests are still answered but no more jobs are
    taken, and ends when that returns; the second one ends at once. Returns whether it was drained.
    """
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", ws="none", server_header=False,
        timeout_graceful_shutdown=_GRACE,
    )  # fmt: skip
    return asyncio.run(_serve(_Server(config), app, sock, ready, drain, tell))


async def _serve(
    server: _Server, app: FastAPI, sock: socket.socket, ready: Callable[[str], None], drain: Callable[[], Any],
    tell: Callable[[str], None],
) -> bool:  # fmt: skip
    def drain_behind_the_door() -> None:
        app.state.front.draining = True
        drain()

    stop = _Stop(server, drain_behind_the_door, tell)
    with on_signals(stop.heard):
        running = asyncio.create_task(server.serve(sockets=[sock]))
        while not (server.started or running.done()):
            await asyncio.sleep(0.01)
        if server.started:
            ready(url_of(sock))
        await running
    return not stop.hard

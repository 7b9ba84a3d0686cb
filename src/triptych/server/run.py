"""The application on a socket, until it is told to stop: once to drain, twice to stop at once."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from triptych.server.binding import on_signals, url_of

__all__ = ["serve_app"]

_GRACE = 5
"""Seconds that answers on their way may take once the server stops."""


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
        timeout_graceful_shutdown=_GRACE, limit_concurrency=app.state.front.settings.max_connections,
        forwarded_allow_ips="127.0.0.1,::1",  # a proxy on this machine tells which scheme its client used
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

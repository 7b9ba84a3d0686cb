"""The application on a socket, until it is told to stop: once to drain, twice to stop at once."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import cast

import uvicorn
from fastapi import FastAPI

from triptych.server.binding import on_signals, url_of
from triptych.server.lines import HEAD_SECONDS, Line

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

    def __init__(self, server: _Server, drain: Callable[[], bool], tell: Callable[[str], None]) -> None:
        self._server = server
        self._drain = drain
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._asked = 0
        self._well = False

    @property
    def well(self) -> bool:
        """Whether all that ran has ended, and it was asked once."""
        return self._well and self._asked == 1

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
            self._well = self._drain()
            if not self._well:
                self._tell("the time to drain is over, and not all that runs is finished")
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
    drain: Callable[[], bool] = lambda: True, tell: Callable[[str], None] = lambda text: None,
    head_seconds: float = HEAD_SECONDS,
) -> bool:  # fmt: skip
    """Answers on a bound socket until SIGTERM or SIGINT. `ready` is given the URL once requests are answered.

    The first signal calls `drain` on a thread of its own, while requests are still answered but no more jobs are
    taken, and ends when that returns; the second one ends at once. Returns whether it was drained: `drain` returns
    whether all that ran has ended. A client may take `head_seconds` to send a request's head.
    """
    # Of more connections than that, those with a request under way are answered by the guard, and others closed.
    line = partial(Line, waiting={}, most=app.state.front.settings.max_connections, seconds=head_seconds)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", ws="none", server_header=False,
        timeout_graceful_shutdown=_GRACE, http=cast("type[asyncio.Protocol]", line),
        forwarded_allow_ips="127.0.0.1,::1",  # a proxy on this machine tells which scheme its client used
    )  # fmt: skip
    return asyncio.run(_serve(_Server(config), app, sock, ready, drain, tell))


async def _serve(
    server: _Server, app: FastAPI, sock: socket.socket, ready: Callable[[str], None], drain: Callable[[], bool],
    tell: Callable[[str], None],
) -> bool:  # fmt: skip
    def drain_behind_the_door() -> bool:
        app.state.front.draining = True
        return drain()

    stop = _Stop(server, drain_behind_the_door, tell)
    with on_signals(stop.heard):
        running = asyncio.create_task(server.serve(sockets=[sock]))
        while not (server.started or running.done()):
            await asyncio.sleep(0.01)
        if server.started:
            ready(url_of(sock))
        await running
    return stop.well

"""Clients' connections: one that sends no whole request's head in time is closed, and so is one too many that waits."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["HEAD_SECONDS", "Line"]

HEAD_SECONDS = 20.0
"""That a request's head may take to come."""


class Line(H11Protocol):
    """uvicorn's own, which waits for ever for a request that never comes. `waiting`: the lines of this server that have
    no request under way, those that wait longest first; of more than `most` connections the first one is closed, so
    that clients that say nothing keep nobody out."""

    def __init__(
        self, *arguments: Any, waiting: dict[Line, None], most: int, seconds: float = HEAD_SECONDS, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self._waiting = waiting
        self._most = most
        self._seconds = seconds
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        if len(self.connections) > self._most and (longest := next(iter(self._waiting), None)):
            longest.close()
        self._waiting[self] = None
        self._late = self.loop.call_later(self._seconds, self.close)

    def data_received(self, data: bytes) -> None:
        if self._late is None and self.conn.their_state is h11.IDLE:
            self._late = self.loop.call_later(self._seconds, self.close)
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def close(self) -> None:
        """Ends the connection, once what was answered is out."""
        self._forget()
        self.transport.close()

    def _look(self) -> None:
        if self.transport.is_closing() or self.conn.their_state is not h11.IDLE:
            self._forget()
        else:
            self._waiting.setdefault(self)

    def _forget(self) -> None:
        self._waiting.pop(self, None)
        if self._late is not None:
            self._late.cancel()
            self._late = None

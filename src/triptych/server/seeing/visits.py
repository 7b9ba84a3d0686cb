"""One line in the log, and one count, for every request."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Visit", "Visits", "visit_of"]

logger = logging.getLogger("triptych.access")

_KEY = "triptych.visit"
_TRACE = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?=$|-)")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
UNKNOWN = "unknown"
"""The route of a request that none answers, and the method that none has: their kinds must not grow without bound."""


@dataclass(eq=False)
class Visit:
    """A request as those who look after the server see it: what its route fills in on the way."""

    trace: str = ""
    """the W3C `traceparent` that it came with"""
    client: str = ""
    """name of the API key"""
    job: str = ""
    code: str = ""
    """of the error that it was answered with"""


def visit_of(scope: MutableMapping[str, Any]) -> Visit:
    """The visit that a request is; one that nobody sees, where nobody looks."""
    return scope.get(_KEY) or Visit()


class Visits:
    """An ASGI middleware. `count` is told method, route, status, seconds and error code of every answer."""

    def __init__(self, app: ASGIApp, count: Callable[[str, str, int, float, str], None]) -> None:
        self._app = app
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = scope[_KEY] = Visit(_trace(scope))
        status = 500
        began = time.perf_counter()

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            self._tell(scope, visit, status, time.perf_counter() - began)

    def _tell(self, scope: Scope, visit: Visit, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", UNKNOWN)
        method = scope["method"] if scope["method"] in _METHODS else UNKNOWN
        self._count(method, route, status, seconds, visit.code)
        said = {"client": visit.client, "job": visit.job, "code": visit.code}
        found = {name: value for name, value in said.items() if value}
        logger.info(
            "%s %s %d %.1f ms%s",
            method,
            route,
            status,
            seconds * 1000,
            "".join(f" {name}={value}" for name, value in found.items()),
            extra={
                "event": "request", "method": method, "route": route, "status": status, "ms": round(seconds * 1000, 1),
                **found,
            },
        )  # fmt: skip


def _trace(scope: Scope) -> str:
    given = [value for name, value in scope["headers"] if name == b"traceparent"]
    found = _TRACE.match(given[0]) if len(given) == 1 else None
    return found.group().decode() if found else ""

"""What every request passes before any route sees it: whom it was sent to, by which web page, and how large it is."""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Callable
from functools import partial

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from triptych.config import ServeSection, is_loopback
from triptych.errors import QueueFull, TriptychError
from triptych.server.errors import BodyTooLarge, BodyTooSlow, TooManyConnections, WrongHost, WrongOrigin, answer

__all__ = ["Guard", "announced_size", "check_size"]

BODY_SECONDS = 600.0
"""That a request's body may take to come."""

_AUTHORITY = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(:(?P<port>\d{1,5}))?")
_PORTS = {"http": "80", "https": "443"}

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Cache-Control": "private, no-cache",
}
"""Of every answer that does not say otherwise itself."""

_CDN = "https://cdn.jsdelivr.net"
_DOCS_POLICY = (
    f"default-src 'none'; script-src {_CDN} 'unsafe-inline'; style-src {_CDN} 'unsafe-inline'; connect-src 'self'; "
    "img-src 'self' data: https://fastapi.tiangolo.com; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
"""For the framework's page of the API, which loads its script from there."""

_SHOWN_HEADERS = (
    "Content-Range", "ETag", "Idempotent-Replayed", "Location", "Preference-Applied", "Retry-After",
)  # fmt: skip


class Guard:
    """ASGI middleware, outside of all others. A keyless server on loopback is reached by every web page that its user
    looks at: through a name of the page's own that leads to 127.0.0.1, or directly, without seeing the answer. Neither
    gets past this. `docs`: the path of the API's page."""

    def __init__(self, app: ASGIApp, settings: ServeSection, docs: str | None = None) -> None:
        self._inside = app
        self._open: Callable[[ASGIApp], ASGIApp] = lambda app: app
        self._under_way = 0
        self._room = _Room(max(settings.max_bodies, settings.max_body))
        self._settings = settings
        self._docs = docs
        self._hosts = {name.lower().rstrip(".") for name in settings.hosts}
        self._origins = {origin.lower() for origin in settings.origins}
        if settings.origins:
            self._open = partial(
                CORSMiddleware, allow_origins=sorted(self._origins), allow_methods=("GET", "HEAD", "POST", "DELETE"),
                allow_headers=("*",), expose_headers=_SHOWN_HEADERS, allow_private_network=True,
            )  # fmt: skip
            self._inside = self._open(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._inside(scope, receive, send)
            return
        passage = _Passage(receive, send, self._settings.max_body, self._room, scope["path"] == self._docs)
        self._under_way += 1
        try:
            await self._answer(scope, passage)
        finally:
            self._under_way -= 1
            passage.give_back()

    async def _answer(self, scope: Scope, passage: _Passage) -> None:
        try:
            self._check(scope["method"], Headers(scope=scope))
        except TriptychError as error:
            await self._refuse(scope, passage, error)
            return
        try:
            await self._inside(scope, passage.receive, passage.send)
        except (BodyTooLarge, BodyTooSlow, QueueFull):
            if passage.started or passage.refusal is None:
                raise
        if passage.refusal is not None and not passage.started:
            passage.held = False
            await self._refuse(scope, passage, passage.refusal)

    async def _refuse(self, scope: Scope, passage: _Passage, error: TriptychError) -> None:
        """Tells a page that may know what is wrong."""
        response: ASGIApp = answer(Request(scope), error)
        # A page's browser that asks beforehand would be let in by what lets the answer out.
        await (response if scope["method"] == "OPTIONS" else self._open(response))(scope, passage.receive, passage.send)

    def _check(self, method: str, headers: Headers) -> None:
        """Raises WrongHost, WrongOrigin, TooManyConnections, or BodyTooLarge for a body that announces itself as too
        large."""
        host = self._host(headers)
        self._check_origin(method, headers, host)
        if self._under_way > (most := self._settings.max_connections):
            raise TooManyConnections(f"{most} requests are being answered, and no more are taken at a time")
        check_size(announced_size(headers), self._settings.max_body)

    def _host(self, headers: Headers) -> str:
        """The Host header, if it names this server."""
        given = headers.getlist("host")
        found = _AUTHORITY.fullmatch(given[0]) if len(given) == 1 else None
        if found is None:
            raise WrongHost(f"given {', '.join(given)[:80]!r}; allowed: one name of this server", field="host")
        name = found["host"].strip("[]").lower().rstrip(".")
        if not (self._hosts & {name, "*"} or self._is_own(name)):
            raise WrongHost(
                f"given {name[:80]!r}; allowed: {self._settings.host}, or a name that `serve.hosts` lists", field="host"
            )
        return given[0].lower()

    def _is_own(self, name: str) -> bool:
        if is_loopback(name) or name == self._settings.host.lower():
            return True
        if is_loopback(self._settings.host):
            return False
        try:  # an address is nobody's name: none that a page could have had lead here
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _check_origin(self, method: str, headers: Headers, host: str) -> None:
        origin = headers.get("origin")
        if origin is not None:
            if self._origins & {origin.lower(), "*"} or _same(origin.lower(), host):
                return
            raise WrongOrigin(
                f"given {origin[:80]!r}; allowed: this server's own pages, or those that `serve.origins` lists",
                field="origin",
            )
        # Browsers leave Origin out of what a page fetches blindly, such as pictures, but not this.
        if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
            return
        follows_a_link = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
        if not (follows_a_link and method in ("GET", "HEAD")):
            raise WrongOrigin("a web page elsewhere may not ask this server for anything", field="origin")


def _same(origin: str, host: str) -> bool:
    """Whether a page's origin is where its request goes. The scheme may differ: TLS may end before this server."""
    scheme, _, authority = origin.partition("://")
    default = _PORTS.get(scheme)
    return default is not None and authority.removesuffix(f":{default}") == host.removesuffix(f":{default}")


def announced_size(headers: Headers) -> int:
    """How many bytes a body says that it has; 0 where it does not."""
    given = headers.get("content-length", "0")
    return int(given[:20]) if given.isdecimal() else 0


def check_size(size: int, limit: int) -> None:
    """Raises BodyTooLarge for a body of more bytes than are taken."""
    if size > limit:
        raise BodyTooLarge(f"given more than that; allowed: at most {limit} bytes", field="body")


class _Room:
    """Room for the bodies of all requests in memory."""

    def __init__(self, size: int) -> None:
        self._free = self._all = size

    def take(self, size: int) -> None:
        """Raises QueueFull where there is no room for so many bytes more."""
        if size > self._free:
            raise QueueFull(f"the bodies of all requests may have {self._all} bytes at a time", field="body")
        self._free -= size

    def give_back(self, size: int) -> None:
        """Makes room again."""
        self._free += size


class _Passage:
    """One request's way in and its answer's way out."""

    def __init__(self, receive: Receive, send: Send, limit: int, room: _Room, docs: bool) -> None:
        self._receive = receive
        self._send = send
        self._limit = limit
        self._size = 0
        self._room = room
        self._taken = 0
        self._docs = docs
        self._until = asyncio.get_running_loop().time() + BODY_SECONDS
        self._whole = False
        self.started = False
        self.refusal: TriptychError | None = None
        self.held = False

    async def receive(self) -> Message:
        if self._whole:  # from here on it is only waited for the client to hang up; what was read has been used
            self.give_back()
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            raise self._refused(
                BodyTooSlow(f"given no end within {BODY_SECONDS:g} s; allowed: less", field="body")
            ) from None
        self._whole = not message.get("more_body", False)
        size = len(message.get("body", b""))
        self._size += size
        try:
            check_size(self._size, self._limit)
            self._room.take(size)
        except (BodyTooLarge, QueueFull) as error:
            raise self._refused(error) from None
        self._taken += size
        return message

    def give_back(self) -> None:
        """Makes room for other requests' bodies."""
        self._room.give_back(self._taken)
        self._taken = 0

    def _refused(self, error: TriptychError) -> TriptychError:
        self.refusal, self.held = error, True
        return error

    async def send(self, message: Message) -> None:
        if self.held and not self.started:
            return  # the framework makes 400 of it where it reads a body by itself
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
            if self._docs:
                headers["Content-Security-Policy"] = _DOCS_POLICY
        await self._send(message)

"""Pictures fetched from URLs, where an operator allows that, and from nowhere that only this machine can reach."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import h11

from triptych.config import ImageUrlsSection
from triptych.errors import InvalidRequest, MediaError, QueueFull

__all__ = ["Connect", "Fetcher", "Resolve", "is_public"]

Resolve = Callable[[str, int], Awaitable[Iterable[str]]]
"""A host's addresses, for a port. Raises OSError."""
Connect = Callable[[str, int, ssl.SSLContext | None, str], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
"""A connection to an address and port, with TLS where a context is given, for the host of that name."""

MAX_FETCHES = 16
"""At once; others wait for their turn."""
MAX_OWN_FETCHES = 4
"""At once for one API key."""
MAX_URL = 2048
MAX_ADDRESSES = 4
"""Of one host that are tried."""
_MAX_HEADERS = 16 * 1024
_READ = 64 * 1024
_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
_NUMBER = re.compile(r"\d+|0x[0-9a-f]*")
"""As a host's last part: the whole is an address in one of the many ways that C libraries read."""
_TYPES = ("application/octet-stream", "binary/octet-stream")
"""What stores say of files that they know nothing of."""
_REDIRECTS = (301, 302, 303, 307, 308)

_UNICAST = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_NOT_OURS = tuple(
    ipaddress.ip_network(block)
    for block in ("2002::/16", "2001::/32", "192.88.99.0/24", "168.63.129.16/32", "192.0.0.0/24", "3fff::/20")
)
"""Tunnels to addresses that nobody has checked, clouds' own services at addresses that look public, documentation."""


def is_public(address: str) -> bool:
    """Whether an address leads out into the internet, and neither to this machine, nor to its network, nor through a
    tunnel to either."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        if found in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
        if found.scope_id is not None or found not in _UNICAST:
            return False
    away = found.is_private or found.is_reserved or found.is_multicast or found.is_unspecified
    return found.is_global and not away and not any(found in one for one in _NOT_OURS if one.version == found.version)


@dataclass(frozen=True)
class _Target:
    """A URL that may be fetched."""

    url: str
    tls: bool
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """The Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS["https" if self.tls else "http"] else f"{host}:{self.port}"


class Fetcher:
    """Fetches pictures as a deployment allows. `resolve` and `connect` are the network; whatever they are, only public
    addresses are connected to."""

    def __init__(
        self, settings: ImageUrlsSection, resolve: Resolve | None = None, connect: Connect | None = None
    ) -> None:
        self._settings = settings
        self._resolve = resolve or _resolve
        self._connect = connect or _connect
        self._turns = asyncio.Semaphore(MAX_FETCHES)
        self._own_turns: dict[str, asyncio.Semaphore] = {}  # of callers, which are the deployment's keys: only so many
        self._context = ssl.create_default_context() if settings.allow else None

    async def fetch(self, url: str, field: str, caller: str = "") -> bytes:
        """A picture's bytes. `caller`: name of the API key, if any. Raises InvalidRequest naming `field` for a URL that
        may not be fetched, MediaError for one that cannot be, QueueFull while too many others are."""
        if not self._settings.allow:
            raise InvalidRequest.of(field, url[:80], "no URL: this deployment fetches none; send data:image/…;base64,…")
        target = self._target(url, field)
        seconds = self._settings.seconds
        async with self._turn(caller, field):
            try:
                async with asyncio.timeout(seconds):
                    return await self._follow(target, field)
            except TimeoutError:
                raise _failed(field, url, f"it took longer than {seconds:g} s") from None
            except (OSError, h11.RemoteProtocolError) as error:  # OSError: ssl's errors too
                raise _failed(field, url, f"its host does not answer as it should ({type(error).__name__})") from None

    @contextlib.asynccontextmanager
    async def _turn(self, caller: str, field: str) -> AsyncIterator[None]:
        """A block that is one of the few that fetch."""
        async with contextlib.AsyncExitStack() as turns:
            try:
                async with asyncio.timeout(self._settings.seconds):
                    if caller:  # its own first: whoever waits for that takes nobody else's place
                        own = self._own_turns.setdefault(caller, asyncio.Semaphore(MAX_OWN_FETCHES))
                        await turns.enter_async_context(own)
                    await turns.enter_async_context(self._turns)
            except TimeoutError:
                most = f"{MAX_FETCHES}, and {MAX_OWN_FETCHES} of one API key,"
                raise QueueFull(f"other pictures are being fetched; {most} are at once", field=field) from None
            yield

    async def _follow(self, target: _Target, field: str) -> bytes:
        for _ in range(self._settings.max_redirects + 1):
            found = await self._get(target, field)
            if isinstance(found, bytes):
                return found
            following = self._target(urljoin(target.url, found), field)
            if target.tls and not following.tls:
                raise _failed(field, target.url, "it redirects from https to http")
            target = following
        raise _failed(field, target.url, f"it redirects more than {self._settings.max_redirects} times")

    def _target(self, url: str, field: str) -> _Target:
        """The URL's parts. Raises InvalidRequest for one that may not be fetched."""
        if len(url) > MAX_URL or not re.fullmatch(r"[!-~]+", url) or "\\" in url:
            raise InvalidRequest.of(field, url[:80], f"a URL of at most {MAX_URL} characters, all of them ASCII")
        try:
            parts = urlsplit(url)
            port, host = parts.port, (parts.hostname or "").rstrip(".")
        except ValueError:
            raise InvalidRequest.of(field, url[:80], "a URL with a host and, if any, a port up to 65535") from None
        if parts.scheme not in _PORTS or not host:
            raise InvalidRequest.of(field, url[:80], "an http or https URL with a host")
        if "@" in parts.netloc:
            raise InvalidRequest.of(field, "a URL with a user in it", "one without")
        if not _is_host(host):
            raise InvalidRequest.of(field, url[:80], "a host's name, or an address in its usual form")
        port = _PORTS[parts.scheme] if port is None else port
        if not self._allows(host, port, parts.scheme):
            raise InvalidRequest.of(field, url[:80], f"URLs of {', '.join(self._settings.allow)} on its own port")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return _Target(url, parts.scheme == "https", host, port, path)

    def _allows(self, host: str, port: int, scheme: str) -> bool:
        for entry in self._settings.allow:
            name, _, only = entry.lower().partition(":")
            fits = name == host or name == "*" or (name.startswith("*.") and host.endswith(name[1:]))
            if fits and port == (int(only) if only.isdecimal() else _PORTS[scheme]):
                return True
        return False

    async def _get(self, target: _Target, field: str) -> bytes | str:
        """What lies at a URL, or where else it lies."""
        addresses = list(await self._resolve(target.host, target.port))
        # All of them: a name that also leads inside is up to something.
        if not addresses or not all(map(is_public, addresses)):
            raise InvalidRequest.of(field, target.url[:80], "a host with public addresses only")
        reader, writer = await self._open(addresses[:MAX_ADDRESSES], target)
        try:
            return await self._exchange(target, field, reader, writer)
        finally:
            writer.transport.abort()  # a goodbye could be waited for as long as the other likes

    async def _open(self, addresses: list[str], target: _Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        context = self._context if target.tls else None
        for address in addresses[:-1]:
            try:
                return await self._connect(address, target.port, context, target.host)
            except OSError:
                continue
        return await self._connect(addresses[-1], target.port, context, target.host)

    async def _exchange(
        self, target: _Target, field: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bytes | str:
        line = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEADERS)
        headers = [
            ("Host", target.authority), ("User-Agent", "triptych"), ("Accept", "image/*"),
            ("Accept-Encoding", "identity"), ("Connection", "close"),
        ]  # fmt: skip
        writer.write(line.send(h11.Request(method="GET", target=target.path, headers=headers)) or b"")
        writer.write(line.send(h11.EndOfMessage()) or b"")
        body = bytearray()
        while True:
            event = line.next_event()
            if event is h11.NEED_DATA:
                line.receive_data(await reader.read(_READ))
            elif isinstance(event, h11.Response):
                if (elsewhere := self._check(event, target, field)) is not None:
                    return elsewhere
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > self._settings.max_bytes:
                    raise self._too_large(field, target)
            elif isinstance(event, h11.EndOfMessage):
                return bytes(body)
            elif isinstance(event, h11.ConnectionClosed):
                raise _failed(field, target.url, "its host hung up")

    def _check(self, answer: h11.Response, target: _Target, field: str) -> str | None:
        """Where a redirect leads; None for an answer whose body is wanted. Raises MediaError for any other."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in answer.headers}
        if answer.status_code in _REDIRECTS and "location" in headers:
            return headers["location"]
        if answer.status_code != 200:
            raise _failed(field, target.url, f"its host answers {answer.status_code}")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if not kind.startswith("image/") and kind not in _TYPES:
            raise _failed(field, target.url, f"it is {kind[:40]!r} and no picture")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise _failed(field, target.url, "it comes compressed")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._settings.max_bytes:
            raise self._too_large(field, target)
        return None

    def _too_large(self, field: str, target: _Target) -> MediaError:
        return _failed(field, target.url, f"it has more than {self._settings.max_bytes} bytes")


def _is_host(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        parts = host.rpartition(".")
        return len(host) <= 253 and _HOST.fullmatch(host) is not None and not _NUMBER.fullmatch(parts[2])
    return "%" not in host


def _failed(field: str, url: str, problem: str) -> MediaError:
    return MediaError(f"given {url[:80]!r}, which cannot be fetched: {problem}", field=field)


async def _resolve(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for _, _, _, _, address in found]


async def _connect(
    address: str, port: int, context: ssl.SSLContext | None, host: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    # An address is taken as it is: nothing is resolved again, and no proxy is asked.
    return await asyncio.open_connection(
        address, port, ssl=context, server_hostname=None if context is None else host, limit=_READ
    )

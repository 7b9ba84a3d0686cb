"""How payloads may travel: what a worker's configuration says about its exchange."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from typing import Literal, get_args

import psutil

from triptych.errors import InvalidRequest
from triptych.messages import Route

__all__ = ["TransferSettings"]

ROUTES: tuple[Route, ...] = ("reference", "memfd", "mooncake", "tcp")
"""Every route, the one that is taken first where several are open first."""

MooncakeProtocol = Literal["tcp", "rdma"]
MIB = 2**20
MAX_SECONDS = 10**6
"""a socket takes no time limit of more than 2**31 milliseconds"""


@dataclass(frozen=True)
class TransferSettings:
    """Sizes in bytes, times in seconds. Raises InvalidRequest, naming the field, for what cannot be."""

    pool_bytes: int = 64 * MIB
    """the first segment of each of the two pools, of kept payloads and of arriving ones, made when first needed"""
    budget_bytes: int = 2048 * MIB
    """what each of the two pools may grow to; at most the machine's memory"""
    routes: tuple[Route, ...] | None = None
    """the routes that are served and taken, in order of preference; None: those that work here"""
    host: str = "127.0.0.1"
    """the address that the TCP and Mooncake routes listen on"""
    port: int = 0
    """of the TCP route; 0: any free one"""
    advertise: str | None = None
    """the address that others are told; None: `host`"""
    tls: bool = False
    """the TCP route is encrypted; the certificate's fingerprint is part of the address"""
    mooncake: bool = False
    """serve and take the Mooncake route; needs the extra `mooncake`"""
    mooncake_protocol: MooncakeProtocol = "tcp"
    mooncake_public: bool = False
    """Mooncake's ports are open to everybody and ask for nothing: allow them on a public address nevertheless"""
    connect_seconds: float = 5.0
    stall_seconds: float = 10.0
    """a transfer in which nothing moves for so long has failed"""
    reserve_seconds: float = 10.0
    """how long a full pool is waited for"""
    credits: int = 4
    """transfers from one peer at a time"""
    credit_bytes: int = 1024 * MIB
    """bytes in flight from one peer; a single larger payload travels alone"""
    max_connections: int = 64
    """data connections that are served at a time"""
    corrupt_every: int | None = None
    """a test's aid: in every so many-th payload that arrives as bytes, one byte is flipped before it is verified"""

    def __post_init__(self) -> None:
        for name in ("pool_bytes", "budget_bytes", "credits", "credit_bytes", "max_connections"):
            self._require(name, getattr(self, name) >= 1, "1 or more")
        for name in ("connect_seconds", "stall_seconds", "reserve_seconds"):
            self._require(name, 0 < getattr(self, name) <= MAX_SECONDS, f"seconds above 0, at most {MAX_SECONDS}")
        self._require("budget_bytes", self.budget_bytes >= self.pool_bytes, f"pool_bytes ({self.pool_bytes}) or more")
        total = psutil.virtual_memory().total
        self._require("budget_bytes", self.budget_bytes <= total, f"at most the machine's memory ({total})")
        self._require("port", 0 <= self.port < 65536, "0 to 65535")
        self._require("corrupt_every", self.corrupt_every is None or self.corrupt_every >= 1, "1 or more, or nothing")
        protocols = get_args(MooncakeProtocol)
        self._require("mooncake_protocol", self.mooncake_protocol in protocols, ", ".join(protocols))
        self._check_routes()
        self._check_host()

    def _check_routes(self) -> None:
        if self.routes is None:
            return
        known = bool(self.routes) and set(self.routes) <= set(ROUTES)
        self._require("routes", known, f"one or more of {', '.join(ROUTES)}")
        self._require("routes", "memfd" not in self.routes or has_memfd(), "this system has no memfd: tcp")
        if "mooncake" in self.routes:
            self._require("mooncake", self.mooncake, "true where routes name mooncake")

    def _check_host(self) -> None:
        if self.advertise is None:
            self._require("host", not is_any(self.host), "an address of this machine, or give `advertise` too")
        else:
            self._require("advertise", not is_any(self.advertise), "an address at which others reach this machine")

    def _require(self, name: str, good: bool, allowed: str) -> None:
        if not good:
            raise InvalidRequest.of(f"transfer.{name}", getattr(self, name), allowed)

    @property
    def open_routes(self) -> tuple[Route, ...]:
        """The routes that are served and taken here, best first."""
        if self.routes is not None:
            return self.routes
        closed = {route for route, here in (("memfd", has_memfd()), ("mooncake", self.mooncake)) if not here}
        return tuple(route for route in ROUTES if route not in closed)


def has_memfd() -> bool:
    """Whether this system has sealed memory files."""
    return hasattr(os, "memfd_create")


def is_any(host: str) -> bool:
    """Whether a host stands for all addresses of its machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return not host

"""Mooncake's transfer engine: it writes from the pool straight into a peer's pool, over RDMA where there is any.

What it does not do is done around it: a header and the right to ask for it go over our own data connection, the digest
is checked on arrival, a write that is not over in time leaves both buffers in quarantine, and one that fails at once is
tried again, since rejected transfers make the engine fail the next good one too.
"""

from __future__ import annotations

import importlib
import ipaddress
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from triptych.errors import Unsupported
from triptych.transfer.pool import Segment
from triptych.transfer.settings import TransferSettings
from triptych.transfer.shelf import Kept
from triptych.transfer.wire import LATE, NOT_PUT, PUT, Next, join_address

HCA_FOLDER = Path("/sys/class/infiniband")
ATTEMPTS = 3
POLL_SECONDS = 5e-4
AT_ONCE_SECONDS = 4.0
"""a failure that comes later is the engine's own time limit, which does not stop the write"""
SLOWEST = 50e6
"""bytes a second below which a write counts as stuck"""
MAX_SECONDS = 3600.0
_RUNNING, _DONE = 0, 1


def load_engine() -> Any:
    """The engine's class. Raises Unsupported with the reason it cannot be had."""
    try:
        return importlib.import_module("mooncake.engine").TransferEngine
    except ImportError as error:
        reason = f"it needs the extra `mooncake` and the libraries libibverbs, libnuma and libcurl ({error})"
        raise Unsupported(f"Mooncake cannot be loaded: {reason}", field="transfer.mooncake") from None


def protocol_in_use(asked: str, folder: Path = HCA_FOLDER) -> str:
    """The protocol that the engine really takes: without a host channel adapter it runs over TCP whatever it is told,
    and says nothing."""
    has_adapter = folder.is_dir() and any(folder.iterdir())
    return asked if has_adapter else "tcp"


def public_addresses() -> list[str]:
    """This machine's addresses that the world may reach."""
    found = []
    for addresses in psutil.net_if_addrs().values():
        for one in addresses:
            try:
                address = ipaddress.ip_address(one.address.partition("%")[0])
            except ValueError:
                continue  # a hardware address
            if address.is_global:
                found.append(str(address))
    return sorted(found)


class Mooncake:
    """One engine, with the segments of both pools registered. Any thread may call.

    Raises Unsupported if it cannot be loaded, if RDMA is asked for and there is none, or if its ports, which listen on
    every address and ask nobody who he is, would be open to the world.
    """

    def __init__(self, settings: TransferSettings) -> None:
        if not settings.mooncake_public and (public := public_addresses()):
            raise Unsupported(
                f"its ports would be open to everybody on {', '.join(public)}; allow that with mooncake_public",
                field="transfer.mooncake",
            )
        self.protocol = protocol_in_use(settings.mooncake_protocol)
        if self.protocol != settings.mooncake_protocol:
            raise Unsupported(
                f"given {settings.mooncake_protocol!r}; no adapter under {HCA_FOLDER}, so that it would run over tcp",
                field="transfer.mooncake_protocol",
            )
        self._stall = settings.stall_seconds
        self._engine: Any = load_engine()()
        host = settings.advertise or settings.host
        if self._engine.initialize(host, "P2PHANDSHAKE", self.protocol, "") != 0:
            raise Unsupported(f"Mooncake does not start on {host}", field="transfer.mooncake")
        self.session = join_address(host, self._engine.get_rpc_port(), "")
        self._lock = threading.Lock()

    def seconds(self, size: int) -> float:
        """How long a write of so many bytes may take."""
        return self._stall + size / SLOWEST

    def register(self, segment: Segment) -> None:
        """Makes a segment known to the engine. Raises Unsupported."""
        code = self._engine.register_memory(segment.address, segment.size)
        if code != 0:
            raise Unsupported(f"Mooncake does not take a segment of {segment.size} bytes (code {code})")

    def unregister(self, segment: Segment) -> None:
        """The opposite."""
        self._engine.unregister_memory(segment.address)

    def write(self, kept: Kept, how: Next) -> int:
        """Writes a kept body into a peer's memory: PUT, NOT_PUT, or LATE after the time that the peer allows."""
        assert kept.slot is not None, "only what lies in the pool is sent"
        ends = time.monotonic() + min(how.seconds, MAX_SECONDS)
        source = kept.slot.address + kept.offset
        for _ in range(ATTEMPTS):
            # The engine's submissions share lanes that it does not guard.
            with self._lock:
                batch = self._engine.transfer_submit_write(how.session, source, how.address, kept.body)
            began = time.monotonic()
            status = self._outcome(batch, ends) if batch > 0 else -1
            if status == _DONE:
                return PUT
            if status == _RUNNING or time.monotonic() - began > AT_ONCE_SECONDS:
                return LATE
        return NOT_PUT

    def _outcome(self, batch: int, ends: float) -> int:
        # Its own waiting call spins, and starves a small machine.
        while (status := self._engine.transfer_check_status(batch)) == _RUNNING and time.monotonic() < ends:
            time.sleep(POLL_SECONDS)
        return status

    def close(self) -> None:
        """Lets go of the engine, which ends its threads."""
        self._engine = None

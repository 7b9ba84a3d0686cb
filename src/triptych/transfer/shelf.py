"""What an exchange keeps for others, and to whom it hands it out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from triptych.errors import PayloadLost
from triptych.messages import ticket_is_good
from triptych.transfer.payload import Draft
from triptych.transfer.pool import Pool, Slot

NONCE_BYTES = 16
MAX_TICKETS = 256
"""tickets that are taken for one payload: far more than it has attempts"""


@dataclass(eq=False, slots=True)
class Kept:
    """A committed payload: in a slot of the pool (its body from `offset` on), or as the object itself."""

    name: str
    generation: int
    head: bytes = b""
    body: int = 0
    offset: int = 0
    slot: Slot | None = None
    draft: Draft | None = None
    nonces: set[bytes] = field(default_factory=set)
    lent: int = 0
    released: bool = False
    held: str | None = None
    """the peer to which a transfer of it timed out: late writes may still read the slot"""

    @property
    def view(self) -> memoryview:
        """The body's bytes in the pool."""
        assert self.slot is not None, "only what lies in the pool is sent"
        return self.slot.view.data[self.offset : self.offset + self.body]


class BadTicket(PayloadLost):
    """A token that was not made with our secret, or was shown before."""


class Shelf:
    """Committed payloads by name. A slot returns to the pool when its payload is released, nobody is being sent it,
    and no timed-out transfer may still touch it. Any thread may call."""

    def __init__(self, pool: Pool, secret: bytes) -> None:
        self._pool = pool
        self._secret = secret
        self._kept: dict[str, Kept] = {}
        self._held: list[Kept] = []
        self._lock = threading.Lock()

    def put(self, kept: Kept) -> None:
        """Commits it."""
        with self._lock:
            self._kept[kept.name] = kept

    def _find(self, name: str, generation: int) -> Kept:
        kept = self._kept.get(name)
        if kept is None or kept.generation != generation:
            raise PayloadLost(f"payload {name} in generation {generation} is no longer kept")
        return kept

    @contextmanager
    def lend(self, name: str, generation: int, token: bytes) -> Iterator[Kept]:
        """The payload, not to be freed within the block. Raises BadTicket, PayloadLost."""
        if not ticket_is_good(name, generation, token, self._secret):
            raise BadTicket(f"the ticket for {name} was not made for it")
        with self._lock:
            kept = self._find(name, generation)
            nonce = token[:NONCE_BYTES]
            if nonce in kept.nonces or len(kept.nonces) >= MAX_TICKETS:
                raise BadTicket(f"the ticket for {name} was used before")
            kept.nonces.add(nonce)
        with self.pin(name, generation) as kept:
            yield kept

    @contextmanager
    def pin(self, name: str, generation: int) -> Iterator[Kept]:
        """The payload, not to be freed within the block; for use in this process. Raises PayloadLost."""
        with self._lock:
            kept = self._find(name, generation)
            kept.lent += 1
        try:
            yield kept
        finally:
            with self._lock:
                kept.lent -= 1
                self._free_if_done(kept)

    def release(self, name: str) -> None:
        """Forgets it; an unknown name is not an error, since acknowledgements may come twice."""
        with self._lock:
            kept = self._kept.pop(name, None)
            if kept is not None:
                kept.released = True
                self._free_if_done(kept)

    def _free_if_done(self, kept: Kept) -> None:
        if not kept.released or kept.lent:
            return
        slot, kept.draft = kept.slot, None
        if slot is None:
            return
        if slot.segment.fd is not None:
            slot.wipe()
        if kept.held is not None:
            if kept not in self._held:
                self._held.append(kept)
            return
        kept.slot = None
        self._pool.free(slot)

    def hold(self, kept: Kept, peer: str) -> None:
        """Quarantines its slot until that peer is gone."""
        with self._lock:
            kept.held = peer

    def peer_gone(self, peer: str) -> None:
        """No write of that peer's can come any more."""
        with self._lock:
            for kept in [*self._held, *self._kept.values()]:
                if kept.held == peer:
                    kept.held = None
                    self._free_if_done(kept)
            self._held = [kept for kept in self._held if kept.slot is not None]

    def count(self) -> tuple[int, int, int]:
        """Payloads kept, their bytes, and slots in quarantine."""
        with self._lock:
            size = sum(len(kept.head) + kept.body for kept in self._kept.values())
            held = len(self._held) + sum(kept.held is not None for kept in self._kept.values())
            return len(self._kept), size, held

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            names = list(self._kept)
        for name in names:
            self.release(name)

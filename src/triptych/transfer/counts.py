"""What an exchange counts, and how much it lets be in flight from one peer."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from triptych.errors import PayloadLost
from triptych.messages import Route


@dataclass(frozen=True)
class ExchangeStats:
    """Numbers since the start, and bytes now. What others read from a shared pool is not seen by its owner and is no
    part of `sent`."""

    kept: int
    """payloads not yet released"""
    kept_bytes: int
    pool_bytes: int
    """segments of the pool of kept payloads"""
    arriving_bytes: int
    """segments of the pool that others send to"""
    open: int
    """fetched payloads not yet closed"""
    sent: dict[Route, int]
    sent_bytes: dict[Route, int]
    received: dict[Route, int]
    received_bytes: dict[Route, int]
    damaged: int
    """fetches that ended with a digest that did not match"""
    lost: int
    """fetches that ended without the payload"""
    refused: int
    """connections dropped for want of a good token"""
    quarantined: int
    """buffers that a timed-out transfer may still touch"""
    mooncake: str | None
    """the protocol that Mooncake really uses; None where it is not in use"""


class Counts:
    """Counters that any thread may raise."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.sent: Counter[Route] = Counter()
        self.sent_bytes: Counter[Route] = Counter()
        self.received: Counter[Route] = Counter()
        self.received_bytes: Counter[Route] = Counter()
        self.damaged = self.lost = self.refused = self.open = self._arrivals = 0

    def on_sent(self, route: Route, size: int) -> None:
        """A body has left."""
        with self._lock:
            self.sent[route] += 1
            self.sent_bytes[route] += size

    def on_received(self, route: Route, size: int) -> None:
        """A payload has come whole."""
        with self._lock:
            self.received[route] += 1
            self.received_bytes[route] += size
            self.open += 1

    def on_closed(self) -> None:
        """A fetched payload was given back."""
        with self._lock:
            self.open -= 1

    def on_refused(self) -> None:
        """A connection had no good token."""
        with self._lock:
            self.refused += 1

    def on_damaged(self) -> None:
        """A digest did not match."""
        with self._lock:
            self.damaged += 1

    def on_lost(self) -> None:
        """A payload could not be had."""
        with self._lock:
            self.lost += 1

    def next_arrival(self) -> int:
        """Counts a payload that arrives as bytes, from 1."""
        with self._lock:
            self._arrivals += 1
            return self._arrivals


class Credits:
    """At most so many transfers and bytes from one peer at a time; one transfer alone may be larger."""

    def __init__(self, number: int, size: int, timeout: float) -> None:
        self._number, self._size, self._timeout = number, size, timeout
        self._flying: dict[str, tuple[int, int]] = {}
        self._changed = threading.Condition()

    @contextmanager
    def take(self, peer: str, size: int) -> Iterator[None]:
        """A transfer of `size` bytes. Raises PayloadLost if others do not end in time."""
        ends = time.monotonic() + self._timeout
        with self._changed:
            while not self._fits(peer, size):
                if not self._changed.wait(max(ends - time.monotonic(), 0)) and time.monotonic() >= ends:
                    raise PayloadLost(f"{self._number} transfers from {peer} did not end in {self._timeout:g} s")
            self._add(peer, 1, size)
        try:
            yield
        finally:
            with self._changed:
                self._add(peer, -1, -size)
                self._changed.notify_all()

    def _fits(self, peer: str, size: int) -> bool:
        number, flying = self._flying.get(peer, (0, 0))
        return number == 0 or (number < self._number and flying + size <= self._size)

    def _add(self, peer: str, number: int, size: int) -> None:
        before = self._flying.get(peer, (0, 0))
        after = before[0] + number, before[1] + size
        if after[0]:
            self._flying[peer] = after
        else:
            self._flying.pop(peer, None)

"""How many jobs a caller may begin, and have at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from triptych.config import RatesSection
from triptych.errors import QueueFull

__all__ = ["Rates"]


class Rates:
    """One bucket of tokens for each caller, and a count of its jobs that have not ended. Callers are a deployment's
    keys, so there are only so many."""

    def __init__(self, settings: RatesSection, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._lock = threading.Lock()
        self._tokens: dict[str, tuple[float, float]] = {}

    def take(self, caller: str, under_way: Callable[[], int], count: int = 1) -> None:
        """Counts `count` new jobs. `under_way`: how many jobs of the caller have not ended. Raises QueueFull with the
        seconds after which to try again."""
        most = self._settings.jobs_at_once
        if most is not None and under_way() + count > most:
            raise QueueFull(f"this API key has {under_way()} jobs that have not ended; at most {most} are taken")
        rate = self._settings.jobs_per_minute
        if rate is None:
            return
        burst = max(1.0, rate)
        with self._lock:
            now = self._clock()
            tokens, since = self._tokens.get(caller, (burst, now))
            tokens = min(burst, tokens + (now - since) * rate / 60)
            if tokens < count:
                self._tokens[caller] = tokens, now
                wait = (count - tokens) * 60 / rate
                raise QueueFull(f"this API key may begin {rate:g} jobs a minute", retry_after=wait)
            self._tokens[caller] = tokens - count, now

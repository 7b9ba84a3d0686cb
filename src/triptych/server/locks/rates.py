"""How many jobs a caller may begin, and have at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from triptych.config import RatesSection
from triptych.errors import QueueFull

__all__ = ["Rates"]


class _Account:
    """One caller's: its tokens when they were last counted, and the lock that its new jobs pass one by one."""

    def __init__(self, tokens: float, since: float) -> None:
        self.lock = threading.Lock()
        self.tokens = tokens
        self.since = since


class Rates:
    """One bucket of tokens for each caller, and a bound on its jobs that have not ended. Callers are a deployment's
    keys, so there are only so many."""

    def __init__(self, settings: RatesSection, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = settings.jobs_at_once
        self._rate = settings.jobs_per_minute
        self._burst = max(1.0, settings.jobs_per_minute or 0.0)
        self._clock = clock
        self._lock = threading.Lock()
        self._accounts: dict[str, _Account] = {}

    @contextmanager
    def taking(self, caller: str, under_way: Callable[[], int]) -> Iterator[None]:
        """A block that begins one job of the caller, and counts it unless it fails. `under_way`: how many jobs of the
        caller have not ended. Raises QueueFull with the seconds after which to try again."""
        if self._most is None and self._rate is None:
            yield
            return
        with self._lock:
            account = self._accounts.setdefault(caller, _Account(self._burst, self._clock()))
        # Held until the job is there for `under_way` to count: two at once would both find the last place free.
        with account.lock:
            self._check(account, under_way)
            yield
            account.tokens -= 1

    def _check(self, account: _Account, under_way: Callable[[], int]) -> None:
        if self._most is not None and (jobs := under_way()) >= self._most:
            raise QueueFull(f"this caller has {jobs} jobs that have not ended; at most {self._most} are taken")
        if self._rate is None:
            return
        now = self._clock()
        account.tokens = min(self._burst, account.tokens + (now - account.since) * self._rate / 60)
        account.since = now
        if account.tokens < 1:
            wait = (1 - account.tokens) * 60 / self._rate
            raise QueueFull(f"this caller may begin {self._rate:g} jobs a minute", retry_after=wait)

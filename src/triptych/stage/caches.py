"""What is kept only to be faster, and can be let go of: registered by name, flushed on demand."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Caches", "Freed", "Used"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Freed:
    """What a flush let go of: bytes by cache, and the reasons of the caches that could not be flushed."""

    bytes: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Used:
    """How often a cache had what was asked for, and how often it had to be made, since the cache was registered."""

    hits: int
    misses: int


class Caches:
    """The caches of a stage, or of a worker's process. Used by the thread that drives the stage, between units; any
    thread may ask for what was `used`."""

    def __init__(self) -> None:
        self._flush: dict[str, Callable[[], int]] = {}
        self._used: dict[str, Callable[[], Used]] = {}

    def register(self, name: str, flush: Callable[[], int], used: Callable[[], Used] | None = None) -> None:
        """Adds a cache, in place of an older one of that name. `flush` lets go of what it holds and returns its
        bytes; afterwards the cache fills again by itself. `used` (None: nobody can know) counts, on any thread."""
        self._flush[name] = flush
        self._used.pop(name, None)
        if used is not None:
            self._used[name] = used

    def used(self) -> dict[str, Used]:
        """How each of those that count has served, in the order in which they came; without one whose counting
        fails."""
        found = {}
        for name, used in list(self._used.items()):
            try:
                found[name] = used()
            except Exception:  # whoever asks does so for a heartbeat
                logger.exception("the use of cache %s could not be counted", name)
                self._used.pop(name, None)
        return found

    def flush(self) -> Freed:
        """Flushes them all, in the order in which they came. One that fails does not keep the others."""
        freed = Freed()
        for name, flush in self._flush.items():
            try:
                freed.bytes[name] = flush()
            except Exception as error:
                logger.exception("cache %s could not be flushed", name)
                freed.failed[name] = f"{type(error).__name__}: {error}"
        return freed

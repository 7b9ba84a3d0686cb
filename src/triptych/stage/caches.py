"""What is kept only to be faster, and can be let go of: registered by name, flushed on demand."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Caches", "Freed"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Freed:
    """What a flush let go of: bytes by cache, and the reasons of the caches that could not be flushed."""

    bytes: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


class Caches:
    """The caches of a stage, or of a worker's process. Used by the thread that drives the stage, between units."""

    def __init__(self) -> None:
        self._flush: dict[str, Callable[[], int]] = {}

    def register(self, name: str, flush: Callable[[], int]) -> None:
        """Adds a cache, in place of an older one of that name. `flush` lets go of what it holds and returns its
        bytes; afterwards the cache fills again by itself."""
        self._flush[name] = flush

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

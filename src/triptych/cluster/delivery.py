"""Tells listeners what happened to their jobs: in order, and with no lock of the coordinator's held."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import Any, TypeVar

from triptych.cluster.jobs import Outcome
from triptych.messages import Stepped

__all__ = ["Delivery", "Watcher"]

T = TypeVar("T")
Watcher = Callable[[Stepped | Outcome], None]

logger = logging.getLogger(__name__)


class Delivery:
    """`put` under the coordinator's lock, `flush` outside of it. One thread delivers at a time; another that comes
    meanwhile leaves its share to it, so that a listener may call the coordinator without being called inside."""

    def __init__(self) -> None:
        self._listeners: dict[str, list[Watcher]] = {}
        self._waiting: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._lock = Lock()

    def add(self, job: str, listener: Watcher) -> Callable[[], None]:
        """Listens to a job from now on; call what is returned to stop."""
        listeners = self._listeners.setdefault(job, [])
        listeners.append(listener)

        def unwatch() -> None:
            if listener in listeners:
                listeners.remove(listener)

        return unwatch

    def put(self, job: str, event: Stepped | Outcome) -> None:
        """Something for everybody who listens to the job; after an outcome nobody does any more."""
        listeners = tuple(self._listeners.get(job, ()))  # another thread may take one out meanwhile
        self._waiting.extend((listener, event) for listener in listeners)
        if isinstance(event, Outcome):
            # Emptied, too: whoever may still stop listening would keep all of a job's listeners for as long.
            self._listeners.pop(job, []).clear()

    def tell(self, listener: Callable[[T], None], event: T) -> None:
        """Something for one listener alone."""
        self._waiting.append((listener, event))

    def flush(self) -> None:
        """Delivers what waits. A listener's exception is logged and reaches nobody else."""
        while self._waiting and self._lock.acquire(blocking=False):
            try:
                while self._waiting:
                    listener, event = self._waiting.popleft()
                    _call(listener, event)
            finally:
                self._lock.release()


def _call(listener: Callable[[Any], None], event: object) -> None:
    try:
        listener(event)
    except Exception:
        logger.exception("a listener failed")

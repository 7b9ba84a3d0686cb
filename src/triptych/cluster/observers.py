"""Who is told of all that happens to jobs and workers: the timeline, the counters, traces, logs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from triptych.cluster.jobs import JobRecord, JobSpec, Kept
from triptych.messages import Failed, Hello, Stepped, TaskDone
from triptych.request import StageName

__all__ = ["Observer", "Observers"]

logger = logging.getLogger(__name__)


class Observer:
    """Told of everything in order, with the coordinator's lock held: it must be quick and wait for nobody. `now` is the
    coordinator's clock, `worker` a worker's name. This one does nothing."""

    def assigned(self, spec: JobSpec, stage: StageName, attempt: int, worker: str, waited: float, now: float) -> None:
        """A job has left a stage's queue after `waited` seconds, for a worker."""

    def unit(self, spec: JobSpec, worker: str, message: Stepped, seconds: float, now: float) -> None:
        """A unit of a task has ended after so long."""

    def done(self, worker: str, message: TaskDone, began: float, now: float) -> None:
        """A task that was assigned at `began` has ended well; what it fetched it fetched when it began."""

    def failed(self, worker: str, message: Failed, now: float) -> None:
        """A task has ended badly."""

    def kept(self, job: str, what: str, kept: Kept, now: float) -> None:
        """The keeper has fetched a payload."""

    def came(self, hello: Hello, now: float) -> None:
        """A worker is in."""

    def went(self, hello: Hello, kind: str, reason: str, now: float) -> None:
        """A worker is out; kinds: silent, hung, unhealthy, gone, superseded, left."""

    def ended(self, record: JobRecord, now: float) -> None:
        """A job has ended."""

    def flush(self) -> None:
        """Time has passed; without the lock."""

    def close(self) -> None:
        """Nothing more comes; without the lock."""


class Observers:
    """Several of them as one. What happens is noted, and they hear of it in `tell`, so that no worker waits for them.
    One that fails is told of in the log; what is observed goes on."""

    def __init__(self, each: Iterable[Observer]) -> None:
        kept = tuple(each)
        self._noted: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self.assigned = self._note([one.assigned for one in kept])
        self.unit = self._note([one.unit for one in kept])
        self.done = self._note([one.done for one in kept])
        self.failed = self._note([one.failed for one in kept])
        self.kept = self._note([one.kept for one in kept])
        self.came = self._note([one.came for one in kept])
        self.went = self._note([one.went for one in kept])
        self.ended = self._note([one.ended for one in kept])
        self.flush = _fan([one.flush for one in kept])
        self.close = _fan([one.close for one in kept])

    def tell(self) -> None:
        """Tells what was noted, in order; with the coordinator's lock held."""
        noted, self._noted = self._noted, []
        for tell, args in noted:
            tell(*args)

    def _note(self, calls: list[Callable[..., None]]) -> Callable[..., None]:
        tell = _fan(calls)
        return lambda *args: self._noted.append((tell, args))


def _fan(calls: list[Callable[..., None]]) -> Callable[..., None]:
    def tell(*args: Any) -> None:
        for call in calls:
            try:
                call(*args)
            except Exception:
                logger.exception("an observer failed")

    return tell

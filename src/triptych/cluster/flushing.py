"""A flush of what workers keep only to be faster: who was asked, who has answered, and what that freed."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from triptych.messages import Flushed
from triptych.request import StageName

__all__ = ["FlushReport", "Flushing", "WorkerFlush"]


class WorkerFlush(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker let go of: bytes by stage and cache, and of the caches that its stages share. `failed`: by
    `stage/cache` or `process/cache`, why one could not be flushed."""

    worker: str
    stages: dict[StageName, dict[str, int]]
    process: dict[str, int]
    failed: dict[str, str]


class FlushReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a flush has freed. `unanswered`: workers that did not answer in time, or have left meanwhile."""

    workers: tuple[WorkerFlush, ...] = ()
    unanswered: tuple[str, ...] = ()
    coordinator: dict[str, int] = {}
    """bytes by cache of the coordinator's own process"""

    @property
    def freed_bytes(self) -> int:
        """All of them."""
        parts = [part for one in self.workers for part in (*one.stages.values(), one.process)]
        return sum(sum(part.values()) for part in (*parts, self.coordinator))


class Flushing:
    """One flush under way. Used under the coordinator's lock only."""

    def __init__(self, number: int, asked: Mapping[str, str]) -> None:
        """`asked`: the workers' names by incarnation."""
        self.number = number
        self._asked = dict(asked)
        self._waiting = set(asked)
        self._answers: dict[str, Flushed] = {}

    def answer(self, worker: str, message: Flushed) -> None:
        """A worker has answered; an answer to another flush is ignored."""
        if message.number == self.number and worker in self._waiting:
            self._waiting.discard(worker)
            self._answers[worker] = message

    def is_done(self, present: Mapping[str, object]) -> bool:
        """Whether everybody who was asked has answered, or is no longer present."""
        return not any(worker in present for worker in self._waiting)

    def report(self) -> FlushReport:
        """What is known by now."""
        return FlushReport(
            workers=tuple(
                WorkerFlush(
                    worker=self._asked[worker],
                    stages=message.stages,
                    process=message.process,
                    failed=message.failed,
                )
                for worker, message in self._answers.items()
            ),
            unanswered=tuple(sorted(self._asked[worker] for worker in self._waiting)),
        )

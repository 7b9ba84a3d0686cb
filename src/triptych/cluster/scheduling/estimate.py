"""When jobs will start and end: the scheduler's own choices, played forward with what stages were measured to take."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from triptych.cluster.scheduling.live import Live, Member
from triptych.request import StageName

__all__ = ["Estimate", "Seconds", "forecast"]

Seconds = Callable[[Member, Live, int], float]
"""What a stage (by its index) of a job still takes of a worker that has nothing else to do; infinite while nothing of
the kind was measured."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds until a job is begun (0: it is) and until it is done; None while that cannot be told."""

    starts_in: float | None = None
    done_in: float | None = None

    def later(self, seconds: float) -> Estimate:
        """The same, so much later."""
        return Estimate(_less(self.starts_in, seconds), _less(self.done_in, seconds))


def _less(value: float | None, seconds: float) -> float | None:
    return None if value is None else max(value - seconds, 0.0)


class _Worker:
    """A worker whose tasks share it evenly, as they do: one unit of each in turn."""

    def __init__(self, member: Member) -> None:
        self.member = member
        credits = member.credits if member.accepts else {}
        self.room = {stage: count - member.load.get(stage, 0) for stage, count in credits.items()}
        self._tasks: list[tuple[float, int, Live, int]] = []
        self._each = 0.0
        """seconds that each task has had so far, had it been there all the time"""
        self._at = 0.0

    def take(self, now: float, live: Live, index: int, seconds: float) -> None:
        self._pass(now)
        heapq.heappush(self._tasks, (self._each + seconds, live.order, live, index))

    def end(self) -> float:
        """When the first of its tasks ends."""
        return self._at + (self._tasks[0][0] - self._each) * len(self._tasks) if self._tasks else math.inf

    def finish(self, now: float) -> tuple[Live, int]:
        self._pass(now)
        _, _, live, index = heapq.heappop(self._tasks)
        return live, index

    def _pass(self, now: float) -> None:
        if self._tasks:
            self._each += (now - self._at) / len(self._tasks)
        self._at = now


class _Play:
    """A board as it will be."""

    def __init__(
        self, stages: Sequence[StageName], members: Iterable[Member], queues: Mapping[StageName, Iterable[Live]],
        seconds: Seconds, ahead: int,
    ) -> None:  # fmt: skip
        self.stages = stages
        self.workers = [_Worker(member) for member in members]
        self.queues = {stage: deque((live, live.record.stage) for live in queues[stage]) for stage in stages}
        self.seconds = seconds
        self.limits = {stage: ahead + 1 + sum(one.room.get(stage, 0) for one in self.workers) for stage in stages}
        self.running = dict.fromkeys(stages, 0)
        self.starts: dict[str, float] = {}
        self.ends: dict[str, float] = {}
        for worker in self.workers:
            for live in worker.member.running.values():
                index = live.record.stage
                self.limits[live.stages[index].stage] += 1
                self._begin(worker, live, index, 0.0)

    def run(self) -> None:
        now = 0.0
        while self.workers:
            self._assign(now)
            worker = min(self.workers, key=_Worker.end)
            if math.isinf(now := worker.end()):
                return
            live, index = worker.finish(now)
            stage = live.stages[index].stage
            self.running[stage] -= 1
            if stage in worker.room:
                worker.room[stage] += 1
            if index + 1 == len(live.stages):
                self.ends[live.id] = now
            else:
                self.queues[live.stages[index + 1].stage].append((live, index + 1))

    def _assign(self, now: float) -> None:
        """As `Board._assign` does: what is nearest its end goes first, to whoever has most room."""
        for stage in reversed(self.stages):
            queue = self.queues[stage]
            while queue and (worker := self._freest(stage)) is not None:
                live, index = queue[0]
                if index + 1 < len(live.stages) and self._is_full(stage, live.stages[index + 1].stage):
                    break
                queue.popleft()
                worker.room[stage] -= 1
                self._begin(worker, live, index, now)

    def _freest(self, stage: StageName) -> _Worker | None:
        found = max(self.workers, key=lambda one: one.room.get(stage, 0))
        return found if found.room.get(stage, 0) > 0 else None

    def _is_full(self, stage: StageName, following: StageName) -> bool:
        return len(self.queues[following]) + self.running[stage] >= self.limits[following]

    def _begin(self, worker: _Worker, live: Live, index: int, now: float) -> None:
        self.starts.setdefault(live.id, now)
        self.running[live.stages[index].stage] += 1
        worker.take(now, live, index, self.seconds(worker.member, live, index))


def forecast(
    stages: Sequence[StageName], members: Iterable[Member], queues: Mapping[StageName, Iterable[Live]],
    seconds: Seconds, ahead: int,
) -> dict[str, Estimate]:  # fmt: skip
    """When the jobs at these workers and in these queues (in their order) will start and end, if no more come and
    nothing goes wrong. `ahead`: outputs that may wait for a stage beyond its credits."""
    play = _Play(stages, members, queues, seconds, ahead)
    play.run()
    return {
        live.id: Estimate(0.0 if live.record.started is not None else play.starts.get(live.id), play.ends.get(live.id))
        for live in [
            *(live for worker in play.workers for live in worker.member.running.values()),
            *(live for stage in stages for live in queues[stage]),
        ]
    }

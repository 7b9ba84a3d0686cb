"""What is counted of jobs on their way, beside how they stand: how long things took, and what was transferred."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from triptych.cluster.jobs import JobRecord, JobSpec, JobState, Kept
from triptych.cluster.observers import Observer
from triptych.messages import Hello, Route, Stepped, TaskDone
from triptych.request import StageName

__all__ = ["BOUNDS", "Counters", "Measures", "Spread", "Transfers"]

BOUNDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0,
)  # fmt: skip
"""Seconds that bound a spread's classes from above; the last class has no bound."""

MAX_ABSENT = 64
"""Workers that are out and still named; those that went longest ago are forgotten."""


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """How many took how long: by class of `BOUNDS`, and in all."""

    counts: tuple[int, ...]
    seconds: float


class Transfers(msgspec.Struct, frozen=True, kw_only=True):
    """Payloads that came by one route."""

    bytes: int
    spread: Spread


class Measures(msgspec.Struct, frozen=True, kw_only=True):
    """Since the coordinator started. `waits`, `units` and `tasks`: seconds in each stage's queue, of its units (a
    denoising step, or the whole of a stage that has none), and from a task's assignment to its output; `jobs`: from
    submission to each kind of end; `rows`: pictures or clips that denoising steps computed; `absent`: workers that were
    in, are out, and did not leave of their own will, with their stages."""

    waits: dict[StageName, Spread] = {}
    units: dict[StageName, Spread] = {}
    tasks: dict[StageName, Spread] = {}
    jobs: dict[JobState, Spread] = {}
    transfers: dict[Route, Transfers] = {}
    rows: int = 0
    absent: dict[str, tuple[StageName, ...]] = {}


@dataclass(slots=True)
class _Tally:
    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    seconds: float = 0.0
    bytes: int = 0

    def add(self, seconds: float, size: int = 0) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds
        self.bytes += size

    def spread(self) -> Spread:
        return Spread(counts=tuple(self.counts), seconds=self.seconds)


class Counters(Observer):
    """Counts what happens. Used under the coordinator's lock only."""

    def __init__(self, stages: Iterable[StageName]) -> None:
        names = tuple(stages)
        self._waits: dict[StageName, _Tally] = {stage: _Tally() for stage in names}
        self._units: dict[StageName, _Tally] = {stage: _Tally() for stage in names}
        self._tasks: dict[StageName, _Tally] = {stage: _Tally() for stage in names}
        self._jobs: dict[JobState, _Tally] = {"done": _Tally(), "failed": _Tally(), "cancelled": _Tally()}
        self._transfers: dict[Route, _Tally] = {}
        self._rows = 0
        self._absent: OrderedDict[str, tuple[StageName, ...]] = OrderedDict()

    def measures(self) -> Measures:
        """What was counted so far."""
        return Measures(
            waits={stage: tally.spread() for stage, tally in self._waits.items()},
            units={stage: tally.spread() for stage, tally in self._units.items()},
            tasks={stage: tally.spread() for stage, tally in self._tasks.items()},
            jobs={state: tally.spread() for state, tally in self._jobs.items()},
            transfers={
                route: Transfers(bytes=tally.bytes, spread=tally.spread()) for route, tally in self._transfers.items()
            },
            rows=self._rows,
            absent=dict(self._absent),
        )

    def assigned(self, spec: JobSpec, stage: StageName, attempt: int, worker: str, waited: float, now: float) -> None:
        """See Observer."""
        self._waits[stage].add(waited)

    def unit(self, spec: JobSpec, worker: str, message: Stepped, seconds: float, now: float) -> None:
        """See Observer."""
        self._units[message.stage].add(seconds)
        if message.stage == "denoise":
            self._rows += spec.rows

    def done(self, worker: str, message: TaskDone, began: float, now: float) -> None:
        """See Observer."""
        self._tasks[message.stage].add(now - began)
        self._came_by(message.fetched_by, message.fetched_seconds, message.fetched_bytes)

    def kept(self, job: str, what: str, kept: Kept, now: float) -> None:
        """See Observer."""
        self._came_by(kept.fetched_by, kept.fetched_seconds, kept.fetched_bytes)

    def _came_by(self, route: Route | None, seconds: float, size: int) -> None:
        if route is not None:
            self._transfers.setdefault(route, _Tally()).add(seconds, size)

    def came(self, hello: Hello, now: float) -> None:
        """See Observer."""
        self._absent.pop(hello.name, None)

    def went(self, hello: Hello, kind: str, reason: str, now: float) -> None:
        """See Observer."""
        if kind in ("left", "superseded"):
            return
        self._absent[hello.name] = hello.stages
        while len(self._absent) > MAX_ABSENT:
            self._absent.popitem(last=False)

    def ended(self, record: JobRecord, now: float) -> None:
        """See Observer."""
        self._jobs[record.state].add(max((record.ended or record.submitted) - record.submitted, 0.0))

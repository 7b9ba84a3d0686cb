"""A job that has not ended and a worker that has not left, as the scheduler holds them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from triptych.cluster.jobs import JobRecord, StageSpec
from triptych.messages import Busy, Descriptor, Heartbeat, Hello
from triptych.request import StageName

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Live", "Member"]

Place = Literal["nowhere", "held", "queue", "worker", "keeper"]


@dataclass(eq=False, slots=True)
class Live:
    """A job on its way. Times are the scheduler's clock's seconds."""

    record: JobRecord
    order: int
    """by submission"""
    since: float
    """it waits, or runs, since then"""
    deadline: float = math.inf
    expires: float = math.inf
    """end of its time limit"""
    place: Place = "nowhere"
    worker: Member | None = None
    waited: float = 0.0
    unit_end: float = 0.0
    """seconds into the task at its last unit's end"""
    unit_seconds: float = 0.0
    """what that unit took"""
    unit_share: float = 0.0
    """its worker's `share` at that unit's end"""
    unit: tuple[int, int] = (0, 0)
    """which of how many units of its present task that was"""
    told: tuple[int, int] = (-1, 0)
    """stage and step of the last progress told, so that nothing is told twice"""
    foretold: dict[int, str] = field(default_factory=dict)
    """by stage that is still to come: the worker that expects it"""
    avoid: set[str] = field(default_factory=set)
    """workers where it failed by its own error"""
    errors: Counter[int] = field(default_factory=Counter)
    """by stage, since it last passed it: its own errors, damaged fetches, inputs that could not be had"""
    damages: Counter[int] = field(default_factory=Counter)
    losses: Counter[int] = field(default_factory=Counter)

    @property
    def id(self) -> str:
        return self.record.spec.id

    @property
    def client(self) -> str:
        return self.record.spec.client

    @property
    def rank(self) -> tuple[int, float, int]:
        """Its place among its client's jobs: priority, deadline, age."""
        return -self.record.spec.priority, self.deadline, self.order

    @property
    def stages(self) -> tuple[StageSpec, ...]:
        return self.record.spec.stages

    @property
    def stage(self) -> StageName | None:
        """The stage it waits for or runs in; None when only its result is still to be kept."""
        index = self.record.stage
        return self.stages[index].stage if index < len(self.stages) else None

    @property
    def next(self) -> StageName | None:
        index = self.record.stage + 1
        return self.stages[index].stage if index < len(self.stages) else None

    @property
    def input(self) -> Descriptor | None:
        return self.record.inputs[self.record.stage]

    def held(self) -> Iterator[Descriptor]:
        """Every payload that workers keep for it."""
        return (descriptor for descriptor in self.record.inputs if descriptor is not None)


@dataclass(eq=False, slots=True)
class Member:
    """A worker that was let in."""

    hello: Hello
    order: int
    seen: float
    """its last sign of life"""
    loading: bool = True
    ready: bool = False
    proving: bool = False
    draining: bool = False
    capacity: dict[StageName, int] = field(default_factory=dict)
    credits: dict[StageName, int] = field(default_factory=dict)
    weights: dict[StageName, int] = field(default_factory=dict)
    running: dict[str, Live] = field(default_factory=dict)
    """what it was given and has not answered, by job"""
    load: dict[StageName, int] = field(default_factory=dict)
    moved: float = 0.0
    """when it last said something of a task or of its loading, or was given a task"""
    heartbeat: Heartbeat | None = None
    done: int = 0
    failed: int = 0
    _share: float = 0.0
    _shared: float = 0.0

    @property
    def id(self) -> str:
        return self.hello.incarnation

    @property
    def accepts(self) -> bool:
        """Whether it takes tasks at all."""
        return self.ready and not (self.proving or self.draining)

    @property
    def state(self) -> str:
        if self.draining:
            return "draining"
        if self.proving:
            return "proving"
        if self.loading:
            return "loading"
        return "busy" if self.running else "idle"

    @property
    def busy(self) -> Busy | None:
        return self.heartbeat.busy if self.heartbeat else None

    @property
    def taken(self) -> bool:
        """Whether a suspect has it for itself."""
        return len(self.running) == 1 and next(iter(self.running.values())).record.alone

    def has_room(self, stage: StageName) -> bool:
        """Whether a credit for the stage is left."""
        return self.load.get(stage, 0) < self.credits.get(stage, 0)

    def fullness(self, stage: StageName) -> float:
        """Its tasks of this stage over how many it takes at once."""
        return self.load.get(stage, 0) / max(self.capacity.get(stage, 1), 1)

    def share(self, now: float) -> float:
        """Seconds that a task had of it by now, had it been here all the time: those that it holds share it evenly."""
        if self.running:
            self._share += (now - self._shared) / len(self.running)
        self._shared = now
        return self._share

    def take(self, live: Live, stage: StageName, now: float) -> None:
        live.unit_share, live.unit = self.share(now), (0, 0)
        self.running[live.id] = live
        self.load[stage] = self.load.get(stage, 0) + 1
        self.moved = now
        live.worker, live.place = self, "worker"

    def give_back(self, live: Live, stage: StageName, now: float) -> None:
        self.share(now)
        del self.running[live.id]
        self.load[stage] -= 1
        self.moved = now
        live.worker, live.place = None, "nowhere"

"""The workers that are in: what each can take, what a unit takes there, and which are silent or hung."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from triptych.cluster.jobs import JobSpec
from triptych.cluster.limits import Limits
from triptych.cluster.scheduling.live import Live, Member
from triptych.messages import Hello
from triptych.request import StageName, VaeTask

__all__ = ["Fleet", "StageTally"]

NEWER = 0.1
"""Weight of the newest measurement in a mean."""
NEWER_SHARE = 0.3
"""The same for what estimates are made of: the first ones include warming up."""
RATE_SECONDS = 60.0
OCTAVES = 64
"""Sizes, each twice the one before, that are measured apart."""


@dataclass(slots=True)
class Measure:
    """What a unit of jobs of about one size took, in seconds for a job of work 1."""

    unit_seconds: float = 0.0
    largest: float = 0.0
    """the largest job measured, in work"""
    newer: float = NEWER

    def add(self, seconds: float, work: float) -> None:
        """One unit of a job of that work took so long."""
        each = seconds / work
        self.unit_seconds = each if not self.largest else self.unit_seconds + self.newer * (each - self.unit_seconds)
        self.largest = max(self.largest, work)

    def expected(self, work: float) -> float:
        """Seconds of a unit of such a job. Attention grows with the square, so a job larger than any that was
        measured is expected to take that."""
        return self.unit_seconds * work * max(1.0, work / self.largest)


Key = tuple[StageName, str, VaeTask | None]
"""A stage, a kind of device, and the call if it is one of the VAE by itself."""


class Measures:
    """What units took: by size, since only between sizes that are close seconds grow as the work does."""

    def __init__(self, newer: float) -> None:
        self._newer = newer
        self._found: dict[Key, dict[int, Measure]] = {}

    def add(self, key: Key, seconds: float, work: float) -> None:
        """One unit of a job of that work took so long."""
        sizes = self._found.setdefault(key, {})
        sizes.setdefault(_octave(work), Measure(newer=self._newer)).add(seconds, work)

    def expected(self, key: Key, work: float) -> float | None:
        """Seconds of a unit of such a job, by the nearest size that was measured; None while none was."""
        sizes = self._found.get(key)
        if sizes is None:
            return None
        octave = _octave(work)
        return sizes[min(sizes, key=lambda size: (abs(size - octave), -size))].expected(work)

    def longest(self, stage: StageName, kind: str) -> float | None:
        """Seconds of a unit of the largest job measured there, whatever it was."""
        found = [sizes[max(sizes)] for key, sizes in self._found.items() if key[:2] == (stage, kind)]
        return max((one.expected(one.largest) for one in found), default=None)


@dataclass(slots=True)
class StageTally:
    """What a stage has done."""

    done: int = 0
    failed: int = 0
    task_seconds: float = 0.0
    """mean, from assignment to output"""
    unit_seconds: float = 0.0
    """mean"""
    units: float = 1.0
    """mean, of a task"""
    rest: float = 0.0
    """mean seconds of its worker that a task took beyond its units"""
    ends: deque[float] = field(default_factory=lambda: deque(maxlen=1024))

    def unit(self, seconds: float) -> None:
        """A unit has ended."""
        self.unit_seconds = self.unit_seconds + NEWER * (seconds - self.unit_seconds) if self.unit_seconds else seconds

    def task(self, seconds: float, now: float, units: int, rest: float) -> None:
        """A task has ended well."""
        newer = NEWER_SHARE if self.done else 1.0
        self.units += newer * (units - self.units)
        self.rest += newer * (rest - self.rest)
        self.task_seconds = self.task_seconds + NEWER * (seconds - self.task_seconds) if self.done else seconds
        self.done += 1
        self.ends.append(now)

    def per_minute(self, now: float) -> float:
        """Tasks that ended within the last minute."""
        return float(sum(end > now - RATE_SECONDS for end in self.ends))


class Fleet:
    """The workers by incarnation, and by the exchange that keeps their payloads."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._members: dict[str, Member] = {}
        self._owners: dict[str, Member] = {}
        self._stages: dict[StageName, list[Member]] = {}
        self._measures = Measures(NEWER)
        self._paces = Measures(NEWER_SHARE)
        self._count = 0

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def get(self, incarnation: str) -> Member | None:
        """The worker, if it is in."""
        return self._members.get(incarnation)

    def owner(self, owner: str) -> Member | None:
        """The worker whose exchange this is, if it is in."""
        return self._owners.get(owner)

    def add(self, hello: Hello, now: float) -> Member:
        """Lets a worker in."""
        self._count += 1
        member = Member(hello, self._count, now, moved=now)
        self._members[hello.incarnation] = self._owners[hello.owner] = member
        for stage in hello.stages:
            self._stages[stage] = [*self.with_stage(stage), member]  # a new list: others read without the lock
        return member

    def remove(self, member: Member) -> None:
        """Forgets a worker."""
        del self._members[member.id]
        if self._owners.get(member.hello.owner) is member:
            del self._owners[member.hello.owner]
        for stage in member.hello.stages:
            self._stages[stage] = [other for other in self.with_stage(stage) if other is not member]

    def predecessors(self, hello: Hello) -> list[Member]:
        """Workers that cannot be there any more if this one is: with the same exchange, or in the same slot."""
        return [
            member
            for member in self
            if member.hello.owner == hello.owner or (member.hello.slot is not None and member.hello.slot == hello.slot)
        ]

    def with_stage(self, stage: StageName) -> list[Member]:
        """Workers that hold a stage, loaded or not."""
        return self._stages.get(stage, [])

    def credits(self, stage: StageName) -> int:
        """Tasks of a stage that all workers together take."""
        return sum(member.credits.get(stage, 0) for member in self.with_stage(stage) if member.accepts)

    def any_room(self, stage: StageName) -> bool:
        """Whether some worker could take a task of this stage."""
        return any(member.accepts and member.has_room(stage) for member in self.with_stage(stage))

    def choose(self, live: Live, stage: StageName, reserved: set[str]) -> Member | None:
        """The worker for a job: with a credit left, not where the job failed if there is another, least full first,
        then where its input lies. A suspect gets a worker to itself; when none is idle, the least full one is
        reserved, so that it will be."""
        members = [
            member
            for member in self.with_stage(stage)
            if member.accepts and member.credits.get(stage) and member.id not in reserved
        ]
        members = [member for member in members if member.id not in live.avoid] or members
        if live.record.alone:
            members.sort(key=lambda member: (len(member.running), member.order))
            if members and members[0].running:
                reserved.add(members[0].id)
            return members[0] if members and not members[0].running else None
        at = live.input.owner if live.input else None
        able = [member for member in members if member.has_room(stage) and not member.taken]
        return min(able, key=lambda member: _fitness(member, stage, at), default=None)

    def idle(self, stage: StageName, at: Member) -> Member | None:
        """The worker that has nothing to do and would get a task of this stage whose input lies at `at`."""
        able = [
            member
            for member in self.with_stage(stage)
            if member.accepts and member.credits.get(stage) and not member.running
        ]
        return min(able, key=lambda member: _fitness(member, stage, at.hello.owner), default=None)

    def measure(self, member: Member, stage: StageName, seconds: float, spec: JobSpec) -> None:
        """A unit took so long."""
        self._measures.add((stage, _kind(member), spec.bare), seconds, spec.work)

    def pace(self, member: Member, stage: StageName, share: float, spec: JobSpec) -> None:
        """A unit took so many seconds of its worker, what that did beside it not counted."""
        self._paces.add((stage, _kind(member), spec.bare), share, _size(stage, spec))

    def unit_share(self, member: Member, stage: StageName, spec: JobSpec) -> float | None:
        """What a unit of such a job is expected to take of a worker; None while none was measured."""
        return self._paces.expected((stage, _kind(member), spec.bare), _size(stage, spec))

    def unit_limit(self, member: Member, stage: StageName, spec: JobSpec | None) -> float:
        """Seconds after which a unit is hung; `spec` None: of a job as large as the largest measured."""
        if spec is None:
            expected = self._measures.longest(stage, _kind(member))
        else:
            expected = self._measures.expected((stage, _kind(member), spec.bare), spec.work)
        if expected is None:
            return max(self._limits.first_unit_seconds, self._limits.hung_floor_seconds)
        return max(self._limits.hung_floor_seconds, self._limits.hung_factor * expected)

    def is_hung(self, member: Member) -> str | None:
        """Why the unit that runs there is hung, or None."""
        busy = member.busy
        if busy is None or member.loading:
            return None
        live = member.running.get(busy.job)
        limit = self.unit_limit(member, busy.stage, live.record.spec if live else None)
        if busy.seconds <= limit:
            return None
        return f"a unit of {busy.stage} has run for {busy.seconds:.1f} s; allowed: {limit:.1f} s"

    def overdue(self, now: float) -> Iterable[tuple[Member, str, str]]:
        """Workers to be dismissed at this time, each with the kind (silent or hung) and the reason."""
        limits = self._limits
        for member in list(self):
            lease = limits.loading_seconds if member.loading else limits.lease_seconds
            idle = now - member.moved
            if now - member.seen > lease:
                yield member, "silent", f"silent for {now - member.seen:.1f} s; allowed: {lease:g} s"
            elif member.loading and idle > limits.loading_seconds:
                yield member, "hung", f"has been loading for {idle:.0f} s without getting further"
            elif member.loading or member.busy is not None:
                continue
            elif member.proving and not member.running and idle > limits.prove_seconds:
                yield member, "hung", f"did not prove within {limits.prove_seconds:g} s that it still works"
            elif member.running and idle > limits.stalled_seconds:
                yield member, "hung", f"holds {len(member.running)} tasks and did nothing for {idle:.0f} s"

    def forgive(self, now: float) -> None:
        """Counts nobody's silence until now: it was we who did not listen."""
        for member in self:
            member.seen = max(member.seen, now)
            member.moved = max(member.moved, now)


def _fitness(member: Member, stage: StageName, at: str | None) -> tuple[float, bool, int, int]:
    return member.fullness(stage), member.hello.owner != at, len(member.running), member.order


def _size(stage: StageName, spec: JobSpec) -> float:
    """Encoding a prompt takes the same whatever the picture's size."""
    return 1.0 if stage == "encode" and spec.bare is None else spec.work


def _octave(work: float) -> int:
    return min(max(round(math.log2(work)), 0), OCTAVES - 1)


def _kind(member: Member) -> str:
    return member.hello.device.partition(":")[0]

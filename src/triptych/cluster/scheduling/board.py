"""Where every job stands: in a queue, at a worker, with the keeper, or waiting for a worker to come back; and the one
loop that hands jobs to workers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from triptych.cluster.jobs import JobRecord, JobState, snapshot
from triptych.cluster.limits import Limits
from triptych.cluster.scheduling.actions import Action, Assign, CancelAt, Drop, Ended, Foretell, Persist
from triptych.cluster.scheduling.fleet import Fleet, StageTally
from triptych.cluster.scheduling.ledger import Ledger
from triptych.cluster.scheduling.live import Live, Member
from triptych.cluster.scheduling.queues import Shares, StageQueue
from triptych.messages import Descriptor
from triptych.request import StageName

__all__ = ["Board", "Counts"]


@dataclass(slots=True)
class Counts:
    """What has happened since the start."""

    submitted: int = 0
    rejected: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    retries: int = 0
    """tasks handed out once more, for whatever reason"""
    resumes: int = 0
    """tasks that went on from a checkpoint"""
    remade: int = 0
    """inputs produced again"""
    workers_lost: int = 0
    digest_failures: int = 0
    quarantined: int = 0


class Board:
    """The scheduler's state and the ways in which a job moves on it."""

    def __init__(
        self, stages: Iterable[StageName], limits: Limits, clock: Callable[[], float], wall: Callable[[], float]
    ) -> None:
        self.limits = limits
        self.stages = tuple(stages)
        self.fleet = Fleet(limits)
        self.counts = Counts()
        self.tallies: dict[StageName, StageTally] = {stage: StageTally() for stage in self.stages}
        self.jobs: dict[str, Live] = {}
        self._clock = clock
        self._wall = wall
        self._out: list[Action] = []
        self._ledger = Ledger(self.fleet, self._out)
        self._shares = Shares()
        self._queues = {stage: StageQueue(self._shares) for stage in self.stages}
        self._running: dict[StageName, int] = dict.fromkeys(self.stages, 0)
        self._held: dict[str, Live] = {}
        """jobs from before a restart whose workers may come back with them"""
        self._grace = -math.inf
        self._not_begun: Counter[str] = Counter()
        """jobs that wait for their first task, by client"""
        self._count = 0

    def _assign(self) -> None:
        """The loop: whoever has a credit gets the job whose turn it is; what is nearest its end goes first."""
        reserved: set[str] = set()
        for stage in reversed(self.stages):
            while (pick := self._pick(stage, reserved)) is not None:
                self._hand_out(*pick, stage)

    def _pick(self, stage: StageName, reserved: set[str]) -> tuple[Live, Member] | None:
        queue = self._queues[stage]
        if not len(queue) or not self.fleet.any_room(stage):
            return None
        for live in queue.ordered():
            if self._too_far_ahead(live, stage):
                continue
            if member := self.fleet.choose(live, stage, reserved):
                return live, member
        return None

    def _too_far_ahead(self, live: Live, stage: StageName) -> bool:
        """Whether the next stage has enough waiting for it; outputs pile up in their workers' memory."""
        following = live.next
        if following is None:
            return self._ledger.results() >= self.limits.ahead + self.fleet.credits(stage)
        coming = len(self._queues[following]) + self._running[stage]
        return coming >= self.limits.ahead + self.fleet.credits(following) + 1

    def _hand_out(self, live: Live, member: Member, stage: StageName) -> None:
        now, record = self._clock(), live.record
        self._queues[stage].remove(live)
        record.attempts[record.stage] += 1
        attempt = record.attempts[record.stage]
        if attempt == 1:
            self._shares.charge(live.client, record.spec.work / len(live.stages))
        else:
            self.counts.retries += 1
        self._begin(live)
        live.waited, live.since, live.unit_end = now - live.since, now, 0.0
        member.take(live, stage, now)
        self._running[stage] += 1
        if live.foretold.get(record.stage) == member.id:
            del live.foretold[record.stage]
        self._retract(live, up_to=record.stage)
        self._out.append(Assign(member.id, live.id, record.stage, attempt, live.waited))
        if stage != "denoise":  # of steps: while its first ones run is time enough, and nobody is in its way
            self._foretell(live, member)

    def _foretell(self, live: Live, member: Member) -> None:
        """Tells a worker of the stage that follows what will come to it from `member`, if it has nothing to do: its
        preparations then take none of the job's time. Nothing of a suspect, nor of a stage that has more to bring than
        the output of the one before."""
        record, index = live.record, live.record.stage + 1
        if index >= len(live.stages) or index in live.foretold or record.alone:
            return
        part = live.stages[index]
        resumes = record.checkpoint is not None and record.checkpoint_stage == index
        if part.pictures or resumes or part.stage in member.hello.stages:
            return
        idle = self.fleet.idle(part.stage, member)
        if idle is not None and idle.id not in live.foretold.values():
            live.foretold[index] = idle.id
            self._out.append(Foretell(idle.id, live.id, index))

    def _retract(self, live: Live, up_to: int) -> None:
        """A stage up to that one is not to be expected any more where it was foretold."""
        for index in [index for index in live.foretold if index <= up_to]:
            self._out.append(CancelAt(live.foretold.pop(index), live.id))

    def _begin(self, live: Live) -> None:
        record = live.record
        if record.started is None:
            self._waits_no_more(live)
            record.started = self._wall()
            live.expires = self._clock() + self.limits.time_limit_seconds
        record.state = "running"

    def _waits_no_more(self, live: Live) -> None:
        self._not_begun[live.client] -= 1
        if not self._not_begun[live.client]:
            del self._not_begun[live.client]

    def _follow(self, record: JobRecord) -> Live:
        """A job is ours from now on."""
        now, wall, spec = self._clock(), self._wall(), record.spec
        self._count += 1
        live = Live(record, self._count, now)
        if spec.deadline is not None:
            live.deadline = now + record.submitted + spec.deadline - wall
        if record.started is not None:
            live.expires = now + record.started + self.limits.time_limit_seconds - wall
        else:
            self._not_begun[spec.client] += 1
        self.jobs[spec.id] = live
        self._shares.enter(spec.client)
        return live

    def _arrive(self, live: Live) -> None:
        """Puts a job that nobody runs where it can go on: as far as its inputs can still be had."""
        record = live.record
        while record.stage and (presence := self._ledger.presence(live.input)) != "here":
            if presence == "expected":
                self._hold(live)
                return
            self._forget_input(record, record.stage)
            record.stage -= 1
            self.counts.remade += 1
        live.since = self._clock()
        stage, descriptor = live.stage, live.input
        if stage is not None:
            live.place = "queue"
            self._queues[stage].add(live)
        elif descriptor is not None:
            live.place = "keeper"
            self._ledger.fetch(live.id, "result", descriptor)

    def _hold(self, live: Live) -> None:
        live.place = "held"
        self._held[live.id] = live

    def _withdraw(self, live: Live) -> None:
        """Takes a job from wherever it waits or runs."""
        if live.worker is not None:
            self._out.append(CancelAt(live.worker.id, live.id))
            self._take_from(live)
        elif live.place == "held":
            del self._held[live.id]
        elif live.place == "queue" and live.stage is not None:
            self._queues[live.stage].remove(live)
        live.place = "nowhere"

    def _take_from(self, live: Live) -> None:
        stage = live.stage
        assert live.worker is not None and stage is not None, f"job {live.id} is not at a worker"
        live.worker.give_back(live, stage, self._clock())
        self._running[stage] -= 1

    def _settle_held(self) -> None:
        """Who was to come back has had the time to: its jobs go on without it."""
        held = list(self._held.values())
        self._held.clear()
        for live in held:
            self._arrive(live)

    def _end(self, live: Live, state: JobState) -> None:
        """A job has ended: everything kept for it is let go, but for what the keeper is still fetching."""
        self._withdraw(live)
        record = live.record
        if record.started is None:
            self._waits_no_more(live)
        record.state, record.ended = state, self._wall()
        setattr(self.counts, state, getattr(self.counts, state) + 1)
        if self._ledger.fetching(live.id, "result"):
            record.inputs[-1] = None
        for descriptor in live.held():
            self._ledger.release(descriptor)
        record.inputs = [None] * len(record.inputs)
        self._retract(live, up_to=len(live.stages))
        del self.jobs[live.id]
        self._shares.leave(live.client)
        self._out.append(Persist(snapshot(record)))
        if state == "cancelled":
            self._out.append(Drop(live.id, None))
        else:  # of a failed one, what is worth keeping was copied with its task
            self._out.extend(Drop(live.id, what) for what in ("checkpoint", "pictures"))
        self._out.append(Ended(snapshot(record)))

    def _pass_on(self, live: Live, output: Descriptor) -> None:
        """The next stage's input is there. What the stage before this one consumed was kept in case this one's input
        had to be produced again; now it is let go."""
        record, stage = live.record, live.record.stage
        self._forget_input(record, stage - 1)
        if record.checkpoint is not None and record.checkpoint_stage < stage:
            self._drop_checkpoint(live)
        self._ledger.release(record.inputs[stage + 1])
        record.inputs[stage + 1] = output
        record.stage += 1

    def _forget_input(self, record: JobRecord, stage: int) -> None:
        if stage >= 0:
            self._ledger.release(record.inputs[stage])
            record.inputs[stage] = None

    def _drop_checkpoint(self, live: Live) -> None:
        live.record.checkpoint, live.record.checkpoint_step = None, 0
        self._out.append(Drop(live.id, "checkpoint"))

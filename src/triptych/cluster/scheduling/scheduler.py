"""The scheduler: what happened comes in, what is to be done goes out. No input or output, no thread, no clock of its
own, so that the same events give the same actions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from triptych.cluster.jobs import Failure, JobRecord, JobSpec, Kept, StageRecord, snapshot
from triptych.cluster.limits import Limits
from triptych.cluster.scheduling.actions import Action, CancelAt, Drop, GiveMap, Let, Persist
from triptych.cluster.scheduling.estimate import Estimate, forecast
from triptych.cluster.scheduling.live import Live, Member
from triptych.cluster.scheduling.setbacks import Setbacks
from triptych.errors import InvalidRequest, NoWorker, QueueFull
from triptych.messages import Checkpointed, Failed, Heartbeat, Hello, Loading, Ready, Stepped, TaskDone
from triptych.request import StageName

__all__ = ["Scheduler"]

FORECAST_SECONDS = 0.002
"""Times the number of jobs: how long a forecast holds."""
FEW_JOBS = 32
"""While there are no more than these, it is made anew for every job that comes."""
UNKNOWN_ROOM_SECONDS = 5.0
"""After which to try again at a full queue, while nothing was measured."""
MARKS = 1 << 20
"""How far the marks of two jobs are apart at least: more than the attempts that a job has."""


class Scheduler(Setbacks):
    """Jobs, workers and queues. Every method is an event (or a question); after it, `take` gives what is to be done,
    in order. `clock` and `wall` give seconds: one that only moves forward, and the epoch's."""

    def __init__(
        self, stages: Iterable[StageName], limits: Limits, clock: Callable[[], float], wall: Callable[[], float]
    ) -> None:
        super().__init__(stages, limits, clock, wall)
        self._map = b""
        self._mark = 0
        self._ticked = clock()
        self._forecast: dict[str, Estimate] = {}
        self._forecast_at = -math.inf

    def take(self) -> list[Action]:
        """What is to be done since it was last asked."""
        out = self._out[:]
        self._out.clear()
        return out

    # Jobs come and go.

    def admit(self, spec: JobSpec) -> JobRecord:
        """The record of a new job, not yet entered. Raises InvalidRequest, QueueFull or NoWorker."""
        if spec.id in self.jobs:
            raise InvalidRequest.of("id", spec.id, "an id that no other job has")
        if self._ledger.concerns(spec.id):  # its answers, and what it keeps, tell jobs apart by their ids alone
            raise QueueFull("a job of this id was just forgotten and is still being tidied up; try again shortly")
        if not spec.stages or any(part.stage not in self._queues for part in spec.stages):
            raise InvalidRequest.of("stages", [part.stage for part in spec.stages], self.stages)
        try:
            self._check_room(spec)
        except (QueueFull, NoWorker):
            self.counts.rejected += 1
            raise
        slots, now = len(spec.stages), self._wall()
        self._mark = max(self._mark + MARKS, int(now * 1000) * MARKS)  # later than any before a restart, too
        return JobRecord(
            spec=spec, submitted=now, attempts=[0] * slots, mark=self._mark, inputs=[None] * (slots + 1)
        )  # fmt: skip

    def enter(self, record: JobRecord) -> None:
        """An admitted job is in the store; it waits from now on."""
        self.counts.submitted += 1
        self._arrive(self._follow(record))
        self._assign()
        if len(self.jobs) <= FEW_JOBS:
            self._forecast_at = -math.inf

    def restore(self, records: Iterable[JobRecord], grace: float | None = None) -> None:
        """Jobs that a coordinator before us left unfinished. Those that may still be at work somewhere wait `grace`
        seconds (None: a lease) for their workers."""
        now = self._clock()
        self._grace = now + (self.limits.lease_seconds if grace is None else grace)
        for record in records:
            live = self._follow(record)
            live.told = (record.stage, 0)
            self._hold(live)
            for descriptor in live.held():
                self._ledger.expect(descriptor.owner)

    def cancel(self, job: str) -> bool:
        """Nobody wants it any more. False if it is unknown or has ended."""
        live = self.jobs.get(job)
        if live is None:
            return False
        self._end(live, "cancelled")
        self._assign()
        return True

    def give_up(self, reason: str) -> None:
        """Nobody is left to do the work, and nobody will come: every job fails."""
        for live in list(self.jobs.values()):
            self._fail(live, "no_worker", reason)

    # Workers come and go.

    def hello(self, hello: Hello) -> None:
        """A worker that may be let in."""
        former = self.fleet.predecessors(hello)
        self.fleet.add(hello, self._clock())  # first: what the same exchange keeps is not lost
        self._ledger.back(hello.owner)
        for member in former:
            same = member.hello.owner == hello.owner
            self._lose(member, "superseded", "another one has taken its place", suspects=not same)

    def loading(self, worker: str, message: Loading) -> None:
        """It loads or compiles, which may take long."""
        if member := self._heard(worker):
            member.loading, member.moved = True, member.seen

    def ready(self, worker: str, message: Ready) -> None:
        """It has loaded, or can take more or less than it said before."""
        member = self._heard(worker)
        if member is None:
            return
        if not member.ready:
            self._begun_anew(member)
        member.ready, member.loading = True, False
        member.capacity, member.credits, member.weights = message.capacity, message.credits, message.weights
        if message.kept:
            needed = self._ledger.needed().union(one.payload for live in self.jobs.values() for one in live.held())
            self._out.extend(Let(worker, payload) for payload in message.kept if payload not in needed)
        if message.preview and message.preview != self._map:
            self._map = message.preview
            self._out.extend(GiveMap(other.id, self._map) for other in self.fleet if self._wants_map(other))
        elif self._map and self._wants_map(member):
            self._out.append(GiveMap(member.id, self._map))
        self._assign()

    def _begun_anew(self, member: Member) -> None:
        """It has dropped what it was at before it said Hello, though it may have spoken of that since."""
        for live in list(member.running.values()):
            self._take_from(live)
            self._arrive(live)

    def heartbeat(self, worker: str, message: Heartbeat) -> None:
        """It lives."""
        if member := self._heard(worker):
            member.heartbeat = message
            if message.busy is not None or message.moving:
                member.moved = member.seen
            if reason := self.fleet.is_hung(member):
                self._lose(member, "hung", reason)
                self._assign()

    def proved(self, worker: str, healthy: bool, reason: str) -> None:
        """It has looked at itself after a failure."""
        member = self._heard(worker)
        if member is None or not member.proving:
            return
        member.proving = False
        if not healthy:
            self._lose(member, "unhealthy", reason or "it did not prove that it still works")
        self._assign()

    def drain(self, worker: str) -> bool:
        """It gets no more tasks. False if it is not in."""
        member = self.fleet.get(worker)
        if member is not None:
            member.draining = True
        return member is not None

    def goodbye(self, worker: str, reason: str) -> None:
        """It leaves of its own will."""
        if member := self.fleet.get(worker):
            self._lose(member, "left", reason or "it said goodbye", suspects=False)
            self._assign()

    def left(self, worker: str, reason: str) -> None:
        """Its process or its line has ended."""
        if member := self.fleet.get(worker):
            self._lose(member, "gone", reason)
            self._assign()

    # Work goes on.

    def stepped(self, worker: str, message: Stepped) -> bool:
        """A unit is done. True if that is news to whoever watches the job."""
        live = self._current(worker, message)
        if live is None or live.worker is None:
            return False
        seconds = max(message.seconds - live.unit_end, 0.0)
        live.unit_end = message.seconds
        live.worker.loading = False
        live.unit_seconds, live.unit = seconds, (message.step, message.steps)
        self.fleet.measure(live.worker, message.stage, seconds, live.record.spec)
        share = live.worker.share(self._clock())
        self.fleet.pace(live.worker, message.stage, share - live.unit_share, live.record.spec)
        live.unit_share = share
        self.tallies[message.stage].unit(seconds)
        if message.step < message.steps:
            self._foretell(live, live.worker)
        place = (live.record.stage, message.step)
        if place <= live.told:
            return False
        live.told = place
        return True

    def checkpointed(self, worker: str, message: Checkpointed) -> None:
        """A task can go on from there; the keeper fetches it unless it is still at the last one."""
        live = self._current(worker, message)
        absent = self._ledger.presence(message.descriptor) != "here"
        if live is None or absent or self._ledger.fetching(live.id, "checkpoint"):
            self._ledger.release(message.descriptor)
            return
        record = live.record
        self._ledger.fetch(
            live.id, "checkpoint", message.descriptor,
            stage=record.stage, attempt=message.attempt, step=message.step,
        )  # fmt: skip

    def done(self, worker: str, message: TaskDone) -> None:
        """A task has ended well: its job goes on to the next stage, and what nobody needs any more is let go."""
        live = self._current(worker, message)
        if live is None or live.worker is None:
            self._ledger.release(message.descriptor)
            return
        member, record, now = live.worker, live.record, self._clock()
        member.loading = False
        member.done += 1
        self.counts.resumes += message.resumed_at > 0
        rest = member.share(now) - live.unit_share
        self.tallies[message.stage].task(now - live.since, now, message.steps, rest)
        record.finished.append(_stage_record(live, message, now))
        self._take_from(live)
        live.avoid.clear()
        for count in (live.errors, live.damages, live.losses):
            del count[record.stage]
        record.alone, record.deaths_alone = False, 0
        self._pass_on(live, message.descriptor)
        self._arrive(live)
        self._assign()
        self._out.append(Persist(snapshot(record)))  # the next task goes first: a crash in between costs a retry

    def failed(self, worker: str, message: Failed) -> None:
        """A task has ended badly."""
        live = self._current(worker, message)
        if live is None or live.worker is None:
            return
        member = live.worker
        member.loading = False
        self._take_from(live)
        failure = Failure(
            stage=message.stage, worker=member.hello.name, code=message.code, message=message.message,
            field=message.field, original=message.original,
        )  # fmt: skip
        self._note(live, failure)
        if message.lost is not None:
            self._lost(live, message)
        else:
            self._erred(live, member, message.code)
        self._assign()

    def kept(self, job: str, what: str, number: int, outcome: Kept | Exception) -> None:
        """The keeper has a payload, or says why not."""
        pending = self._ledger.fetched(job, what, number)
        if pending is None:
            return
        live = self.jobs.get(job)
        if what == "result" and live is not None:
            self._kept_result(live, outcome)
        else:
            self._ledger.release(pending.descriptor)
            if what == "checkpoint" and isinstance(outcome, Kept):
                self._kept_checkpoint(job, live, pending, outcome)
            elif what == "result" and isinstance(outcome, Kept):
                self._out.append(Drop(job, what))
        self._assign()

    def gone(self, job: str, what: str, reason: str) -> None:
        """The keeper cannot give what a task needs; the task was not sent."""
        live = self.jobs.get(job)
        if live is None or live.worker is None:
            return
        if what == "checkpoint":
            live.record.checkpoint, live.record.checkpoint_step = None, 0
            return
        name = live.worker.hello.name
        self._take_from(live)
        self._fail(live, "payload_lost", f"the request's pictures cannot be had: {reason}", name)
        self._assign()

    def tick(self) -> None:
        """Time has passed: ends what is overdue."""
        now = self._clock()
        if now - self._ticked > self.limits.lease_seconds / 2:
            self.fleet.forgive(now)
        self._ticked = now
        for live in list(self.jobs.values()):
            if now >= live.deadline:
                self._fail(live, "deadline", f"not done within {live.record.spec.deadline:g} s of its submission")
            elif now >= live.expires:
                self._fail(live, "time_limit", f"not done {self.limits.time_limit_seconds:g} s after it was begun")
        for member, kind, reason in self.fleet.overdue(now):
            self._lose(member, kind, reason)
        if now >= self._grace > -math.inf:
            self._grace = -math.inf
            self._ledger.stop_expecting()
            self._settle_held()
        self._assign()

    # Questions.

    def missing(self, *, ready: bool = False) -> tuple[StageName, ...]:
        """Stages that no worker has; with `ready`: that none has loaded."""
        return tuple(
            stage
            for stage in self.stages
            if not any(member.ready or not ready for member in self.fleet.with_stage(stage))
        )

    def position(self, job: str) -> int | None:
        """How many go before it where it waits; None if it does not wait."""
        live = self.jobs.get(job)
        if live is None or live.place != "queue" or live.stage is None:
            return None
        return self._queues[live.stage].position(live)

    def estimate(self, job: str) -> Estimate:
        """When a job that has not ended will start and end, as far as that can be told."""
        estimates, age = self._estimates()
        return estimates.get(job, Estimate()).later(age)

    def fetching(self) -> int:
        """Payloads that the keeper is fetching."""
        return len(self._ledger)

    def waiting(self, stage: StageName) -> int:
        """Jobs that wait for a stage."""
        return len(self._queues[stage])

    def running(self, stage: StageName) -> int:
        """Tasks of a stage that workers hold."""
        return self._running[stage]

    # What events have in common.

    def _heard(self, worker: str) -> Member | None:
        member = self.fleet.get(worker)
        if member is not None:
            member.seen = self._clock()
        return member

    def _current(self, worker: str, message: Stepped | Checkpointed | TaskDone | Failed) -> Live | None:
        """The job whose present task this speaks of; None when it comes too late. A task from before our restart is
        taken up where it is."""
        member = self._heard(worker)
        if member is None:
            return None
        member.moved = member.seen
        live = member.running.get(message.job)
        if live is None:
            live = self._adopt(member, message)
        if live is not None and live.record.attempts[live.record.stage] == message.attempt:
            return live if live.stage == message.stage else None
        return None

    def _adopt(self, member: Member, message: Stepped | Checkpointed | TaskDone | Failed) -> Live | None:
        live = self._held.get(message.job)
        if live is None or live.stage != message.stage or message.attempt < live.record.attempts[live.record.stage]:
            if isinstance(message, Stepped):
                self._out.append(CancelAt(member.id, message.job))
            return None
        del self._held[message.job]
        live.record.attempts[live.record.stage] = message.attempt
        self._begin(live)
        member.take(live, message.stage, member.seen)
        self._running[message.stage] += 1
        return live

    def _check_room(self, spec: JobSpec) -> None:
        waiting, limits = self._not_begun.total(), self.limits
        if waiting >= limits.max_queue:
            raise QueueFull(f"{waiting} jobs wait; allowed: {limits.max_queue}", retry_after=self._room_in(None))
        own, allowed = self._not_begun[spec.client], limits.max_queue_per_client
        if allowed is not None and own >= allowed:
            raise QueueFull(
                f"{own} jobs of this client wait; allowed: {allowed}", retry_after=self._room_in(spec.client)
            )
        if limits.missing_worker == "fail" and (missing := self.missing()):
            wanted = [part.stage for part in spec.stages if part.stage in missing]
            if wanted:
                raise NoWorker(f"no worker has the stage {', '.join(wanted)}")

    def _room_in(self, client: str | None) -> float:
        """Seconds until a job (of that client) that waits will have begun."""
        estimates, age = self._estimates()
        starts = [
            found.starts_in - age
            for job, found in estimates.items()
            if found.starts_in is not None
            and (live := self.jobs.get(job))
            and live.record.started is None
            and client in (None, live.client)
        ]
        return min(max(min(starts), 1.0), 600.0) if starts else UNKNOWN_ROOM_SECONDS

    def _estimates(self) -> tuple[dict[str, Estimate], float]:
        """Those of every job, and how many seconds ago they were made: with many jobs less often, so that what they
        cost stays a small part of the time."""
        now = self._clock()
        if now - self._forecast_at > FORECAST_SECONDS * len(self.jobs):
            queues: dict[StageName, list[Live]] = {}
            for stage in self.stages:
                queues[stage] = list(self._queues[stage].ordered())
            able = [member for member in self.fleet if member.ready]
            self._forecast = forecast(self.stages, able, queues, self._seconds, self.limits.ahead)
            self._forecast_at = now
        return self._forecast, now - self._forecast_at

    def _seconds(self, member: Member, live: Live, index: int) -> float:
        """What a stage of a job still takes of that worker."""
        part, tally = live.stages[index], self.tallies[live.stages[index].stage]
        unit = self.fleet.unit_share(member, part.stage, live.record.spec)
        if unit is None:
            return math.inf
        units = float(part.fields.get("num_inference_steps") or 1) if part.stage == "denoise" else tally.units
        if live.worker is None or index > live.record.stage:
            return units * unit + tally.rest
        done, total = live.unit
        begun = member.share(self._clock()) - live.unit_share
        return max(((total or units) - done) * unit + tally.rest - begun, 0.0)

    @staticmethod
    def _wants_map(member: Member) -> bool:
        """Whether it makes previews but cannot fit the map for them."""
        stages = member.hello.stages
        return member.ready and "denoise" in stages and "decode" not in stages


def _stage_record(live: Live, message: TaskDone, now: float) -> StageRecord:
    assert live.worker is not None, f"job {live.id} is not at a worker"
    return StageRecord(
        stage=message.stage,
        worker=live.worker.hello.name,
        seconds=now - live.since,
        waited=live.waited,
        fetched=message.fetched_seconds,
        steps=message.steps,
        peak_bytes=message.peak_bytes,
        resumed_at=message.resumed_at,
        ran=message.seconds,
    )

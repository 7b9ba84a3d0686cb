"""The coordinator: the scheduler behind a lock, with a store, a keeper and lines to workers to carry out what it
decides. It moves descriptors, never tensors."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Condition, RLock

import msgspec

from triptych.cluster.delivery import Delivery, Watcher
from triptych.cluster.effects import Effects, outcome_of
from triptych.cluster.flushing import Flushing, FlushReport
from triptych.cluster.jobs import (
    Failure,
    JobRecord,
    JobSpec,
    JobState,
    JobStore,
    Keeper,
    Kept,
    Link,
    Outcome,
    snapshot,
)
from triptych.cluster.limits import Limits
from triptych.cluster.measures import Counters
from triptych.cluster.observers import Observer, Observers
from triptych.cluster.scheduling.estimate import Estimate
from triptych.cluster.scheduling.live import Live
from triptych.cluster.scheduling.scheduler import Scheduler
from triptych.cluster.status import Status, take_status
from triptych.errors import InvalidRequest, NoWorker, QueueFull
from triptych.messages import (
    PROTOCOL,
    Checkpointed,
    Drain,
    Draining,
    Failed,
    Flush,
    Flushed,
    FromWorker,
    Goodbye,
    Heartbeat,
    Hello,
    Loading,
    Proved,
    Ready,
    Refused,
    Stepped,
    Stop,
    Task,
    TaskDone,
    Welcome,
)
from triptych.request import StageName

__all__ = ["Coordinator"]

logger = logging.getLogger(__name__)

OfTask = Stepped | Checkpointed | TaskDone | Failed
EXPIRE_EVERY = 10.0
"""Seconds between two looks for jobs that may be forgotten."""


class Coordinator:
    """Knows jobs, workers and queues; every method may be called from any thread. Whoever drives it calls `tick` at
    least every 0.25 s. Store and keeper are the caller's, who closes them after the coordinator.

    `model_digest`: what a worker's must be (None: any). `dismissed(hello, kind, reason)` is called, with no lock held,
    for every worker that is out; kinds: silent, hung, unhealthy, gone, superseded, left. `failed(record, task)` is
    called when a job fails in a stage, with the lock held and before its input is let go: the task without tickets,
    whose input the keeper is then asked to keep as `input`. `observers` are told of everything and closed with it.
    `gone(owner)` is called like `dismissed`, as the workers are told, once a worker's exchange can write no more: when
    it left, its process ended, or was away for long. `clock` and `wall` give seconds, forward and since the epoch.
    """

    def __init__(
        self,
        stages: Iterable[StageName],
        *,
        store: JobStore,
        keeper: Keeper,
        model_digest: str | None = None,
        limits: Limits | None = None,
        observers: Iterable[Observer] = (),
        dismissed: Callable[[Hello, str, str], None] | None = None,
        failed: Callable[[JobRecord, Task], None] | None = None,
        gone: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.name = secrets.token_hex(8)
        self.limits = limits or Limits()
        self.topology = b""
        """the model's, as the first worker to be ready gave it"""
        self._scheduler = Scheduler(stages, self.limits, clock, wall)
        self._store, self._keeper = store, keeper
        self._counters = Counters(self._scheduler.stages)
        self._observers = Observers((self._counters, *observers))
        self._digest = model_digest
        self._clock, self._wall = clock, wall
        self._lock = RLock()
        self._changed = Condition(self._lock)
        self._depth = 0
        self._delivery = Delivery()
        self._effects = Effects(
            self._scheduler, store, keeper, self._delivery, answer=self._kept, changed=self._changed.notify_all,
            observers=self._observers, dismissed=dismissed, failed=failed, gone=gone, clock=clock,
        )  # fmt: skip
        self._started = self._expired = clock()
        self._draining = self._closed = False
        self._flushing: Flushing | None = None
        self._flushes = 0

    # For those who have something to be done.

    def submit(self, spec: JobSpec, watcher: Watcher | None = None) -> None:
        """Takes a job; when this returns it is in the store. `watcher` is told of it as by `watch`. Raises QueueFull,
        NoWorker (a stage has none, or the coordinator takes no more), InvalidRequest, or what the store raises."""
        with self._turn():
            if self._draining or self._closed:
                raise NoWorker("it is shutting down and takes no more jobs")
            if self._store.get(spec.id) is not None:
                raise InvalidRequest.of("id", spec.id, "an id that no other job has")
            record = self._scheduler.admit(spec)
            self._store.put(record)
            self._scheduler.enter(record)
            if watcher is not None:
                self._delivery.add(spec.id, watcher)

    def cancel(self, job: str) -> bool:
        """Ends a job before its next step. False if it is unknown or has ended."""
        with self._turn():
            return self._scheduler.cancel(job)

    def give_up(self, reason: str, *, keep: bool) -> None:
        """Nobody is left to do the work, and nobody will come: whoever watches a job hears that it failed with code
        no_worker. With `keep` the jobs themselves stay as they are, to go on after a restart."""
        with self._turn():
            if not keep:
                self._scheduler.give_up(reason)
                return
            told = Outcome(state="failed", failures=(Failure(stage=None, worker="", code="no_worker", message=reason),))
            for job in self._scheduler.jobs:
                self._delivery.put(job, told)

    def job(self, job: str) -> JobRecord | None:
        """A job as it is now, or None if it is unknown or has expired."""
        with self._lock:
            return self._newer(job) or self._store.get(job)

    def jobs(
        self, *, client: str | None = None, states: Iterable[JobState] | None = None, before: str | None = None,
        limit: int = 50,
    ) -> list[JobRecord]:  # fmt: skip
        """At most `limit` jobs, newest first; `before`: older than that job."""
        wanted: set[JobState] | None = None if states is None else set(states)
        under_way: set[JobState] = {"queued", "running"}
        asked = wanted | under_way if wanted and wanted & under_way else wanted
        found: list[JobRecord] = []
        with self._lock:
            while True:  # what the store has may be an older state
                records = self._store.list(client=client, states=asked, before=before, limit=limit)
                present = (self._newer(record.spec.id) or record for record in records)
                found += [record for record in present if wanted is None or record.state in wanted]
                if len(records) < limit or len(found) >= limit:
                    return found[: max(0, limit)]
                before = records[-1].spec.id

    def under_way(self, client: str) -> int:
        """How many of a client's jobs have not ended."""
        with self._lock:
            return sum(live.client == client for live in self._scheduler.jobs.values())

    def forget(self, job: str) -> bool:
        """Forgets a job and what is kept for it, cancelling it first if it has not ended. False if it is unknown."""
        self.cancel(job)
        with self._turn():
            removed = self._store.remove(job)  # first: it may raise
            if self._effects.unsaved.pop(job, None) is not None or removed:
                self._keeper.drop(job)
                return True
            return False

    def position(self, job: str) -> int | None:
        """How many jobs go before it in the queue where it waits; None if it does not wait."""
        with self._lock:
            return self._scheduler.position(job)

    def estimate(self, job: str) -> Estimate:
        """When a job will start and end, as far as that can be told."""
        with self._lock:
            return self._scheduler.estimate(job)

    def watch(self, job: str, watcher: Watcher) -> Callable[[], None]:
        """Calls `watcher` with every unit that is done and finally with the Outcome: in order, with no lock held, on
        the thread that brought the event (or one that is at it already). Returns what ends that. Raises
        InvalidRequest for an unknown job."""
        with self._turn():
            if job in self._scheduler.jobs:
                return self._delivery.add(job, watcher)
            record = self.job(job)
            if record is None:
                raise InvalidRequest.of("job", job, "a job that was submitted and has not expired")
            self._delivery.tell(watcher, outcome_of(record))
        return lambda: None

    # For workers.

    def hello(self, hello: Hello, link: Link) -> None:
        """A worker offers itself; the answer goes over its link."""
        with self._turn():
            if reason := self._objection(hello):
                level = logging.INFO if self._closed else logging.WARNING
                logger.log(level, "refused worker %s on %s: %s", hello.name, hello.host, reason)
                link.send(Refused(reason=reason))
                link.close()
                return
            known = self._scheduler.fleet.get(hello.incarnation)
            if known is not None and known.ready:  # what was under way between us may be lost
                self._scheduler.left(hello.incarnation, "it said hello once more")
                self._effects.perform()
                link.send(Refused(reason="its former connection was taken for lost", again=True))
                link.close()
                return
            self._effects.links[hello.incarnation] = link
            limits = self.limits
            link.send(
                Welcome(
                    coordinator=self.name,
                    heartbeat_seconds=limits.heartbeat_seconds,
                    lease_seconds=limits.lease_seconds,
                )
            )
            if known is None:
                self._scheduler.hello(hello)
                self._effects.back(hello.owner)
                self._observers.came(hello, self._clock())

    def hear(self, incarnation: str, message: FromWorker) -> None:
        """A worker says something; one that is not in is not listened to."""
        with self._turn():
            if self._closed or incarnation not in self._effects.links:
                return
            if isinstance(message, OfTask) and (live := self._scheduler.jobs.get(message.job)):
                # What speaks of a former job of this id gives no attempt that there is.
                message = msgspec.structs.replace(message, attempt=message.attempt - live.record.mark)
            match message:
                case Stepped():
                    self._stepped(incarnation, message)
                case Heartbeat():
                    self._scheduler.heartbeat(incarnation, message)
                case TaskDone():
                    self._done(incarnation, message)
                case Checkpointed():
                    self._scheduler.checkpointed(incarnation, message)
                case Failed():
                    self._failed(incarnation, message)
                case Loading():
                    self._scheduler.loading(incarnation, message)
                case Ready():
                    self._ready(incarnation, message)
                case Proved():
                    self._scheduler.proved(incarnation, message.healthy, message.reason)
                case Flushed():
                    self._flushed(incarnation, message)
                case Draining():
                    self._scheduler.drain(incarnation)
                case Goodbye():
                    self._goodbye(incarnation, message)
                case Hello():
                    raise AssertionError("a Hello comes with its link")

    def left(self, incarnation: str, reason: str) -> None:
        """A worker's process or line has ended; unknown ones are left alone."""
        with self._turn():
            self._scheduler.left(incarnation, reason)

    def left_slot(self, slot: str, reason: str, pid: int | None = None) -> None:
        """The same for whoever is in a launcher's slot (with that process id, if one is given)."""
        with self._turn():
            for member in list(self._scheduler.fleet):
                if member.hello.slot == slot and pid in (None, member.hello.pid):
                    self._scheduler.left(member.id, reason)
            self._effects.perform()
            self._effects.ended(slot, pid)

    def retire(self, incarnation: str) -> bool:
        """Lets a worker finish what it holds and leave. False if it is not in."""
        with self._turn():
            found = self._scheduler.drain(incarnation)
            if found:
                self._effects.send(incarnation, Drain())
            return found

    def flush(self, timeout: float) -> FlushReport:
        """Has every worker that has loaded let go of what it keeps only to be faster, between two units, and waits at
        most `timeout` seconds for their answers. Raises QueueFull while another flush is under way."""
        with self._changed:
            if self._flushing is not None:
                raise QueueFull("a flush is under way; try again when it has ended")
            self._flushes += 1
            ready = {member.id: member.hello.name for member in self._scheduler.fleet if member.ready}
            flushing = self._flushing = Flushing(self._flushes, ready)
            try:
                for worker in ready:
                    self._effects.send(worker, Flush(number=flushing.number))
                self._changed.wait_for(lambda: self._closed or flushing.is_done(self._effects.links), timeout)
            finally:
                self._flushing = None
            return flushing.report()

    # For whoever drives it.

    def tick(self) -> None:
        """Time has passed: ends what is overdue, forgets what is old."""
        with self._turn():
            if self._closed:
                return
            self._scheduler.tick()
            self._effects.look()
            now = self._clock()
            if now - self._expired >= EXPIRE_EVERY:
                self._expired = now
                self._expire()
        self._observers.flush()

    def restore(self, grace: float | None = None) -> int:
        """Goes on with the jobs that the store holds unfinished, at the start; returns how many. Their workers may come
        back with what they hold for `grace` seconds (None: a lease)."""
        with self._turn():
            records = self._store.unfinished()
            self._scheduler.restore(records, grace)
            return len(records)

    def missing(self, *, ready: bool = True) -> tuple[StageName, ...]:
        """Stages that no worker has loaded; without `ready`: that no worker has at all. Takes no lock, so
        that whoever asks after our health waits for no disk."""
        return self._scheduler.missing(ready=ready)

    def require(self, stages: Iterable[StageName], timeout: float) -> tuple[StageName, ...]:
        """Waits at most `timeout` seconds until each of the stages has a worker that has loaded; returns those that
        have none."""
        wanted = tuple(stages)
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not set(wanted) & set(self.missing()), timeout)
            absent = self.missing()
            return tuple(stage for stage in wanted if stage in absent)

    def drain(self, timeout: float) -> bool:
        """Takes no more jobs and waits at most `timeout` seconds until all have ended; whether they have. The others
        stay in the store."""
        with self._changed:
            self._draining = True
            self._changed.wait_for(lambda: self._closed or not self._scheduler.jobs, timeout)
            return not self._scheduler.jobs

    def free_bytes(self) -> int | None:
        """What the workers say is free, where it is least; None while nobody knows."""
        with self._lock:
            beats = [member.heartbeat for member in self._scheduler.fleet]
        return min((beat.free_bytes for beat in beats if beat is not None and beat.free_bytes), default=None)

    def status(self) -> Status:
        """What the cluster looks like now."""
        with self._lock:
            measures = self._counters.measures()
            return take_status(self._scheduler, self.name, self._started, self._clock(), self._draining, measures)

    def close(self, *, stop_workers: bool = True) -> None:
        """Hears nobody any more; with `stop_workers`, they are told to end. Jobs that have not ended stay in the store
        as they are. Closing twice is fine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            self._effects.hang_up(Stop() if stop_workers else None)
            self._observers.tell()
        self._observers.close()

    # A turn: an event, what the scheduler makes of it, and what listeners are told.

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with self._lock:
            self._depth += 1
            try:
                yield
                self._effects.perform()
                if self._depth == 1:
                    self._observers.tell()
            finally:
                self._depth -= 1
                outermost = not self._depth
        if outermost:
            self._delivery.flush()

    def _kept(self, job: str, what: str, number: int, outcome: Kept | Exception) -> None:
        with self._turn():
            if not self._closed:
                if isinstance(outcome, Kept):
                    self._observers.kept(job, what, outcome, self._clock())
                self._scheduler.kept(job, what, number, outcome)
                if what == "input" and self.job(job) is None:  # forgotten meanwhile
                    self._keeper.drop(job, what)

    def _newer(self, job: str) -> JobRecord | None:
        """What is known of a job beyond what the store has of it."""
        live = self._scheduler.jobs.get(job)
        return snapshot(live.record) if live else self._effects.unsaved.get(job)

    # What else an event means here.

    def _stepped(self, worker: str, message: Stepped) -> None:
        if self._scheduler.stepped(worker, message):
            self._delivery.put(message.job, message)
        if live := self._at(worker, message.job):
            spec, name = live.record.spec, self._name(worker)
            self._observers.unit(spec, name, message, live.unit_seconds, self._clock())

    def _done(self, worker: str, message: TaskDone) -> None:
        if message.last is not None:
            self._stepped(worker, msgspec.structs.replace(message.last, attempt=message.attempt))
        if live := self._at(worker, message.job):
            self._observers.done(self._name(worker), message, live.since, self._clock())
        self._scheduler.done(worker, message)

    def _failed(self, worker: str, message: Failed) -> None:
        if self._at(worker, message.job):
            self._observers.failed(self._name(worker), message, self._clock())
        self._scheduler.failed(worker, message)

    def _at(self, worker: str, job: str) -> Live | None:
        """The job, if that worker has it now."""
        live = self._scheduler.jobs.get(job)
        return live if live is not None and live.worker is not None and live.worker.id == worker else None

    def _name(self, worker: str) -> str:
        member = self._scheduler.fleet.get(worker)
        return member.hello.name if member else worker

    def _flushed(self, worker: str, message: Flushed) -> None:
        if self._flushing is not None:
            self._flushing.answer(worker, message)
            self._changed.notify_all()

    def _goodbye(self, worker: str, message: Goodbye) -> None:
        if message.failed:
            self._scheduler.left(worker, message.reason)
        else:
            self._scheduler.goodbye(worker, message.reason)

    def _ready(self, worker: str, message: Ready) -> None:
        self.topology = self.topology or message.topology
        self._scheduler.ready(worker, message)
        self._changed.notify_all()

    def _objection(self, hello: Hello) -> str | None:
        """Why a worker may not come in."""
        known = self._scheduler.stages
        if self._closed:
            return "the coordinator is shutting down"
        if hello.protocol != PROTOCOL:
            return f"it speaks protocol {hello.protocol}; this coordinator speaks {PROTOCOL}"
        if not hello.stages or not set(hello.stages) <= set(known):
            return f"it has the stages {', '.join(hello.stages) or 'none'}; the model's are {', '.join(known)}"
        if self._digest is not None and hello.model_digest != self._digest:
            return (
                "it holds another model, or other files of it: its digest is "
                f"{hello.model_digest[:12]}, this coordinator's {self._digest[:12]}"
            )
        return None

    def _expire(self) -> None:
        self._effects.save_again()
        limits = self.limits
        try:
            removed = self._store.expire(self._wall() - limits.retention_seconds, limits.retention_bytes)
        except Exception as error:
            logger.error("old jobs could not be removed from the job store: %s", error)
            return
        for record in removed:
            self._keeper.drop(record.spec.id)

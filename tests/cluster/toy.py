"""A cluster without processes, sockets or time: workers that do what a test says, a keeper, and a clock."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from triptych.cluster import Coordinator, JobSpec, JobStore, Kept, Limits, MemoryStore, Outcome, StageSpec
from triptych.cluster.scheduling.scheduler import MARKS
from triptych.errors import Damaged, PayloadLost
from triptych.messages import (
    PROTOCOL,
    Busy,
    CacheUse,
    Cancel,
    Checkpointed,
    Descriptor,
    Expect,
    Failed,
    FromWorker,
    Goodbye,
    Heartbeat,
    Hello,
    Prove,
    Proved,
    Ready,
    Refused,
    Release,
    Run,
    Stepped,
    Task,
    TaskDone,
    ToWorker,
    Welcome,
    ticket_is_good,
)
from triptych.request import StageName

STAGES: tuple[StageName, ...] = ("encode", "denoise", "decode")


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass(eq=False)
class ToyLink:
    """Delivers to a worker at once, unless its line is cut."""

    worker: ToyWorker
    incarnation: str
    closed: bool = False

    def send(self, message: ToWorker) -> None:
        try:
            assert not self.closed, "a closed link was used"
            self.worker.told(self.incarnation, message)
        except AssertionError as error:  # a coordinator survives its links' failures; the test must not
            self.worker.cluster.wrongs.append(str(error))

    def close(self) -> None:
        self.closed = True


@dataclass(eq=False)
class ToyWorker:
    """A worker whose tasks end when the test says so."""

    cluster: ToyCluster
    name: str
    stages: tuple[StageName, ...]
    credits: int
    slot: str | None = None
    size: int = 1 << 20
    """bytes of what it publishes; the release of less is told with the next task or tick"""
    alive: bool = True
    cut: bool = False
    """nothing it says is heard, and it hears nothing"""
    incarnation: str = ""
    held: dict[str, Task] = field(default_factory=dict)
    expected: dict[str, Task] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    released: set[str] = field(default_factory=set)
    unheard: list[FromWorker] = field(default_factory=list)
    told_of: list[ToWorker] = field(default_factory=list)
    to_prove: int = 0
    refused: Refused | None = None
    moving: bool = False
    """its heartbeats say so"""

    @property
    def owner(self) -> str:
        return f"exchange-{self.name}"

    @property
    def secret(self) -> bytes:
        return self.owner.encode().ljust(16, b".")

    def join(self, *, ready: bool = True, **changes: Any) -> ToyWorker:
        """Says hello as a new incarnation, says what was not heard, and is ready."""
        self.incarnation = f"{self.name}/{next(self.cluster.numbers)}"
        self.refused = None
        hello = Hello(
            **{
                "protocol": PROTOCOL, "name": self.name, "incarnation": self.incarnation, "stages": self.stages,
                "model_digest": "digest", "versions": {}, "device": "cpu", "pid": hash(self.name) % 30000, "host": "h",
                "slot": self.slot, "owner": self.owner, "secret": self.secret, **changes,
            }
        )  # fmt: skip
        self.cluster.coordinator.hello(hello, ToyLink(self, self.incarnation))
        if ready and self.refused is None:
            unheard, self.unheard = self.unheard, []
            for message in unheard:
                self.say(message)
            self.ready()
        return self

    def ready(self, preview: bytes = b"") -> None:
        each, kept = dict.fromkeys(self.stages, self.credits), tuple(sorted(self.kept))
        self.say(Ready(topology=b"topology", capacity=each, credits=each, weights={}, preview=preview, kept=kept))

    def told(self, incarnation: str, message: ToWorker) -> None:
        if self.cut or not self.alive or incarnation != self.incarnation:
            return
        self.told_of.append(message)
        match message:
            case Run(task=task, released=released):
                self._let_go(released)
                self.cluster.check_task(self, task)
                assert task.job not in self.held, f"{task.job} given twice"
                self.held[task.job] = task
                self.expected.pop(task.job, None)
            case Expect(task=task):
                assert task.stage in self.stages and not self.held, f"{task.job} foretold to {self.name}"
                assert task.job not in self.expected, f"{task.job} foretold twice"
                self.expected[task.job] = task
            case Cancel(job=job):
                self.held.pop(job, None)
                self.expected.pop(job, None)
            case Release(payloads=payloads):
                self._let_go(payloads)
            case Prove():
                self.to_prove += 1
            case Refused():
                self.refused = message
                self.held.clear()
                self.expected.clear()
            case Welcome():
                self.expected.clear()
            case _:
                pass

    def say(self, message: FromWorker) -> None:
        """Says something, or means to while the line is cut."""
        if self.cut:
            self.unheard.append(message)
        elif self.alive:
            self.cluster.coordinator.hear(self.incarnation, message)

    def _let_go(self, payloads: Iterable[str]) -> None:
        self.kept.difference_update(payloads)
        self.released.update(payloads)

    def publish(self) -> Descriptor:
        payload = f"{self.owner}-{next(self.cluster.numbers)}"
        self.kept.add(payload)
        return Descriptor(payload=payload, generation=1, head=10, body=self.size, owner=self.owner, addresses=())

    def done(self, job: str, **more: Any) -> None:
        task = self.held.pop(job)
        resumed = task.checkpoint is not None
        self.say(
            TaskDone(
                job=job, stage=task.stage, attempt=task.attempt, descriptor=self.publish(), seconds=1.0,
                peak_bytes=1, **{"steps": 1, "resumed_at": 1 if resumed else 0, **more},
            )
        )  # fmt: skip

    def step(self, job: str, step: int = 1, seconds: float = 0.1, steps: int = 4) -> None:
        task = self.held[job]
        self.say(Stepped(job=job, stage=task.stage, attempt=task.attempt, step=step, steps=steps, seconds=seconds))

    def checkpoint(self, job: str, step: int) -> None:
        task, descriptor = self.held[job], self.publish()
        self.say(Checkpointed(job=job, stage=task.stage, attempt=task.attempt, step=step, descriptor=descriptor))

    def fail(self, job: str, code: str = "error", **more: Any) -> None:
        task = self.held.pop(job)
        self.say(Failed(job=job, stage=task.stage, attempt=task.attempt, code=code, message=f"{code} here", **more))

    def beat(self, job: str | None = None, seconds: float = 0.0, caches: tuple[CacheUse, ...] = ()) -> None:
        busy = Busy(job=job, stage=self.held[job].stage, seconds=seconds) if job else None
        self.say(Heartbeat(busy=busy, moving=self.moving, kept=len(self.kept), caches=caches))

    def prove(self, healthy: bool = True) -> None:
        self.to_prove -= 1
        self.say(Proved(healthy=healthy))

    def leave(self) -> None:
        self.say(Goodbye(reason="enough"))
        self.die(notice=False)

    def die(self, notice: bool = True) -> None:
        """Its process ends, and somebody may notice."""
        self.alive = False
        self.held.clear()
        self.expected.clear()
        self.kept.clear()
        if notice:
            self.cluster.coordinator.left(self.incarnation, "killed")

    def attempt(self, job: str) -> int:
        """Which time its stage of that job was handed out."""
        return self.held[job].attempt % MARKS

    def next(self) -> str:
        """The job that it was given first."""
        return next(iter(self.held))


@dataclass(eq=False)
class ToyKeeper:
    """Keeps names. Answers at once, or when told to."""

    cluster: ToyCluster
    at_once: bool = True
    kept: dict[str, set[str]] = field(default_factory=dict)
    waiting: list[tuple[str, str, Descriptor, Callable[[Kept | Exception], None]]] = field(default_factory=list)
    damage: int = 0
    """fetches to come that are damaged"""
    refuse: Exception | None = None

    def keep(
        self, job: str, what: str, descriptor: Descriptor, secret: bytes, done: Callable[[Kept | Exception], None]
    ) -> None:
        self.waiting.append((job, what, descriptor, done))
        if self.at_once:
            self.settle()

    def settle(self) -> None:
        """Answers all that it was asked."""
        while self.waiting:
            job, what, descriptor, done = self.waiting.pop(0)
            owner = self.cluster.owner_of(descriptor)
            if self.damage:
                self.damage -= 1
                done(Damaged("the digest does not match"))
            elif self.refuse:
                done(self.refuse)
            elif owner is None or owner.cut or descriptor.payload not in owner.kept:
                done(PayloadLost("it is not there"))
            else:
                self.kept.setdefault(job, set()).add(what)
                done(Kept(name=f"{job}/{what}", bytes=100))

    def offer(self, kept: str) -> tuple[Descriptor, bytes]:
        job, _, what = kept.partition("/")
        if what not in self.kept.get(job, ()):
            raise KeyError(kept)
        return Descriptor(payload=kept, generation=1, head=1, body=1, owner="keeper", addresses=()), b"k" * 16

    def drop(self, job: str, what: str | None = None) -> None:
        if what is None:
            self.kept.pop(job, None)
        else:
            self.kept.get(job, set()).discard(what)


class ToyCluster:
    """A coordinator under a test's clock."""

    def __init__(self, limits: Limits | None = None, store: JobStore | None = None, **more: Any) -> None:
        self.clock = Clock()
        self.numbers = itertools.count(1)
        self.keeper = ToyKeeper(self)
        self.store = store or MemoryStore()
        self.limits = limits or Limits()
        self.more = more
        self.workers: list[ToyWorker] = []
        self.outcomes: dict[str, list[Outcome]] = {}
        self.progress: dict[str, list[Stepped]] = {}
        self.dismissed: list[tuple[str, str]] = []
        self.submitted: list[str] = []
        self.wrongs: list[str] = []
        """what a worker was told and should not have been"""
        self.coordinator = self.build()

    def build(self) -> Coordinator:
        return Coordinator(
            STAGES, model_digest="digest", store=self.store, keeper=self.keeper, limits=self.limits, clock=self.clock,
            wall=self.clock, dismissed=lambda hello, kind, reason: self.dismissed.append((hello.name, kind)),
            **self.more,
        )  # fmt: skip

    def restart(self) -> None:
        """The coordinator is killed, and another goes on with its store. Workers find out and come anew."""
        self.keeper.waiting.clear()
        self.coordinator = self.build()
        self.coordinator.restore()
        for job in self.submitted:
            if not self.outcomes[job]:
                self.watch(job)
        for worker in self.workers:
            if worker.alive:
                worker.cut = False
                worker.join()

    def worker(self, *stages: StageName, credits: int = 2, join: bool = True, slot: str | None = None) -> ToyWorker:
        """A worker that has joined; of all stages unless told."""
        name = f"w{len(self.workers)}"
        worker = ToyWorker(self, name, stages or STAGES, credits, slot)
        self.workers.append(worker)
        return worker.join() if join else worker

    def submit(self, job: str, **more: Any) -> str:
        """A job of three stages."""
        stages = tuple(StageSpec(stage=stage, fields={}, pictures=stage == "encode") for stage in STAGES)
        self.coordinator.submit(JobSpec(**{"id": job, "stages": stages, "seed": 1, **more}))
        self.submitted.append(job)
        self.outcomes[job], self.progress[job] = [], []
        self.watch(job)
        return job

    def watch(self, job: str) -> None:
        def hear(event: Stepped | Outcome) -> None:
            if isinstance(event, Outcome):
                self.outcomes[job].append(event)
            else:
                self.progress[job].append(event)

        self.coordinator.watch(job, hear)

    def outcome(self, job: str) -> Outcome:
        (only,) = self.outcomes[job]
        return only

    def pass_time(self, seconds: float, beating: Iterable[ToyWorker] | None = None) -> None:
        """Time passes in small ticks while these workers (None: all) give signs of life."""
        for _ in range(max(round(seconds / 0.5), 1)):
            self.clock.now += min(seconds, 0.5)
            for worker in self.workers if beating is None else beating:
                if worker.alive and not worker.cut:
                    worker.beat()
            self.coordinator.tick()

    def finish(self) -> None:
        """Everybody does what they hold until nothing is left to do."""
        for _ in range(10_000):
            busy = [worker for worker in self.workers if worker.alive and not worker.cut and worker.held]
            for worker in busy:
                worker.done(worker.next())
            self.keeper.settle()
            if not busy:
                return
        raise AssertionError("it does not come to an end")

    def owner_of(self, descriptor: Descriptor) -> ToyWorker | None:
        owners = (worker for worker in self.workers if worker.alive and worker.owner == descriptor.owner)
        return next(owners, None)

    def check_task(self, worker: ToyWorker, task: Task) -> None:
        """A task can be done: its input is still kept, its ticket good, and nobody else has it."""
        assert task.stage in worker.stages, f"{worker.name} was given {task.stage}"
        if task.payload is not None:
            descriptor = task.payload.descriptor
            owner = self.owner_of(descriptor)
            assert owner is None or descriptor.payload not in owner.released, f"{descriptor.payload} was let go"
            good = owner is None or ticket_is_good(descriptor.payload, 1, task.payload.token, owner.secret)
            assert good, f"a wrong ticket for {descriptor.payload}"
        first = task.stage == STAGES[0] or task.bare is not None
        assert (task.payload is None) == first, f"{task.stage} of {task.job} has a wrong input"

    def leaks(self) -> list[str]:
        """Payloads that living workers keep, and tasks that the coordinator believes somewhere."""
        status = self.coordinator.status()
        payloads = [payload for worker in self.workers if worker.alive for payload in worker.kept]
        tasks = [f"{worker.name} holds {worker.tasks}" for worker in status.workers if worker.tasks]
        tasks += [f"{worker.name} expects {list(worker.expected)}" for worker in self.workers if worker.expected]
        stages = [
            f"{part.stage}: {part.running}/{part.waiting}" for part in status.stages if part.running + part.waiting
        ]
        return self.wrongs + payloads + tasks + stages + (["the keeper is asked"] if status.fetching else [])

    def states(self) -> Counter[str]:
        return Counter(outcomes[0].state if outcomes else "live" for outcomes in self.outcomes.values())

"""A coordinator that does nothing by itself, stages small enough to know, and workers on threads of the test's."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch

from tests.stage.toy import SOURCE, Network, ToyProgram
from triptych.cluster import Link
from triptych.messages import (
    FromWorker,
    Heartbeat,
    Hello,
    Ready,
    Run,
    Task,
    TaskDone,
    Ticket,
    ToWorker,
    Welcome,
    ticket_for,
)
from triptych.model import Components, Placement
from triptych.stage import GatherStage, Stage
from triptych.transfer import Exchange, Payload, TransferSettings
from triptych.worker import InProcessUplink, Opened, Worker, WorkerSettings

PATIENCE = 120.0
"""Seconds after which something that should happen has not."""
M = TypeVar("M")

TRANSFER = TransferSettings(pool_bytes=1 << 20, budget_bytes=1 << 26)
REFERENCES = TransferSettings(pool_bytes=1 << 20, budget_bytes=1 << 26, routes=("reference",))


class FakeCoordinator:
    """Welcomes whoever comes (unless told otherwise) and remembers what it hears, in order."""

    def __init__(self, answer: Callable[[Hello], ToWorker] | None = None) -> None:
        self.name = "first"
        self.heard: list[FromWorker] = []
        self.hellos: list[Hello] = []
        self.gone: list[str] = []
        self._answer = answer or (lambda _: Welcome(coordinator=self.name, heartbeat_seconds=0.05, lease_seconds=5.0))
        self._changed = threading.Condition()
        self.link: Link | None = None

    def hello(self, hello: Hello, link: Link) -> None:
        with self._changed:
            self.hellos.append(hello)
            self.link = link
            self._changed.notify_all()
        link.send(self._answer(hello))

    def hear(self, incarnation: str, message: FromWorker) -> None:
        assert incarnation == self.hellos[-1].incarnation
        with self._changed:
            if isinstance(message, TaskDone) and message.last is not None:
                self.heard.append(message.last)
            self.heard.append(message)
            self._changed.notify_all()

    def left(self, incarnation: str, reason: str) -> None:
        self.gone.append(reason)

    def tick(self) -> None:
        pass

    def send(self, message: ToWorker) -> None:
        assert self.link is not None
        self.link.send(message)

    def run(self, task: Task, *released: str) -> None:
        self.send(Run(task=task, released=released))

    def all(self, kind: type[M], job: str | None = None) -> list[M]:
        """The messages of a kind so far, of one job."""
        found = [message for message in list(self.heard) if isinstance(message, kind)]
        return [message for message in found if job is None or cast(Any, message).job == job]

    def wait(self, kind: type[M], job: str | None = None, count: int = 1) -> M:
        """The `count`-th message of a kind, once it has come."""
        self.until(lambda: len(self.all(kind, job)) >= count, f"{kind.__name__} {count} of {job}")
        return self.all(kind, job)[count - 1]

    def until(self, true: Callable[[], bool], what: str) -> None:
        """Waits until something is so."""
        end = time.monotonic() + PATIENCE
        with self._changed:
            while not true():
                left = end - time.monotonic()
                others = [message for message in self.heard if not isinstance(message, Heartbeat)]
                assert left > 0, f"{what} never came; heard {others}"
                self._changed.wait(min(left, 0.05))


class ToyStage(GatherStage):
    """A stage over a ToyProgram; `gates` by job hold up its steps, `raises` by job end them."""

    def __init__(self, capacity: int = 4, network: Network | None = None) -> None:
        program = GatedProgram(network or Network())
        super().__init__(program, Components(SOURCE), Placement(torch.device("cpu")), capacity)
        self.toy = program


class GatedProgram(ToyProgram):
    """Its tasks say that they began, wait where they are told to, and raise what they are told to, at each step."""

    def __init__(self, network: Network) -> None:
        super().__init__(network)
        self.gates: dict[str, threading.Event] = {}
        self.began: dict[str, threading.Event] = {}
        self.raises: dict[str, BaseException] = {}

    def hold(self, name: str) -> tuple[threading.Event, threading.Event]:
        """Tasks with the field `name` of this value set the first event when a step begins, and wait for the second."""
        self.began[name], self.gates[name] = threading.Event(), threading.Event()
        return self.began[name], self.gates[name]

    def run(self, task: Any, stand_ins: Any, on_step: Any = None) -> Any:
        name = task.fields.get("name", "")

        def step(done: Any) -> None:
            on_step(done)
            if name in self.gates:
                self.began[name].set()
                assert self.gates[name].wait(PATIENCE)
            if name in self.raises:
                raise self.raises[name]

        return super().run(task, stand_ins, step)


def toy_opened(stage: Stage | None = None) -> Opened:
    """An opened model of one toy stage."""
    stage = stage or ToyStage()
    topology = cast(GatherStage, stage).program.topology
    return Opened(topology, "toy", {"denoise": stage}, Placement(torch.device("cpu")))


def toy_task(job: str, steps: int = 3, *, attempt: int = 1, seed: int = 0, **more: Any) -> Task:
    fields = {"num_inference_steps": steps, "name": job, **more.pop("fields", {})}
    return Task(job=job, stage="denoise", attempt=attempt, fields=fields, seed=seed, **more)


def toy_result(stage: ToyStage, steps: int, seed: int) -> torch.Tensor:
    """What a toy task gives when it runs by itself."""
    from triptych.model import TaskInputs

    task = TaskInputs({"num_inference_steps": steps}, None, torch.Generator().manual_seed(seed))
    return ToyProgram(stage.toy.network).run(task, {}).values["latents"]


class Running:
    """A worker on a thread, its coordinator, and an exchange beside it to read and give payloads with."""

    def __init__(self, coordinator: FakeCoordinator, worker: Worker, exchange: Exchange, other: Exchange) -> None:
        self.coordinator = coordinator
        self.worker = worker
        self.exchange = exchange
        self.other = other
        self.stage: Any = None
        """the toy, if it is one"""
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="worker")
        self.thread.start()

    def _run(self) -> None:
        try:
            self.worker.run()
        except BaseException as error:
            self.error = error

    def read(self, done: TaskDone) -> dict[str, Any]:
        """The values of what a task made."""
        fetched = self.other.fetch(ticket_for(done.descriptor, self.exchange.secret))
        values = {name: _own(value) for name, value in fetched.payload.values.items()}
        fetched.close()
        return values

    def give(self, **values: Any) -> Ticket:
        """A payload for the worker to fetch."""
        return ticket_for(self.other.publish(Payload(values)), self.other.secret)

    def has_heard(self, count: int) -> None:
        """Waits until so many orders lie before the worker, which is held up in a unit."""
        self.coordinator.until(lambda: self.worker._inbox.qsize() >= count, f"{count} orders")

    def join(self) -> None:
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "the worker does not end"


def _own(value: Any) -> Any:
    if isinstance(value, list):
        return [_own(item) for item in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


@contextlib.contextmanager
def running(
    opened: Opened | None = None,
    settings: WorkerSettings | None = None,
    coordinator: FakeCoordinator | None = None,
    *,
    ready: bool = True,
) -> Iterator[Running]:
    """A worker that runs, and is stopped at the end. Without `opened` it opens the settings' model."""
    coordinator = coordinator or FakeCoordinator()
    settings = settings or WorkerSettings("toy", transfer=TRANSFER)
    with contextlib.closing(Exchange(settings.transfer)) as exchange, contextlib.closing(Exchange(TRANSFER)) as other:
        worker = Worker(settings, lambda hello: InProcessUplink(coordinator, hello), exchange, opened)
        own = Running(coordinator, worker, exchange, exchange if settings.transfer is REFERENCES else other)
        own.stage = opened.stages.get("denoise") if opened else None
        try:
            if ready:
                coordinator.wait(Ready)
            yield own
        finally:
            worker.stop()
            own.join()
        if own.error is not None:
            raise own.error

"""Stages that only wait: what the split itself costs, whatever else the machine is at.

`python benchmarks/waiting.py STAGE SECONDS SOCKET` is the worker process of one such stage.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: the repository's root is not on the path then
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import torch  # noqa: E402

from triptych.cluster import (  # noqa: E402
    Coordinator,
    JobSpec,
    MemoryStore,
    Outcome,
    StageSpec,
    Supervisor,
    WorkerSlot,
)
from triptych.engine.crew import OnExit, OnGivenUp, Processes, Told  # noqa: E402
from triptych.engine.keeper import Memory, PayloadKeeper  # noqa: E402
from triptych.messages import Hello, Stepped  # noqa: E402
from triptych.model import Defaults, Placement, Source, StageTopology, Topology  # noqa: E402
from triptych.request import StageName  # noqa: E402
from triptych.stage import (  # noqa: E402
    Admitted,
    Caches,
    Full,
    LoadProgress,
    Output,
    Stage,
    StageEvent,
    StageInfo,
    StageTask,
    StepDone,
)
from triptych.transfer import Exchange, Payload  # noqa: E402
from triptych.worker import Opened, ProcessUplink, Uplink, Worker, WorkerSettings  # noqa: E402
from triptych.worker.main import signals  # noqa: E402

__all__ = ["WaitingStage", "alone", "cluster"]

STAGES: tuple[StageName, ...] = get_args(StageName)
CAPACITY = 4
BYTES = 1 << 18
"""of each stage's output, about what a prompt's embeddings are"""


class WaitingStage:
    """Holds what it is given and, one task at a time, does nothing for so long."""

    def __init__(self, name: StageName, seconds: float) -> None:
        self.caches = Caches()
        self._name: StageName = name
        self._seconds = seconds
        self._tasks: dict[str, StageTask] = {}
        self._made = torch.zeros(BYTES, dtype=torch.uint8)

    def load(self, report: Callable[[LoadProgress], None]) -> StageInfo:
        """Nothing to load."""
        return StageInfo(0, CAPACITY)

    def expect(self, task: StageTask) -> None:
        """There is nothing to prepare."""

    def admit(self, task: StageTask) -> Admitted | Full:
        """Takes as many tasks as a worker's stage does by default."""
        if len(self._tasks) >= CAPACITY:
            return Full()
        self._tasks[task.job] = task
        return Admitted()

    def step(self) -> list[StageEvent]:
        """Waits for the first task."""
        if not self._tasks:
            return []
        task = self._tasks.pop(next(iter(self._tasks)))
        time.sleep(self._seconds)
        made = Payload({"made": self._made}, job=task.job, attempt=task.attempt, stage=self._name)
        return [StepDone(task.job, 1, 1, self._seconds), Output(task.job, made, self._seconds, 1, 0)]

    def cancel(self, job: str) -> None:
        """Forgets a task."""
        self._tasks.pop(job, None)

    def control(self, order: object) -> None:
        """Takes no orders."""

    def close(self) -> None:
        """Forgets all tasks."""
        self._tasks.clear()


def alone(seconds: float, count: int) -> float:
    """Tasks per second of a waiting stage that is driven back to back with nothing around it."""
    stage = WaitingStage("denoise", seconds)
    began = time.perf_counter()
    for number in range(count):
        stage.admit(StageTask(str(number), {}, 0))
        stage.step()
    return count / (time.perf_counter() - began)


@contextlib.contextmanager
def cluster(seconds: tuple[float, float, float]) -> Iterator[Callable[[], None]]:
    """A worker process for each stage, their coordinator here; gives what runs one job to its end."""
    held: dict[str, tuple[StageName, ...]] = {name: (name,) for name in STAGES}
    with tempfile.TemporaryDirectory(prefix="triptych-") as made, contextlib.ExitStack() as stack:
        folder = Path(made)
        exchange = stack.enter_context(Exchange(folder=folder / "keeper"))
        keeper = PayloadKeeper(exchange, Memory())
        coordinator = Coordinator(STAGES, store=MemoryStore(), keeper=keeper)
        socket = f"ipc://{folder / 'control.sock'}"
        slots = [
            WorkerSlot(name, [sys.executable, __file__, name, str(wait), socket])
            for name, wait in zip(STAGES, seconds, strict=True)
        ]

        def supervise(exited: OnExit, given_up: OnGivenUp) -> Supervisor:
            log = functools.partial(print, file=sys.stderr)
            return Supervisor(slots, folder / "workers", on_exit=exited, on_given_up=given_up, on_line=log)

        crew = Processes(Told(coordinator, _topology()), coordinator, [socket], None, supervise, held, False)
        for close in (keeper.close, crew.stop, coordinator.close):
            stack.callback(close)
        crew.start(lambda _: None)
        yield functools.partial(_run, coordinator, keeper)


def _topology() -> Topology:
    return Topology(
        source=Source("waiting", "", "folder"),
        workflow="text2image",
        workflows=("text2image",),
        family="waiting",
        pipeline_class="Waiting",
        adapter="modular",
        stages=tuple(StageTopology(name, (), (), (), (), (), ()) for name in STAGES),
        components={},
        defaults=Defaults(),
        spatial_multiple=1,
        latent_scale=1,
        latent_channels=1,
        temporal_scale=None,
        makes="image",
        guidance="none",
    )


def _run(coordinator: Coordinator, keeper: PayloadKeeper) -> None:
    outcome: queue.SimpleQueue[Outcome] = queue.SimpleQueue()

    def watch(event: Stepped | Outcome) -> None:
        if isinstance(event, Outcome):
            outcome.put(event)

    job = uuid.uuid4().hex
    stages = tuple(StageSpec(stage=name, fields={}) for name in STAGES)
    coordinator.submit(JobSpec(id=job, stages=stages, seed=0), watch)
    ended = outcome.get()
    if ended.state != "done":
        raise RuntimeError(f"a waiting job {ended.state}: {ended.failures}")
    keeper.drop(job)


def main(stage: StageName, seconds: str, socket: str) -> None:
    """The worker of one waiting stage, until its coordinator tells it to stop."""
    settings = WorkerSettings("waiting", (stage,), threads=1, slot=stage, drain_seconds=0.0)
    stages: dict[StageName, Stage] = {stage: WaitingStage(stage, float(seconds))}
    opened = Opened(_topology(), "waiting", stages, Placement(torch.device("cpu")))

    def connect(hello: Hello) -> Uplink:
        return ProcessUplink(socket, hello)

    with Exchange(settings.transfer) as exchange:
        worker = Worker(settings, connect, exchange, opened)
        with signals(worker, exchange):
            worker.run()


if __name__ == "__main__":
    main(*sys.argv[1:])  # pyright: ignore[reportArgumentType]

"""The engine: a model open in this process, and requests on their way through its stages."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import uuid
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from PIL import Image

from triptych.decode import LatentPreview, load_preview_vae, to_clips, to_images
from triptych.device import free_bytes, pick_device, pick_dtype
from triptych.errors import Cancelled, InvalidRequest, TriptychError, Unsupported
from triptych.model import Components, Placement, Resolved, Topology, Trust, describe, open_model, resolve
from triptych.request import Progress, Request, Result, StageName, StageTime
from triptych.stage import (
    Failed,
    Full,
    GatherStage,
    LoadProgress,
    Output,
    Refused,
    StageTask,
    StepDone,
    UsePreview,
)
from triptych.transfer import Payload
from triptych.worker import build_stage

__all__ = ["Engine", "Job"]

logger = logging.getLogger(__name__)

Event = Progress | Result | TriptychError


@dataclass(eq=False)
class Job:
    """A request on its way. `events` yields its progress and then its result; `cancel` takes effect before the next
    step."""

    id: str
    resolved: Resolved
    preview: bool
    _engine: Engine
    _listener: Callable[[Event], None] | None = None
    _inbox: queue.SimpleQueue[Event] = field(default_factory=queue.SimpleQueue)
    _times: list[StageTime] = field(default_factory=list)

    def events(self) -> Iterator[Progress | Result]:
        """Progress as it happens, then the Result; once that has been read, the Result alone. Raises what the job
        failed with, or Cancelled."""
        while True:
            event = self._inbox.get()
            if not isinstance(event, Progress):
                self._inbox.put(event)  # the outcome stays, for whoever else waits or asks again
            if isinstance(event, TriptychError):
                raise event
            yield event
            if isinstance(event, Result):
                return

    def result(self) -> Result:
        """Waits for the result. Raises what the job failed with, or Cancelled."""
        for event in self.events():
            if isinstance(event, Result):
                return event
        raise AssertionError("a job ends with its result or an error")

    def cancel(self) -> None:
        """Ends the job before its next step; a finished job is left alone."""
        self._engine._send(lambda: self._engine._cancel(self), late=True)


class Engine:
    """A model opened in this process, all stages on one device. Use as a context manager, from any thread.

    One thread of its own drives every stage; callers only exchange messages with it.
    """

    def __init__(
        self,
        topology: Topology,
        stages: dict[StageName, GatherStage],
        memory: Callable[[], int],
        preview_vae: Any = None,
    ) -> None:
        self.topology = topology
        self._stages = stages
        self._order = list(stages)
        self._memory = memory
        self._preview_vae = preview_vae
        self._jobs: dict[str, Job] = {}
        self._waiting: dict[StageName, list[StageTask]] = {name: [] for name in stages}
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._previews = False
        self._thread = threading.Thread(target=self._drive, name="triptych-engine", daemon=True)

    @classmethod
    def open(
        cls,
        model: str = "emoji",
        *,
        workflow: str | None = None,
        device: str = "auto",
        dtype: str | None = None,
        revision: str | None = None,
        offline: bool = False,
        trust: Trust | None = None,
        capacity: int = 4,
        preview_vae: str | None = None,
        report: Callable[[LoadProgress], None] | None = None,
    ) -> Engine:
        """Opens a model: an embedded name, a diffusers folder, or a hub id.

        `device`: auto, cpu, cuda, xpu or mps (with an index if there are several); `dtype`: float32, bfloat16 or
        float16 (None: as on disk, float32 on a CPU); `capacity`: jobs per stage at once; `preview_vae`: the folder of
        a tiny VAE that takes the model's own's place in previews (None: a linear map fitted to the model's own).
        Loading changes torch's default dtype for its moment, process-wide: open no engine while another generates.
        Raises ModelNotFound, LoadError, DeviceError, Unsupported or InvalidRequest.
        """
        trust = trust or Trust()
        target = pick_device(device)
        placement = Placement(target, pick_dtype(dtype, target))
        source = open_model(model, revision=revision, offline=offline, trust=trust)
        topology = describe(source, workflow, trust)
        components = Components(source, trust)
        stages: dict[StageName, GatherStage] = {
            part.name: build_stage(topology, part.name, components, placement, capacity) for part in topology.stages
        }
        if capacity < 1:
            raise InvalidRequest.of("capacity", capacity, "at least 1")
        tiny = None if preview_vae is None else load_preview_vae(preview_vae, placement, trust)
        engine = cls(topology, stages, lambda: free_bytes(target), tiny)
        engine._thread.start()
        engine._load(report or (lambda _: None))
        return engine

    def _load(self, report: Callable[[LoadProgress], None]) -> None:
        """Loads every stage on the engine's own thread, where all of their work happens."""
        done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def load() -> None:
            try:
                for stage in self._stages.values():
                    stage.load(report)
                done.put(None)
            except BaseException as error:  # also an exit that a library or a callback asks for
                done.put(error)

        self._send(load)
        try:
            error = done.get()
        except BaseException:
            self._stop()  # Ctrl-C: what is being loaded is not waited for
            raise
        if error is not None:
            self.close()
            raise error

    def submit(self, request: Request, *, preview: bool = False) -> Job:
        """Checks the request and starts it. Raises InvalidRequest or NotEnoughMemory, before any work."""
        return self._submit(request, preview)

    def _submit(self, request: Request, preview: bool, listener: Callable[[Event], None] | None = None) -> Job:
        """`listener` is told of every event, on the engine's thread, in place of the job's inbox."""
        resolved = resolve(self.topology, request, self._memory())
        job = Job(uuid.uuid4().hex, resolved, preview, self, listener)
        self._send(lambda: self._begin(job))
        return job

    def generate(self, request: Request) -> Result:
        """Runs a request to its end. Raises what it fails with."""
        outcome: queue.SimpleQueue[Result | TriptychError] = queue.SimpleQueue()

        def listen(event: Event) -> None:
            # Steps wake nobody here: a caller that wakes contends with the engine's thread for the interpreter.
            if not isinstance(event, Progress):
                outcome.put(event)

        job = self._submit(request, False, listen)
        try:
            event = outcome.get()
        except BaseException:
            job.cancel()
            raise
        if isinstance(event, TriptychError):
            raise event
        return event

    def stream(self, request: Request, *, preview: bool = False) -> Generator[Progress | Result, None, None]:
        """Yields Progress as it happens, then the Result. Leaving the iteration early cancels the job."""
        job = self.submit(request, preview=preview)
        try:
            yield from job.events()
        finally:
            job.cancel()

    async def agenerate(self, request: Request) -> Result:
        """`generate` for asyncio; cancelling the awaiting task cancels the job."""
        async for event in self.astream(request):
            if isinstance(event, Result):
                return event
        raise AssertionError("a job ends with its result or an error")

    async def astream(self, request: Request, *, preview: bool = False) -> AsyncGenerator[Progress | Result, None]:
        """`stream` for asyncio. Waiting takes no thread of the loop's executor."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def listen(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody listens
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = self._submit(request, preview, listen)
        try:
            while True:
                event = await events.get()
                if isinstance(event, TriptychError):
                    raise event
                yield event
                if isinstance(event, Result):
                    return
        finally:
            job.cancel()

    def close(self) -> None:
        """Cancels what runs and lets the model go. Closing twice is fine."""
        if self._stop() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _stop(self) -> bool:
        """Tells the thread to end; False if it was told before."""
        with self._closing:
            if self._closed:
                return False
            self._closed = True
            self._orders.put(None)
            return True

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _send(self, order: Callable[[], None], late: bool = False) -> None:
        """Hands an order to the engine's thread. Raises Unsupported once closed, unless it may come too `late`."""
        with self._closing:
            if self._closed:
                if late:
                    return
                raise Unsupported("the engine is closed")
            self._orders.put(order)

    # What follows runs on the engine's thread only.

    @torch.no_grad()
    def _drive(self) -> None:
        """Receive, admit, step, reply; the last stage first, so that what is nearly done leaves."""
        reason: TriptychError = Cancelled("the engine was closed")
        try:
            while self._receive():
                for name in reversed(self._order):
                    self._admit(name)
                    for event in self._stages[name].step():
                        self._handle(name, event)
        except Exception as error:
            reason = TriptychError(f"the engine stopped: {type(error).__name__}: {error}")
            raise
        finally:
            with self._closing:
                self._closed = True
            self._drain()
            for job in list(self._jobs.values()):
                self._end(job, reason)
            for stage in self._stages.values():
                stage.close()
            self._stages, self._preview_vae = {}, None

    def _drain(self) -> None:
        """Takes in the orders that came while closing, so that nobody waits for an answer that never comes."""
        while not self._orders.empty():
            order = self._orders.get()
            if order is not None:
                order()

    def _receive(self) -> bool:
        """Carries out waiting orders; waits for one when nothing else is to do. False: close."""
        while not self._orders.empty() or not self._jobs:
            order = self._orders.get()
            if order is None:
                return False
            order()
        return True

    def _begin(self, job: Job) -> None:
        self._jobs[job.id] = job
        with self._alone(job):
            if job.preview and not self._previews:
                self._start_previews()
            self._queue(self._order[0], job, None)

    @contextlib.contextmanager
    def _alone(self, job: Job) -> Iterator[None]:
        """What goes wrong with one job ends that job."""
        try:
            yield
        except Exception as error:
            logger.exception("job %s", job.id)
            known = isinstance(error, TriptychError)
            self._end(job, error if known else TriptychError(f"{type(error).__name__}: {error}"))

    def _start_previews(self) -> None:
        self._previews = True
        if "decode" in self._stages:
            preview = LatentPreview(self._stages["decode"].program, self._preview_vae)
            self._stages["denoise"].control(UsePreview(preview))

    def _queue(self, name: StageName, job: Job, payload: Payload | None) -> None:
        """A stage is given the fields that it declares, and what crossed: nothing else."""
        resolved = job.resolved
        declared = {item.name for item in self.topology.stage(name).request_inputs}
        task = StageTask(
            job=job.id,
            fields={field: value for field, value in resolved.fields.items() if field in declared},
            seed=resolved.seed,
            guidance_scale=resolved.guidance_scale,
            shift=resolved.request.shift,
            payload=payload,
            preview=job.preview,
        )
        self._waiting[name].append(task)

    def _admit(self, name: StageName) -> None:
        waiting = self._waiting[name]
        while waiting:
            answer = self._stages[name].admit(waiting[0])
            if isinstance(answer, Full):
                return
            task = waiting.pop(0)
            if isinstance(answer, Refused):
                self._handle(name, Failed(task.job, answer.error))

    def _handle(self, name: StageName, event: StepDone | Output | Failed) -> None:
        job = self._jobs.get(event.job)
        if job is None:
            return
        with self._alone(job):
            if isinstance(event, Failed):
                self._end(job, event.error)
            elif isinstance(event, StepDone):
                picture = None if event.preview is None else Image.fromarray(event.preview.numpy())
                _tell(job, Progress(job.id, name, event.step, event.steps, event.seconds, picture))
            else:
                job._times.append(StageTime(name, event.seconds, event.steps, event.peak_bytes))
                self._pass_on(job, name, event.payload)

    def _pass_on(self, job: Job, name: StageName, payload: Payload) -> None:
        following = self._order.index(name) + 1
        if following < len(self._order):
            self._queue(self._order[following], job, payload)
        else:
            self._end(job, _result(self.topology, job, payload))

    def _end(self, job: Job, outcome: Result | TriptychError) -> None:
        self._jobs.pop(job.id, None)
        _tell(job, outcome)

    def _cancel(self, job: Job) -> None:
        if job.id not in self._jobs:
            return
        for name, stage in self._stages.items():
            self._waiting[name] = [task for task in self._waiting[name] if task.job != job.id]
            stage.cancel(job.id)
        self._end(job, Cancelled("the job was cancelled"))


def _tell(job: Job, event: Event) -> None:
    if job._listener is not None:
        job._listener(event)
    else:
        job._inbox.put(event)


def _result(topology: Topology, job: Job, payload: Payload) -> Result:
    request = job.resolved.request
    if "videos" in payload.values:
        fps = request.fps or 16.0
        outputs: tuple[Any, ...] = tuple(to_clips(payload.values["videos"], fps))
    else:
        outputs = tuple(to_images(payload.values["images"]))
    return Result(
        job=job.id,
        model=topology.source.name,
        workflow=job.resolved.workflow,
        request=request,
        outputs=outputs,
        times=tuple(job._times),
        warnings=job.resolved.warnings,
    )

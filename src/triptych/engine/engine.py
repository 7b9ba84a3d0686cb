"""The engine: a model open in some layout, and requests on their way through its stages."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import queue
import sys
import uuid
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import structs

from triptych.cluster import Estimate, FlushReport, JobRecord, JobSpec, JobState, Observer, Outcome, Status
from triptych.config import Layout
from triptych.engine.crew import LoadReport
from triptych.engine.jobs import Event, Job, JobView, Listener, ResultFile
from triptych.engine.names import Names
from triptych.engine.opening import Opening, Parts, open_crew
from triptych.engine.results import error_of, progress_of, result_of
from triptych.engine.specs import Options, pictures_of, spec_of
from triptych.engine.vae import call_of, tensor_payload, vae_spec
from triptych.errors import Cancelled, NoWorker, TriptychError, Unsupported
from triptych.messages import Encoding, Stepped
from triptych.model import Resolved, Trust, VaeCall, check_memory, extent_of, resolve
from triptych.request import Progress, Request, Result, StageName, VaeTask

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from triptych.transfer import Payload

__all__ = ["Engine"]

T = TypeVar("T")
Finish = Callable[[JobRecord, "Payload | None"], Any]
"""What the owner of a job that is done is told: of its record, and its result unless that is files."""

logger = logging.getLogger(__name__)


class Engine:
    """A model opened in a layout: in this process (`fused`), or in processes of its own. Use as a context manager,
    from any thread."""

    def __init__(self, parts: Parts, isolated: bool) -> None:
        self.topology = parts.topology
        self._coordinator = parts.coordinator
        self._keeper = parts.keeper
        self._parts = parts
        self._isolated = isolated
        self._steps: dict[str, Stepped] = {}
        self._listeners: dict[str, Callable[[Any], None]] = {}
        self._names = Names(parts.secret, lambda job: self._coordinator.job(job) is not None)
        self._closed = False
        self._broken = ""
        parts.crew.watch(self._died)
        self._take_over()

    def _take_over(self) -> None:
        """Hears of the jobs that an engine before this one accepted and did not end."""
        if not self._parts.durable:
            return
        for record in self._coordinator.jobs(states=("queued", "running"), limit=sys.maxsize):
            self._coordinator.watch(record.spec.id, functools.partial(self._heard, record.spec.id))

    def _heard(self, job: str, event: Stepped | Outcome) -> None:
        if isinstance(event, Stepped):
            self._steps[job] = event
        else:
            self._steps.pop(job, None)

    @classmethod
    def open(
        cls,
        model: str = "emoji",
        *,
        layout: str | Path | Layout = "fused",
        workflow: str | None = None,
        device: str = "auto",
        dtype: str | None = None,
        revision: str | None = None,
        offline: bool = False,
        trust: Trust | None = None,
        capacity: int | None = None,
        preview_vae: str | None = None,
        isolate: bool = False,
        state: Path | None = None,
        listen: str | None = None,
        keys: Path | None = None,
        trace: Path | None = None,
        artifacts: str | None = None,
        signed: str | None = None,
        observers: Sequence[Observer] = (),
        meanwhile: Callable[[], None] = lambda: None,
        report: LoadReport | None = None,
    ) -> Engine:
        """Opens a model: an embedded name, a diffusers folder, or a hub id.

        `layout`: fused (all stages in this process), split (a process per stage), or a layout file. `device`: auto,
        cpu, cuda, xpu or mps (with an index if there are several); `dtype`: float32, bfloat16 or float16 (None: as on
        disk, float32 on a CPU); `capacity`: jobs per stage at once (None: 4); `preview_vae`: the folder of a tiny VAE
        that takes the model's own's place in previews (None: a linear map fitted to the model's own). `isolate`: no
        stage in this process, whatever the layout; `state`: the folder that jobs and results outlive this process in
        (None: they don't); `listen` and `keys`: where workers from elsewhere may join, and who; `trace`: a timeline to
        write; `artifacts`: the fsspec URL where results and checkpoints lie (None: in the state folder); `signed`: the
        version of Triptych by which files say how they were made (None: they say nothing); `observers`: told of all
        that happens to jobs and workers, and closed with the engine; `meanwhile`: called while worker processes start.
        Loading in this process changes torch's default dtype for its moment: open no engine while another generates.
        Raises ModelNotFound, LoadError, DeviceError, Unsupported or InvalidRequest.
        """
        opening = Opening(
            model=model,
            layout=layout,
            workflow=workflow,
            device=device,
            dtype=dtype,
            revision=revision,
            offline=offline,
            trust=trust or Trust(),
            capacity=capacity,
            preview_vae=preview_vae,
            isolate=isolate,
            state=state,
            listen=listen,
            keys=keys,
            trace=trace,
            artifacts=artifacts,
            signed=signed,
            observers=observers,
            meanwhile=meanwhile,
        )
        return cls(open_crew(opening, report or (lambda _: None)), isolate)

    def submit(
        self,
        request: Request,
        *,
        preview: bool = False,
        client: str = "",
        priority: int = 0,
        deadline: float | None = None,
        exact: bool = False,
        files: bool | None = None,
        trace: str = "",
        id: str | None = None,
        digest: str = "",
        check: Callable[[Request], None] | None = None,
    ) -> Job:
        """Checks the request and starts it. `check` is given the request with its defaults filled in; what it raises
        refuses it. `files`: outputs are made as files in the request's format, for
        `result_files`, instead of pixels for the Result (None: in an engine that keeps its stages to themselves).
        `trace`: the W3C `traceparent` that the job belongs to. `id`: the job's, as `id_of` gives it, refused if there
        is one of that id (None: a new one); `digest`: of what was asked, kept with the job.

        Raises InvalidRequest, NotEnoughMemory, QueueFull, or NoWorker where nobody is left to do it, before any work.
        """
        wanted = self._isolated if files is None else files
        options = Options(preview, client, priority, deadline, exact, wanted, trace, id, digest)
        inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        job, resolved = self._submit(request, options, inbox.put, check)
        return Job(job, resolved, self.cancel, inbox)

    def _submit(
        self, request: Request, options: Options, listener: Listener, check: Callable[[Request], None] | None = None
    ) -> tuple[str, Resolved]:
        """`listener` is told of every event, on the thread that brings it."""
        self._require_open()
        resolved = resolve(self.topology, request, self._parts.crew.free_bytes())
        if check is not None:
            check(resolved.request)

        def spec(job: str, kept: str | None) -> JobSpec:
            return spec_of(self.topology, job, resolved, options, kept, self._parts.signing)

        finish = functools.partial(result_of, self.topology, resolved)
        with contextlib.nullcontext() if options.id is None else self._names.entering(options.id):
            return self._enter(spec, pictures_of(resolved.fields), finish, listener, options.id), resolved

    def _enter(
        self, spec_of: Callable[[str, str | None], JobSpec], pictures: Payload | None, finish: Finish,
        listener: Callable[[Any], None], id: str | None = None,
    ) -> str:  # fmt: skip
        """A new job's id; `spec_of` is given that and the keeper's name for its pictures, `listener` its Progress and
        then what `finish` makes of it, or the error."""
        job, taken = id or uuid.uuid4().hex, False
        try:
            kept = None if pictures is None else self._keeper.put(job, "pictures", pictures).name
            spec = spec_of(job, kept)
            self._coordinator.submit(spec, self._teller(spec, finish, listener))
            taken = True
            self._require_crew()
        except BaseException:
            self._listeners.pop(job, None)
            if taken:  # nothing may answer for it when its client asks again
                self._coordinator.forget(job)
            else:
                self._coordinator.cancel(job)
            self._keeper.drop(job)
            raise
        return job

    def submit_vae(
        self, call: VaeCall, data: bytearray | torch.Tensor, *, client: str = "", priority: int = 0,
        deadline: float | None = None, trace: str = "", encoding: Encoding | None = None,
        listener: Callable[[Progress | torch.Tensor | TriptychError | None], None] = lambda _: None,
    ) -> str:  # fmt: skip
        """Starts a call of the model's VAE by itself on a tensor, or its bytes, and returns the job's id. `encoding`:
        what it makes is kept as a file of that kind, for `result_files` (None: `listener` is given the tensor). Raises
        like `submit`, and Unsupported for a model without a VAE."""
        self._require_open()
        extent = extent_of(self.topology, call)
        check_memory(self.topology, extent, self._parts.crew.free_bytes())
        options = Options(client=client, priority=priority, deadline=deadline, trace=trace)

        def spec(job: str, kept: str | None) -> JobSpec:
            assert kept is not None
            return vae_spec(self.topology, job, call, extent, options, kept, encoding)

        return self._enter(spec, tensor_payload(call, data), lambda _, made: made and made.values["tensor"], listener)

    def _require_open(self) -> None:
        if self._closed:
            raise Unsupported("the engine is closed")
        self._require_crew()

    def _require_crew(self) -> None:
        if self._broken:
            raise NoWorker(self._broken)

    def _died(self, reason: str) -> None:
        """Nobody is left to do the work. Whoever waits is told; with a state folder the jobs go on when it is opened
        again."""
        if self._closed:
            return  # it was told to end, and whoever waits is told so
        self._broken = reason
        self._coordinator.give_up(reason, keep=self._parts.durable)

    def _teller(
        self, spec: JobSpec, finish: Finish, listener: Callable[[Any], None]
    ) -> Callable[[Stepped | Outcome], None]:
        def tell(event: Stepped | Outcome) -> None:
            if self._listeners.get(spec.id) is not listener:  # or it is another job's of that id by now
                return
            if isinstance(event, Stepped):
                self._steps[spec.id] = event
                listener(progress_of(event))
                return
            self._tell_end(spec.id, self._outcome(spec, finish, event))

        self._listeners[spec.id] = listener

        return tell

    def _tell_end(self, job: str, event: Any) -> None:
        """The last word to whoever waits for a job, once."""
        self._steps.pop(job, None)
        listener = self._listeners.pop(job, None)
        if listener is not None:
            listener(event)

    def _outcome(self, spec: JobSpec, finish: Finish, outcome: Outcome) -> Any:
        try:
            return self._ended(spec, finish, outcome)
        except TriptychError as error:
            return error
        except Exception as error:  # without an answer the caller would wait for ever
            logger.exception("the result of job %s cannot be read", spec.id)
            return TriptychError(f"the result of job {spec.id} cannot be read ({type(error).__name__}: {error})")

    def _ended(self, spec: JobSpec, finish: Finish, outcome: Outcome) -> Any:
        if outcome.state != "done":
            if not self._parts.durable:
                self._keeper.drop(spec.id)  # nobody can replay it
            return error_of(spec.id, outcome)
        record = self._coordinator.job(spec.id)
        assert record is not None
        if spec.encoding is not None:
            return finish(record, None)
        payload = self._keeper.take(spec.id, "result")
        self._keeper.drop(spec.id)
        return finish(record, payload)

    def generate(self, request: Request, *, exact: bool = False) -> Result:
        """Runs a request to its end. Raises what it fails with."""
        outcome: queue.SimpleQueue[Result | TriptychError] = queue.SimpleQueue()

        def listen(event: Event) -> None:
            # Steps wake nobody here: a caller that wakes contends with the stages' thread for the interpreter.
            if not isinstance(event, Progress):
                outcome.put(event)

        job, _ = self._submit(request, Options(exact=exact), listen)
        return self._await(job, outcome)

    def _await(self, job: str, outcome: queue.SimpleQueue[T | TriptychError]) -> T:
        try:
            event = outcome.get()
        except BaseException:
            self.cancel(job)
            raise
        if isinstance(event, TriptychError):
            raise event
        return event

    def decode_latents(self, latents: torch.Tensor, **options: Any) -> torch.Tensor:
        """Pixels about −1…1 (batch, 3, [frames,] height, width) of latents, by the model's VAE alone. `options` are
        those of `VaeOptions`, but `do_scaling` unless told otherwise. Raises like `generate`."""
        return self._call_vae("vae.decode", latents, {"do_scaling": True, **options})

    def encode_pixels(self, pixels: torch.Tensor | Image.Image, **options: Any) -> torch.Tensor:
        """The latents of a picture, or of pixels as `VaeCall` takes them, by the model's VAE alone: the middle of their
        distribution. `options` and errors as in `decode_latents`."""
        return self._call_vae("vae.encode", pixels, {"do_scaling": True, **options})

    def _call_vae(self, task: VaeTask, given: torch.Tensor | Image.Image, options: dict[str, Any]) -> torch.Tensor:
        call, data = call_of(self.topology, task, given, options)
        outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def listen(event: Any) -> None:
            if not isinstance(event, Progress):
                outcome.put(event)

        return self._await(self.submit_vae(call, data, listener=listen), outcome)

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

        job, _ = self._submit(request, Options(preview=preview), listen)
        try:
            while True:
                event = await events.get()
                if isinstance(event, TriptychError):
                    raise event
                yield event
                if isinstance(event, Result):
                    return
        finally:
            self.cancel(job)

    def cancel(self, job: str) -> bool:
        """Ends a job before its next step. False if it is unknown or has ended."""
        return not self._closed and self._coordinator.cancel(job)

    def view(self, job: str) -> JobView | None:
        """A job as it stands; None if it is unknown or has expired."""
        record = self._coordinator.job(job)
        if record is None:
            return None
        step = self._steps.get(job)
        now = record.spec.stages[record.stage].stage if record.stage < len(record.spec.stages) else None
        here = step if step is not None and step.stage == now else None
        position = self._coordinator.position(job)
        return JobView(record, position, here.step if here else 0, here.steps if here else 0)

    def id_of(self, client: str, name: str) -> str:
        """The id of the job that a client names so, whether there is one or not: the same again with the same state
        folder, and not to be guessed."""
        return self._names.id_of(client, name)

    def estimate(self, job: str) -> Estimate:
        """When a job that has not ended will start and end, as far as that can be told."""
        return self._coordinator.estimate(job)

    def watch(self, job: str, watcher: Callable[[Stepped | Outcome], None]) -> Callable[[], None]:
        """Calls `watcher` with every unit done from now on and finally with the Outcome, on the thread that brings it;
        returns what ends that. Raises InvalidRequest for a job that is unknown or has expired."""
        return self._coordinator.watch(job, watcher)

    def jobs(
        self, *, client: str | None = None, states: Iterable[JobState] | None = None, before: str | None = None,
        limit: int = 50,
    ) -> list[JobRecord]:  # fmt: skip
        """Jobs, newest first; `before`: older than that job."""
        return self._coordinator.jobs(client=client, states=states, before=before, limit=limit)

    def under_way(self, client: str) -> int:
        """How many of a client's jobs have not ended."""
        return self._coordinator.under_way(client)

    def forget(self, job: str) -> bool:
        """Forgets a job and what was kept for it, cancelling it first if it has not ended; False if it is unknown."""
        return not self._closed and self._coordinator.forget(job)

    def result_files(self, job: str) -> list[ResultFile]:
        """The outputs of a finished job that was submitted with `files`."""
        return self._keeper.files(job)

    def status(self) -> Status:
        """Stages, workers and queues as they stand."""
        return self._coordinator.status()

    def missing_stages(self) -> tuple[StageName, ...]:
        """The stages that no worker is ready for."""
        return self._coordinator.missing()

    def flush(self, timeout: float = 30.0) -> FlushReport:
        """Has every worker let go of what it keeps only to be faster, after the unit that it is at, and waits at most
        `timeout` seconds for them. Raises QueueFull while another flush is under way."""
        report = self._coordinator.flush(timeout)
        return structs.replace(report, coordinator={"transfer": self._keeper.trim()})

    def drain(self, timeout: float) -> bool:
        """Takes no more jobs and waits at most `timeout` seconds for those it has; whether they have ended."""
        return self._coordinator.drain(timeout)

    def close(self) -> None:
        """Ends it and lets the model go. Jobs that have not ended are cancelled; with a state folder they go on when
        it is opened again. Twice is fine."""
        if self._closed:
            return
        self._closed = True
        for job in list(self._listeners) if not self._parts.durable else ():
            self._coordinator.cancel(job)
        try:
            self._parts.cleanup.close()
        finally:
            later = "; the job goes on when its state is opened again" if self._parts.durable else ""
            for job in list(self._listeners):
                self._tell_end(job, Cancelled(f"the engine was closed{later}"))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

"""A stage whose tasks run their own pipeline code in greenlets and meet at the heavy components."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from triptych.errors import Cancelled, NotEnoughMemory, StageFailed, TriptychError, Unsupported, WrongPayload
from triptych.model import (
    CHECKPOINT,
    CHECKPOINT_VALUES,
    Components,
    LateInputs,
    Pause,
    Placement,
    StageName,
    StageProgram,
    Step,
    TaskInputs,
    TaskOutputs,
    check_checkpoint,
)
from triptych.stage.arrivals import check_head
from triptych.stage.caches import Caches, Freed
from triptych.stage.gather import Call, Gather, Parked, TaskGreenlet, Waiting
from triptych.stage.health import first_bad_weight, is_finite, peak_bytes, reset_peak
from triptych.stage.protocol import (
    Admitted,
    Checkpoint,
    Failed,
    Flush,
    Full,
    JobId,
    LoadProgress,
    Order,
    Output,
    Refused,
    StageEvent,
    StageInfo,
    StageTask,
    StepDone,
)
from triptych.stage.vae import check_input, check_input_head, run_vae
from triptych.transfer import Header, Payload

logger = logging.getLogger(__name__)


@dataclass
class Live:
    """A task that was admitted or is expected: its greenlet, the call it is parked at, what it has done."""

    task: StageTask
    inputs: TaskInputs
    greenlet: TaskGreenlet | None = None
    call: Call | None = None
    began: float = 0.0
    started: bool = False
    """whether it has begun with what it needs being there"""
    steps: int = 0
    checked: set[str] = field(default_factory=set)
    kept: float = 0.0
    """Seconds of work at its last checkpoint; infinite once it has turned out to allow none."""
    _worked: float = 0.0
    _since: float = 0.0

    @property
    def resumed_at(self) -> int:
        """The steps that a checkpoint spared it."""
        return 0 if self.inputs.checkpoint is None else self.inputs.checkpoint["step"]

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Time in here is its work."""
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self._worked += time.perf_counter() - self._since

    def worked(self) -> float:
        """Seconds of work so far; asked by what runs within `working`."""
        return self._worked + time.perf_counter() - self._since


class GatherStage:
    """A Stage over one StageProgram. Subclasses say how a task's result crosses and what a step looks like.

    One thread drives it, inside one outer `torch.no_grad()`. A group is one call today; `_group` is where step
    batching will pick more. Raises nothing from `step`: a task's error becomes its `Failed` event. What keeps something
    for it only to be faster registers with `caches`.
    """

    def __init__(self, program: StageProgram, components: Components, placement: Placement, capacity: int = 4) -> None:
        self.program = program
        self.name: StageName = program.stage.name
        self.caches = Caches()
        self._components = components
        self._placement = placement
        self._capacity = capacity
        self._gather = Gather({})
        self._live: dict[JobId, Live] = {}
        self._expected: dict[JobId, Live] = {}
        """begun, and waiting for their inputs"""
        self._events: list[StageEvent] = []
        self._loaded = False

    def load(self, report: Callable[[LoadProgress], None]) -> StageInfo:
        """Loads this stage's components. Raises LoadError with the component and the reason."""
        names = self.program.stage.loads
        infos = self.program.topology.components
        began, done = time.perf_counter(), 0
        for name in names:
            if name in infos:
                self._components.get(infos[name], self._placement)
                done += 1
                now = time.perf_counter()
                report(LoadProgress(name, infos[name].bytes, now - began, done, len(names)))
                began = now
        self.program.load(self._components, self._placement)
        self._gather = Gather(self.program.components)
        self._loaded = True
        size = sum(infos[name].bytes for name in names if name in infos)
        return StageInfo(size, self._capacity)

    def expect(self, task: StageTask) -> None:
        """Begins a task, up to where it needs what is not here yet; `admit` goes on with it. No more than the stage
        takes at once. What goes wrong here goes wrong again, and is told, when the task has come."""
        self._give_up(task.job)
        if not self._loaded or task.job in self._live or len(self._expected) >= self._capacity:
            return
        live = Live(task, LateInputs(*self._given(task), wait=self._gather.wait))
        try:
            reached = self._gather.begin(self._make(live))
        except Exception:
            reached = None
        if isinstance(reached, Waiting):
            self._expected[task.job] = live
        else:  # over, or at a component that needs none of it: not before its turn
            self._throw_out(live)

    def _give_up(self, job: JobId) -> None:
        if (live := self._expected.pop(job, None)) is not None:
            self._throw_out(live)

    def _begun(self, task: StageTask) -> Live | None:
        """What was begun of just this task, now with its inputs."""
        live = self._expected.get(task.job)
        if live is None or dataclasses.replace(task, payload=None, attempt=live.task.attempt) != live.task:
            self._give_up(task.job)
            return None
        del self._expected[task.job]
        live.task = task
        self._fill(live.inputs, task)
        return live

    def admit(self, task: StageTask) -> Admitted | Full | Refused:
        """Takes a task if there is room and what it brings is what the topology declares."""
        if not self._loaded:
            return Refused(Unsupported(f"stage {self.name} is not loaded"))
        if task.job in self._live:
            return Refused(WrongPayload(f"stage {self.name} already holds job {task.job}"))
        if len(self._live) >= self._capacity:
            return Full()
        try:
            if task.bare is None:
                self._check(task.payload)
            else:
                check_input(task.payload)
            self._check_checkpoint(task.checkpoint)
        except WrongPayload as error:
            return Refused(error)
        self._live[task.job] = self._begun(task) or Live(task, self._inputs(task))
        return Admitted()

    def _check(self, payload: Payload | None) -> None:
        if payload is None:
            return
        payload.check()
        declared = {port.name for port in self.program.stage.inputs}
        strange = sorted(payload.values.keys() - declared)
        if strange:
            raise WrongPayload(f"stage {self.name} takes no {', '.join(strange)}", field=strange[0])
        missing = [p.name for p in self.program.stage.inputs if p.required and payload.values.get(p.name) is None]
        if missing:
            raise WrongPayload(f"stage {self.name} needs {', '.join(missing)}", field=missing[0])

    def _check_checkpoint(self, checkpoint: Payload | None) -> None:
        if checkpoint is None:
            return
        if self.name != "denoise":
            raise WrongPayload(f"given one; allowed: none (stage {self.name} has no steps)", field=CHECKPOINT)
        checkpoint.check()
        check_checkpoint(checkpoint.values, self.program.topology.pipeline_class)

    def expects(self, header: Header) -> None:
        """Checks the header of a task's input before its body is fetched. Raises WrongPayload for values that the
        topology does not declare."""
        check_head(header, {port.name for port in self.program.stage.inputs}, f"stage {self.name}")

    def expects_tensor(self, header: Header) -> None:
        """The same for the tensor of a bare task."""
        check_input_head(header)

    def expects_checkpoint(self, header: Header) -> None:
        """The same for a task's checkpoint."""
        check_head(header, CHECKPOINT_VALUES, f"a checkpoint of stage {self.name}")

    def _inputs(self, task: StageTask) -> TaskInputs:
        fields, scale, generator, shift = self._given(task)
        inputs = TaskInputs(fields, scale, generator, shift=shift)
        self._fill(inputs, task)
        if task.checkpoint is not None:
            inputs.checkpoint = dict(task.checkpoint.values)
        return inputs

    @staticmethod
    def _given(task: StageTask) -> tuple[dict[str, Any], float | None, torch.Generator, float | None]:
        # On the CPU whatever the device, so that a seed means the same picture everywhere.
        generator = torch.Generator("cpu").manual_seed(task.seed)
        return dict(task.fields), task.guidance_scale, generator, task.shift

    @staticmethod
    def _fill(inputs: TaskInputs, task: StageTask) -> None:
        payload = task.payload or Payload({})
        inputs.values = dict(payload.values)
        inputs.tags = {name: list(values) for name, values in payload.tags.items()}

    def step(self) -> list[StageEvent]:
        """Starts what is new, then runs one group of parked calls and resumes its tasks."""
        for live in list(self._live.values()):
            if not live.started:
                self._start(live)
        group = self._choose()
        for live in group:
            self._run(live)
        events, self._events = self._events, []
        return events

    def _choose(self) -> list[Live]:
        group = self._group()
        assert len(group) < 2 or not any(live.task.exact for live in group), "an exact task runs alone"
        return group

    def _group(self) -> list[Live]:
        """The task that has waited longest: the front of the queue."""
        return [next(iter(self._live.values()))] if self._live else []

    def _start(self, live: Live) -> None:
        live.began, live.started = time.perf_counter(), True
        reset_peak(self._placement.device)
        expected = live.greenlet is not None
        if not expected:
            self._make(live)
        with live.working():
            self._advance(live, lambda task: self._gather.resume(task, None) if expected else self._gather.begin(task))

    def _make(self, live: Live) -> TaskGreenlet:
        live.greenlet = self._gather.start(lambda: self._body(live))
        if live.task.checkpoint_seconds is not None:
            live.inputs.keep = lambda pause: self._on_pause(live, pause)
        return live.greenlet

    def _body(self, live: Live) -> TaskOutputs:
        if live.task.bare is not None:
            return run_vae(live.task, self.program.topology, self._gather.stand_ins, self._placement.device)
        return self.program.run(live.inputs, self._gather.stand_ins, lambda step: self._on_step(live, step))

    def _on_step(self, live: Live, step: Step) -> None:
        live.steps = step.index + 1
        if step.latents is not None and step.index in (live.resumed_at, step.total - 1) and not is_finite(step.latents):
            raise self._failed(live, self._not_finite(step), "NonFinite")
        seconds = time.perf_counter() - live.began
        self._events.append(StepDone(live.task.job, step.index + 1, step.total, seconds, self._preview(live, step)))

    def _on_pause(self, live: Live, pause: Pause) -> None:
        task = live.task
        if task.checkpoint_seconds is None or live.worked() - live.kept < task.checkpoint_seconds:
            return
        values = pause.take()
        if values is None:
            logger.info("no checkpoints of job %s: its loop holds more than plain data", task.job)
            live.kept = math.inf
            return
        live.kept = live.worked()
        payload = Payload(values, job=task.job, attempt=task.attempt, stage=self.name)
        self._events.append(Checkpoint(task.job, pause.step, payload))

    def _not_finite(self, step: Step) -> str:
        """What to say of latents that are no numbers: the weight that is none either, if there is one."""
        what = f"the latents hold NaN or infinity after step {step.index + 1}"
        for name, part in self.program.components.items():
            weight = first_bad_weight(part) if isinstance(part, torch.nn.Module) else None
            if weight is not None:
                return f"{what}: so does weight {weight} of {name}"
        return what

    def _preview(self, live: Live, step: Step) -> torch.Tensor | None:
        """A small picture of what the step's latents hold; None unless the task asked and the stage can."""
        return None

    def _run(self, live: Live) -> None:
        call = live.call
        assert call is not None
        with live.working():
            self._answer(live, call)

    def _answer(self, live: Live, call: Call) -> None:
        try:
            result = self._gather.run([call])[0]
            self._check_finite(live, call, result)
        except Exception as error:
            reason = error
            self._advance(live, lambda task: self._gather.fail(task, reason))
        else:
            self._advance(live, lambda task: self._gather.resume(task, result))

    def _check_finite(self, live: Live, call: Call, result: Any) -> None:
        """At a component's first call for a task: NaN from NaN weights is told by the weight's name."""
        if call.component in live.checked:
            return
        live.checked.add(call.component)
        if is_finite(result):
            return
        weight = first_bad_weight(self.program.components[call.component])
        if weight is not None:
            raise self._failed(live, f"weight {weight} of {call.component} holds NaN or infinity", "NonFinite")

    def _advance(self, live: Live, go: Callable[[TaskGreenlet], Any]) -> None:
        """Moves a task to its next call, its end or its failure, and to the back of the queue."""
        task = live.greenlet
        assert task is not None
        self._live.pop(live.task.job, None)
        try:
            reached = go(task)
        except Cancelled:
            return
        except Exception as error:
            self._events.append(Failed(live.task.job, self._explain(live, error)))
            return
        if isinstance(reached, Parked):
            live.call = reached.call
            self._live[live.task.job] = live
            return
        self._end(live, reached)

    def _end(self, live: Live, outputs: TaskOutputs) -> None:
        try:
            if live.task.bare is None:
                payload = self._payload(live, outputs)
            else:  # whatever it made, it is nothing for the kind of stage to change
                payload = GatherStage._payload(self, live, outputs)
        except Exception as error:
            self._events.append(Failed(live.task.job, self._explain(live, error)))
            return
        seconds = time.perf_counter() - live.began
        if not live.steps:
            self._events.append(StepDone(live.task.job, 1, 1, seconds))
        peak = peak_bytes(self._placement.device)
        self._events.append(Output(live.task.job, payload, seconds, max(live.steps, 1), peak, live.resumed_at))

    def _payload(self, live: Live, outputs: TaskOutputs) -> Payload:
        task = live.task
        return Payload(outputs.values, outputs.tags, job=task.job, attempt=task.attempt, stage=self.name).check()

    def _failed(self, live: Live, message: str, original: str) -> StageFailed:
        return StageFailed(message, stage=self.name, job=live.task.job, original=original)

    def _explain(self, live: Live, error: Exception) -> TriptychError:
        if isinstance(error, TriptychError):
            return error
        # On a CPU torch has no error of its own for it.
        short = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        if short:
            return NotEnoughMemory(f"stage {self.name} ran out of memory ({error})")
        kind = type(error).__name__
        told = self._failed(live, f"{self.name} failed with {kind}: {error}", kind)
        told.__cause__ = error  # for the worker's log, and for whoever replays the task
        return told

    def cancel(self, job: JobId) -> None:
        """Drops a task before its next unit; its pipeline code sees Cancelled, so that it cleans up. What it does
        beyond that is lost."""
        self._give_up(job)
        if (live := self._live.pop(job, None)) is not None:
            self._throw_out(live)

    def _throw_out(self, live: Live) -> None:
        if live.greenlet is not None:
            with contextlib.suppress(Exception):
                self._gather.fail(live.greenlet, Cancelled("cancelled"))

    def control(self, order: Order) -> Freed | None:
        """Flushes the stage's caches. Raises Unsupported for an order that means nothing to it."""
        if isinstance(order, Flush):
            return self.caches.flush()
        raise Unsupported(f"stage {self.name} cannot {type(order).__name__}")

    def close(self) -> None:
        """Drops all tasks. The weights go with the stage and the components that it was given."""
        for job in [*self._live, *self._expected]:
            self.cancel(job)
        self._gather = Gather({})
        self._loaded = False

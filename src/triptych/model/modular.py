"""One stage of a pipeline run from Modular Diffusers' own blocks."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.modular_pipelines.modular_pipeline import (
    ConditionalPipelineBlocks,
    LoopSequentialPipelineBlocks,
    ModularPipeline,
    ModularPipelineBlocks,
    PipelineState,
)
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec

from triptych.errors import InvalidRequest, LoadError, Unsupported, WrongPayload
from triptych.model import blocks as modular
from triptych.model.contract import Step, TaskInputs, TaskOutputs
from triptych.model.course import Course
from triptych.model.declared import GENERATOR_STATE, OUTPUT_COUNTS
from triptych.model.families import Family, resolve_family
from triptych.model.load import Components, Placement, meta_component
from triptych.model.replay import change_tensors, overridden
from triptych.model.schedulers import is_flow, own_copies
from triptych.model.topology import StageTopology, Topology

__all__ = ["ModularProgram"]

CROSSED = "crossed"
"""Where a run with marks puts what would cross, by stage."""
ANCHOR = "triptych_anchor"
MISSING = re.compile(r"Required input '(\w+)' is missing")


class ModularProgram:
    """Runs one stage's blocks (see `StageProgram`). Tasks share the loaded components and the blocks; each has its
    own view of the pipeline, with its own scheduler, guiders and stand-ins."""

    def __init__(
        self, topology: Topology, stage: StageTopology, marks: Mapping[str, StageTopology] | None = None
    ) -> None:
        """`marks`: after the block of that name, keep what would cross from that stage (see `CROSSED`)."""
        self._marks = dict(marks or {})
        self.topology = topology
        self.stage = stage
        self.components: Mapping[str, Any] = {}
        self._index = modular.read_index(topology.source)
        family = resolve_family(self._index)
        if family is None:
            raise Unsupported(f"no modular blocks for {topology.pipeline_class}")
        self._family: Family = family
        self._pipe: ModularPipeline | None = None
        self._device = torch.device("cpu")
        self._dtype = torch.float32
        self._inputs: list[Any] = []
        self._running: dict[int, ModularPipeline] = {}

    def load(self, components: Components, placement: Placement) -> None:
        """Loads what `stage.loads` names and puts configs on the meta device for `stage.reads`. Raises LoadError."""
        names = self.stage.blocks
        blocks = modular.select(self._family, self._index, self.topology.workflow, names)
        pipe = modular.make_pipeline(self.topology.source, self._family, self._index, blocks)
        infos = self.topology.components
        held: dict[str, Any] = {}
        for name in self.stage.loads:
            found = components.get(infos[name], placement)
            if found is None:
                raise LoadError(f"{name} of {self.topology.source.name} came to nothing")
            held[name] = self._mended(name, found)
        for name in self.stage.reads:
            setattr(pipe, name, meta_component(self.topology.source, infos[name], components.trust))
        for name, component in held.items():
            setattr(pipe, name, component)
        self.components = held
        # Asked before our own blocks are in it, and once: diffusers gathers them anew at every question.
        self._inputs = modular.inputs_of(blocks)
        for loop in modular.loops_of(blocks):
            loop.set_progress_bar_config(disable=True)
            loop.sub_blocks.insert("triptych_before_step", _Leaf(_Watch.before), 0)
            loop.sub_blocks["triptych_after_step"] = _Leaf(_Watch.after)
        for block, stage in self._marks.items():
            at = list(blocks.sub_blocks).index(block) + 1
            blocks.sub_blocks.insert(f"triptych_mark_{stage.name}", _Mark(stage), at)
        self._device, self._dtype = placement.device, self._main_dtype()
        self._anchor(pipe)
        self._pipe = pipe

    def _main_dtype(self) -> torch.dtype:
        """What the stage computes in: the dtype of the first component that has weights."""
        models = (item for item in self.components.values() if isinstance(item, torch.nn.Module))
        return next((model.dtype for model in models), torch.float32)  # type: ignore[misc]

    def _anchor(self, pipe: ModularPipeline) -> None:
        """Makes the pipeline's device and dtype ours whatever it holds: diffusers asks the first module it finds,
        which may be one on the meta device or no module at all, but a stand-in."""
        setattr(pipe, ANCHOR, _Anchor(self._device, self._dtype))
        pipe._component_specs = {ANCHOR: ComponentSpec(ANCHOR), **pipe._component_specs}

    def _mended(self, name: str, component: Any) -> Any:
        """The component with what its family needs done to it, on the instance."""
        if self._family.multimodal_rope and name == "text_encoder":
            return with_token_types(component)
        if self._family.sliced_vae and name == "vae":
            component.enable_slicing()
        return component

    def run(
        self,
        task: TaskInputs,
        stand_ins: Mapping[str, Any],
        on_step: Callable[[Step], None] | None = None,
    ) -> TaskOutputs:
        """Runs the stage's blocks for one task. Raises InvalidRequest or WrongPayload for inputs that are missing,
        WrongPayload for a checkpoint that is not this task's, and whatever `on_step` and `task.keep` raise."""
        course = self._course(task)
        view = self._view(task, stand_ins if course is None else self._counted(stand_ins, course))
        view.triptych_watch = None if on_step is None and course is None else _Watch(on_step, view, course)
        if GENERATOR_STATE in task.values:
            task.generator.set_state(task.values[GENERATOR_STATE].cpu().contiguous())
        before = task.generator.get_state()
        state = self._state(task)
        view.triptych_state = state
        self._running[id(task)] = view
        try:
            with modular.quiet(), torch.no_grad(), contextlib.nullcontext() if course is None else course.going():
                view.blocks_of_stage(view, state)
        except ValueError as error:
            self._explain(error)
            raise
        finally:
            del self._running[id(task)]
        return self._outputs(task, state, before, view.triptych_marked)

    def _course(self, task: TaskInputs) -> Course | None:
        if task.keep is None and task.checkpoint is None:
            return None
        return Course(task, self.topology.pipeline_class, self._device)

    def _counted(self, stand_ins: Mapping[str, Any], course: Course) -> dict[str, Any]:
        """The models as the task is to see them, with what they answer within the loop left to `course`."""
        seen = {**self.components, **stand_ins}
        models = {name: part for name, part in seen.items() if isinstance(part, torch.nn.Module)}
        return {
            name: overridden(part, forward=_within(course, part.forward, course.around(name, part.forward)))
            for name, part in models.items()
        }

    def boundary_latents(self, task: TaskInputs, latents: torch.Tensor) -> torch.Tensor:
        """A step's latents (from `Step`, while the task runs) in the form in which they cross to decode: the blocks
        that follow the loop are run on them, on a copy of the task's state."""
        live = self._running[id(task)]
        state = PipelineState(dict(live.triptych_state.values), dict(live.triptych_state.kwargs_mapping))
        state.set("latents", latents)
        with modular.quiet(), torch.no_grad():
            for block in _after_loop(live.blocks_of_stage, state):
                block(live, state)
        return state.values["latents"]

    def _view(self, task: TaskInputs, stand_ins: Mapping[str, Any]) -> Any:
        """The pipeline as one task sees it."""
        if self._pipe is None:
            raise RuntimeError(f"stage {self.stage.name} has not been loaded")
        view: Any = copy.copy(self._pipe)
        view.blocks_of_stage = self._pipe._blocks
        view.triptych_marked = {}
        with modular.quiet():
            parts = self._pipe.components
            schedulers = {name: part for name, part in parts.items() if isinstance(part, SchedulerMixin)}
            own = own_copies(schedulers.values(), task.shift, task.generator)
            for name, (_, scheduler) in zip(schedulers, own, strict=True):
                setattr(view, name, scheduler)
            for name, component in parts.items():
                if isinstance(component, BaseGuidance):
                    setattr(view, name, self._guider(name, component, task))
        for name, stand_in in stand_ins.items():
            setattr(view, name, stand_in)
        return view

    def _guider(self, name: str, default: BaseGuidance, task: TaskInputs) -> Any:
        """The task's own guider. A second expert's takes `guidance_scale_2`, else the first's scale."""
        options = dict(self._family.guider)
        number = name.removeprefix("guider")
        scale = task.fields.get(f"guidance_scale{number}") if number else None
        scale = task.guidance_scale if scale is None else scale
        if scale is None:
            return default.new(**options)
        # The standard pipelines switch guidance off there, whatever the formula gives.
        return default.new(guidance_scale=float(scale), enabled=scale > self._family.unguided, **options)

    def _state(self, task: TaskInputs) -> PipelineState:
        """The pipeline state that the unsplit pipeline would have reached here."""
        state = PipelineState()
        given = {**self._fields(task), "generator": task.generator, "output_type": "pt"}
        values = {name: self._arrived(value) for name, value in task.values.items() if name != GENERATOR_STATE}
        for port in self.stage.inputs:
            if port.type_hint == "dtype" and isinstance(values.get(port.name), str):
                values[port.name] = getattr(torch, values[port.name].removeprefix("torch."))
        for item in self._inputs:
            if item.name is None:
                continue
            value = values.get(item.name, given.get(item.name))
            state.set(item.name, item.default if value is None else value, item.kwargs_type)
        for name, value in values.items():
            state.values[name] = value
        for tag, names in task.tags.items():
            for name in names:
                if name in values and name not in state.kwargs_mapping.get(tag, ()):
                    state.set(name, values[name], tag)
        return state

    def _explain(self, error: ValueError) -> None:
        """Names the input that a block misses. Which inputs are required depends on the branches that are taken, so
        only the blocks know, when they run."""
        missing = MISSING.fullmatch(str(error))
        if missing is None:
            return
        name = missing[1]
        if any(port.name == name for port in self.stage.inputs):
            raise WrongPayload(f"stage {self.stage.name} needs {name}, which did not arrive") from error
        raise InvalidRequest.of(name, None, "a value (this model needs it)") from error

    def _fields(self, task: TaskInputs) -> dict[str, Any]:
        # Copies: some text blocks write their template into the list of prompts that they are given.
        fields = {name: list(item) if isinstance(item, list) else item for name, item in task.fields.items()}
        if task.guidance_scale is not None:
            fields.setdefault("guidance_scale", task.guidance_scale)
        prompt, negative = fields.get("prompt"), fields.get("negative_prompt")
        if self._family.negative_per_prompt and isinstance(prompt, list) and not isinstance(negative, list):
            fields["negative_prompt"] = [negative or self._family.empty_negative] * len(prompt)
        return repeated(fields) if self._family.outputs_as_prompts else fields

    def _arrived(self, value: Any) -> Any:
        """A value on this stage's device; in denoise also in its dtype, which blocks take from prompt_embeds."""
        if isinstance(value, (list, tuple)):
            return type(value)(self._arrived(item) for item in value)
        if not isinstance(value, torch.Tensor):
            return value
        cast = self.stage.name == "denoise" and value.is_floating_point()
        return value.to(self._device, self._dtype if cast else None)

    def _outputs(
        self, task: TaskInputs, state: PipelineState, before: torch.Tensor, marked: dict[str, Any]
    ) -> TaskOutputs:
        """What the topology says crosses, without what the next stage has from the request anyway."""
        values: dict[str, Any] = {}
        for port in self.stage.outputs:
            value = state.get(port.name)
            if value is not None and value is not task.fields.get(port.name):
                values[port.name] = crossing(port.name, value)
        after = task.generator.get_state()
        if any(port.name == GENERATOR_STATE for port in self.stage.outputs) and not torch.equal(before, after):
            values[GENERATOR_STATE] = after
        if self._marks:
            values[CROSSED] = marked
        wanted = {port.tag for port in self.stage.outputs} - {None}
        tags = {
            tag: [name for name in dict.fromkeys(names) if name in values]
            for tag, names in state.kwargs_mapping.items()
            if tag in wanted
        }
        return TaskOutputs(values, {tag: names for tag, names in tags.items() if names})


class _Anchor(torch.nn.Module):
    """A module without weights that says where and in what the stage computes."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.device = device
        self.dtype = dtype


class _Watch:
    """One task's eye on its loop: remembers the latents before a step, tells of the step after it, and has what the
    loop carries kept and put back in between."""

    def __init__(self, on_step: Callable[[Step], None] | None, view: Any, course: Course | None) -> None:
        self.on_step = on_step
        self.scheduler = getattr(view, "scheduler", None)
        self.latents: torch.Tensor | None = None
        self.done = 0
        self._course = course
        self._parts = _mutable(view) if course is not None else {}

    def before(self, state: Any, place: Mapping[str, Any]) -> None:
        """A step is about to begin; `place` is what the loop tells its blocks of it."""
        if self._course is not None:
            self._between(self._course, state, place)
        self.latents = getattr(state, "latents", None)

    def _between(self, course: Course, state: Any, place: Mapping[str, Any]) -> None:
        parts = {_STATE: state, **self._parts}
        if place.get("i") != self.done:
            course.refuse()  # a second loop, or a loop of loops: what the first one came to is not in its state
        elif not self.done:
            course.begin(parts)
        else:
            course.between(self.done, self._total(state), parts, known_only=_STATE)

    def after(self, state: Any, place: Mapping[str, Any]) -> None:
        """A step has ended. What `on_step` raises ends the task."""
        index, self.done = self.done, self.done + 1
        if self.on_step is None or (self._course is not None and self._course.replaying):
            return
        latents = getattr(state, "latents", None)
        estimate = functools.partial(denoised, self.scheduler, self.latents, latents)
        self.on_step(Step(index, self._total(state), latents, estimate))

    def _total(self, state: Any) -> int:
        timesteps = getattr(state, "timesteps", None)
        total = len(timesteps) if timesteps is not None else getattr(state, "num_inference_steps", self.done)
        return max(total, self.done)


_STATE = "state"
"""The loop's own state among what it carries."""


def _mutable(view: Any) -> dict[str, Any]:
    """The parts of a task's pipeline that change as it runs: its own schedulers and guiders."""
    parts = {name: getattr(view, name, None) for name in view._component_specs}
    return {name: part for name, part in parts.items() if isinstance(part, SchedulerMixin | BaseGuidance)}


def _within(course: Course, outside: Callable[..., Any], inside: Callable[..., Any]) -> Callable[..., Any]:
    """`inside` once the loop has begun, before that `outside`: what it needs is computed again."""
    return lambda *args, **kwargs: (inside if course.begun and course.wanted else outside)(*args, **kwargs)


class _Leaf(ModularPipelineBlocks):
    """A block of our own in diffusers' loop: tells the task's watch where the loop is; it takes and gives nothing."""

    model_name = None

    def __init__(self, tell: Callable[[_Watch, Any, Mapping[str, Any]], None]) -> None:
        super().__init__()
        self._tell = tell

    @torch.no_grad()
    def __call__(self, components: Any, state: Any, **place: Any) -> tuple[Any, Any]:
        if (watch := components.triptych_watch) is not None:
            self._tell(watch, state, place)
        return components, state


class _Mark(ModularPipelineBlocks):
    """Keeps what a stage would hand over, before a later block writes under the same name."""

    model_name = None

    def __init__(self, stage: StageTopology) -> None:
        super().__init__()
        self.stage = stage

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        values = {port.name: state.get(port.name) for port in self.stage.outputs}
        kept = {name: crossing(name, value) for name, value in values.items() if value is not None}
        components.triptych_marked[self.stage.name] = change_tensors(kept, torch.clone)
        return components, state


def denoised(scheduler: Any, before: torch.Tensor | None, after: torch.Tensor | None) -> torch.Tensor | None:
    """The clean latents that a step pointed at: on a flow's straight line x = (1 - sigma)·x0 + sigma·noise, two
    points give x0. None where the scheduler is no flow, or the sigmas or latents are not there."""
    index, sigmas = getattr(scheduler, "step_index", None), getattr(scheduler, "sigmas", None)
    if before is None or after is None or not index or sigmas is None or not is_flow(scheduler):
        return None
    if before.shape != after.shape or index >= len(sigmas):
        return None
    sigma, following = float(sigmas[index - 1]), float(sigmas[index])
    if following == sigma:
        return None
    return after - following * (after - before) / (following - sigma)


def with_token_types(encoder: Any) -> Any:
    """The text encoder with `mm_token_type_ids` computed from its input ids (1 where an image token is, 2 a video
    token) when a caller passes pictures without it. A shallow copy: the weights are shared, the class is its own."""
    mended = copy.copy(encoder)
    forward = encoder.forward
    config = encoder.config

    @functools.wraps(forward)
    def with_types(*args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids")
        if ids is not None and kwargs.get("mm_token_type_ids") is None and kwargs.get("pixel_values") is not None:
            images, videos = ids == config.image_token_id, ids == config.video_token_id
            kwargs["mm_token_type_ids"] = images.int() + 2 * videos.int()
        return forward(*args, **kwargs)

    # A Module refuses plain attributes of a Module's name only; a function lands in its __dict__ and shadows the class.
    mended.__dict__ = {**encoder.__dict__, "forward": with_types}
    assert inspect.signature(mended.forward) == inspect.signature(forward)
    return mended


def repeated(fields: dict[str, Any]) -> dict[str, Any]:
    """Asks for one output of each prompt, repeated, instead of several of each."""
    count = next((fields.pop(name) for name in OUTPUT_COUNTS if name in fields), 1)
    for name in ("prompt", "negative_prompt"):
        if count > 1 and (texts := fields.get(name)) is not None:
            texts = texts if isinstance(texts, list) else [texts]
            fields[name] = [text for text in texts for _ in range(count)]
    return fields


def crossing(name: str, value: Any) -> Any:
    """The value, if it may cross: tensors, JSON values, and lists of them. Raises Unsupported otherwise."""
    if value is None or isinstance(value, (torch.Tensor, str, bool, int, float)):
        return value
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [crossing(name, item) for item in value]
    if isinstance(value, dict):
        return {str(key): crossing(name, item) for key, item in value.items()}
    raise Unsupported(f"{name} is a {type(value).__name__}, which cannot cross between stages")


def _after_loop(block: ModularPipelineBlocks, state: PipelineState) -> Iterator[Any]:
    """The blocks that run after the loop, given what the conditions saw; none where there is no loop."""
    if isinstance(block, LoopSequentialPipelineBlocks):
        return
    if isinstance(block, ConditionalPipelineBlocks):
        triggers = {name: state.get(name) for name in block.block_trigger_inputs if name is not None}
        chosen = block.select_block(**triggers) or block.default_block_name
        if chosen is not None:
            yield from _after_loop(block.sub_blocks[chosen], state)
        return
    after = False
    for part in block.sub_blocks.values():
        if after:
            yield part
        elif next(modular.loops_of(part), None) is not None:
            after = True
            yield from _after_loop(part, state)

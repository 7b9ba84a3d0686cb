"""A standard pipeline in stages, by replay: every stage runs the pipeline's own call.

encode runs it up to the first call of the denoiser and keeps what its encoding methods returned. denoise runs it again
from the start with these methods answering from what crossed, up to the VAE's decode. decode runs it once more with
zeros of the recorded shapes in place of all that, and gives the VAE the latents that crossed. The generator starts
each stage from the same seed and draws the same numbers, so the result is the unsplit pipeline's, bit for bit, with no
code per family.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch

from triptych.errors import Unsupported, WrongPayload
from triptych.model.anatomy import anatomy
from triptych.model.contract import Step, TaskInputs, TaskOutputs
from triptych.model.course import Course
from triptych.model.declared import DENOISERS
from triptych.model.husk import husk
from triptych.model.index import read_index
from triptych.model.load import Components, Placement
from triptych.model.pipeline import (
    Loop,
    arguments,
    assemble,
    own_guiders,
    own_schedulers,
    pictures,
    pipeline_class,
    steered,
    view,
)
from triptych.model.replay import (
    Blanks,
    Player,
    Recorder,
    blank,
    change_tensors,
    overridden,
    pack,
    skeleton,
    unpack,
)
from triptych.model.rounds import why_not_resumable
from triptych.model.standard_topology import LATENTS, MEDIA, SKELETON, VAE_ENCODE, is_media, standard_topology
from triptych.model.topology import StageTopology, Topology

__all__ = ["StandardProgram", "standard_topology"]

_DENOISER = "denoiser"


class _Stop(BaseException):
    """The stage's share of the call is done. No Exception, so that no pipeline can take it for a failure."""


class _Decoding(_Stop):
    """The pipeline has come to the VAE's decode with these latents."""

    def __init__(self, latents: torch.Tensor) -> None:
        super().__init__("decode")
        self.latents = latents


class StandardProgram:
    """One stage of a standard pipeline. Holds its pipeline, with this stage's components loaded and the others' on the
    meta device, and nothing of any task."""

    def __init__(self, topology: Topology, stage: StageTopology) -> None:
        self.topology = topology
        self.stage = stage
        self.components: Mapping[str, Any] = {}
        self._pipe: Any = None
        self._device = torch.device("cpu")
        self._carries = False
        self._denoisers = tuple(name for name in topology.stage("denoise").loads if name != "scheduler")

    def load(self, components: Components, placement: Placement) -> None:
        """Loads what the stage runs, and the configurations of what it only reads. Raises LoadError."""
        infos, kind = self.topology.components, pipeline_class(self.topology.pipeline_class)
        code = anatomy(kind)
        loaded = {name: components.get(infos[name], placement) for name in self.stage.loads}
        husks = {name: husk(components, infos[name], placement, code.beside(name)) for name in self.stage.reads}
        self._pipe = assemble(read_index(self.topology.source).settings, kind, loaded | husks)
        self._device = placement.device
        self._carries = why_not_resumable(kind) is None
        self.components = loaded

    def run(
        self,
        task: TaskInputs,
        stand_ins: Mapping[str, Any],
        on_step: Callable[[Step], None] | None = None,
    ) -> TaskOutputs:
        """Runs this stage's share for one task. See StageProgram.run; raises WrongPayload for values that encode or
        denoise cannot have made, Unsupported where the pipeline does not stop where its code let expect."""
        if self.stage.name == "encode":
            return TaskOutputs(self._encode(task, stand_ins))
        if self.stage.name == "denoise":
            return TaskOutputs(self._denoise(task, stand_ins, on_step))
        return TaskOutputs(self._decode(task, stand_ins))

    def boundary_latents(self, task: TaskInputs, latents: torch.Tensor) -> torch.Tensor:
        """The argument that the pipeline would give to the VAE's decode if a step's latents were the last ones. Only
        within a run of denoise on this task (it needs the shapes seen so far)."""
        fields = {**self._restored(task)}
        if not fields.keys() & {"strength", "sigmas", "timesteps", "denoising_end"}:
            fields["num_inference_steps"] = 1
        own = _Own(self, copy.copy(task), {}, fields)
        own.task.generator = torch.Generator(task.generator.device).manual_seed(0)
        own.answer(Player(self._recorded(task)))
        own.answer_modules(Blanks(task.values[_DENOISER], self._device), self._denoisers)
        own.method("vae", "decode", _reached_decode)
        return self._until_decode(own, lambda scheduler: _give(scheduler, latents))

    def _encode(self, task: TaskInputs, stand_ins: Mapping[str, Any]) -> dict[str, Any]:
        own, recorder = _Own(self, task, stand_ins, task.fields), Recorder()
        own.answer(recorder)
        for name in self._denoisers:
            own.method(name, "forward", _reached_denoiser)
        try:
            own.call(None)
        except _Stop:
            media = {name: pack(value) for name, value in task.fields.items() if is_media(name) and value is not None}
            return {**recorder.calls, **({MEDIA: media} if media else {})}
        raise self._never("the denoiser")

    def _denoise(
        self, task: TaskInputs, stand_ins: Mapping[str, Any], on_step: Callable[[Step], None] | None
    ) -> dict[str, Any]:
        own = _Own(self, task, stand_ins, self._restored(task))
        course = Course(task, self.topology.pipeline_class, self._device, self._carries, shapes_cross=True)
        recorded = self._recorded(task)
        own.answer(Player(recorded))
        own.steer(course, self._denoisers)
        own.method("vae", "decode", _reached_decode)
        # Kept with the task, since a program holds nothing of any: previews need the shapes seen so far.
        task.values = {**task.values, _DENOISER: course.calls}
        with course.going():
            latents = self._until_decode(own, on_step=on_step)
        media = task.values.get(MEDIA, {})
        bones = {
            "encode": skeleton(recorded),
            MEDIA: skeleton(media),
            _DENOISER: course.calls,
        }
        passed = {MEDIA: media} if media and self._passes_media() else {}
        return {LATENTS: latents, SKELETON: bones, **passed}

    def _until_decode(
        self,
        own: _Own,
        change: Callable[[Any], None] | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> torch.Tensor:
        try:
            own.call(on_step, change)
        except _Decoding as end:
            return end.latents
        raise self._never("the VAE's decode")

    def _decode(self, task: TaskInputs, stand_ins: Mapping[str, Any]) -> dict[str, Any]:
        if SKELETON not in task.values:
            return self._decode_alone(task, stand_ins)
        bones = task.values[SKELETON]
        if not (isinstance(bones, dict) and {"encode", MEDIA, _DENOISER} <= bones.keys()):
            raise WrongPayload("decode needs the shapes that encode and denoise recorded", field=SKELETON)
        media = task.values.get(MEDIA) or blank(bones[MEDIA], self._device)
        own = _Own(self, task, stand_ins, {**{name: unpack(value) for name, value in media.items()}, **task.fields})
        own.answer(Player(blank(bones["encode"], self._device)))
        own.answer_modules(Blanks(bones[_DENOISER], self._device), self._denoisers)
        own.method("vae", "decode", _decode_instead(own.component("vae").decode, self._latents(task)))
        made = pictures(own.call(None), self.topology.makes)
        return {"videos" if self.topology.makes == "video" else "images": made}

    def _decode_alone(self, task: TaskInputs, stand_ins: Mapping[str, Any]) -> dict[str, Any]:
        """Latents without the rest of a job: the VAE alone, and its range of -1…1 brought to 0…1."""
        vae = {**self.components, **stand_ins}["vae"]
        made = (vae.decode(self._latents(task).to(vae.dtype), return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
        if self.topology.makes == "video":
            return {"videos": made.transpose(1, 2)}
        return {"images": made}

    def _latents(self, task: TaskInputs) -> torch.Tensor:
        latents = task.values.get(LATENTS)
        if not isinstance(latents, torch.Tensor):
            raise WrongPayload("decode needs a tensor", field=LATENTS)
        return self._own_copy(latents)

    def _recorded(self, task: TaskInputs) -> dict[str, Any]:
        """What encode recorded, on this stage's device."""
        names = [port.name for port in self.stage.inputs if port.name != MEDIA and port.name in task.values]
        return {name: change_tensors(task.values[name], self._own_copy) for name in names}

    def _own_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy for the task: inputs belong to the stage that made them, and lie where results can differ in the last
        bit (CPU kernels choose by a tensor's alignment)."""
        return tensor.to(self._device, copy=True)

    def _restored(self, task: TaskInputs) -> dict[str, Any]:
        """The task's fields with the pictures that encode was given."""
        return {**{name: unpack(value) for name, value in task.values.get(MEDIA, {}).items()}, **task.fields}

    def _passes_media(self) -> bool:
        return any(port.name == MEDIA for port in self.stage.outputs)

    def _never(self, what: str) -> Unsupported:
        return Unsupported(f"{self.topology.pipeline_class} ended without calling {what}: it cannot be split")


class _Own:
    """One task's own view of the pipeline: its schedulers, and copies of the modules whose methods are replaced."""

    def __init__(
        self, program: StandardProgram, task: TaskInputs, stand_ins: Mapping[str, Any], fields: Mapping[str, Any]
    ) -> None:
        self.program, self.task, self._fields = program, task, dict(fields)
        self.view: Any = None
        self.loop = Loop()
        self._pipe = program._pipe
        self._own = {**self._pipe.components, **stand_ins}
        self._methods: dict[str, Callable[..., Any]] = {}

    def component(self, name: str) -> Any:
        """The component as this task sees it."""
        return self._own[name]

    def method(self, name: str, method: str, replacement: Callable[..., Any]) -> None:
        """Replaces a method of one model. Absent ones are left absent."""
        if isinstance(self._own.get(name), torch.nn.Module):
            self._own[name] = overridden(self._own[name], **{method: replacement})

    def answer(self, calls: Recorder | Player) -> None:
        """Puts `calls` around everything whose values cross from encode."""
        for port in self.program.topology.stage("encode").outputs:
            if port.name == VAE_ENCODE:
                self.method("vae", "encode", calls.around(port.name, self._own["vae"].encode))
            elif port.name in self._own:
                if self._own[port.name] is not None:
                    self.method(port.name, "forward", calls.around(port.name, self._own[port.name].forward))
            elif port.name != MEDIA and hasattr(self._pipe, port.name):
                self._methods[port.name] = self._pipe_method(calls, port.name)

    def _pipe_method(self, calls: Recorder | Player, name: str) -> Callable[..., Any]:
        # Bound late: the pipeline's view, which the method belongs to, exists only once everything is replaced.
        kind = type(self._pipe)
        return calls.around(name, lambda *args, **kwargs: getattr(kind, name)(self.view, *args, **kwargs))

    def steer(self, course: Course, names: tuple[str, ...]) -> None:
        """Notes what these components return, and leaves the calls that make the loop's steps to `course`."""
        self.loop.course = course
        for name in names:
            if isinstance(self._own.get(name), torch.nn.Module):
                real = self._own[name].forward
                step = name.startswith(DENOISERS)
                self.method(
                    name, "forward", steered(self.loop, course, name, real) if step else course.note(name, real)
                )

    def answer_modules(self, calls: Blanks, names: tuple[str, ...]) -> None:
        """Puts `calls` around the forward of these components."""
        for name in names:
            if isinstance(self._own.get(name), torch.nn.Module):
                self.method(name, "forward", calls.around(name, self._own[name].forward))

    def call(self, on_step: Callable[[Step], None] | None, change: Callable[[Any], None] | None = None) -> Any:
        """Calls the pipeline. `change` is given each of the task's schedulers."""
        self.loop.on_step = on_step
        schedulers = own_schedulers(self._pipe, self.task.shift, self.loop, self.task.generator)
        if change is not None:
            for _, scheduler in schedulers:
                change(scheduler)
        real = self._pipe.components
        swaps = [(old, self._own[name]) for name, old in real.items() if self._own[name] is not old]
        self.view = self.loop.pipe = view(self._pipe, [*swaps, *schedulers, *own_guiders(self._pipe, self.loop)])
        vars(self.view).update(self._methods)
        return self.view(**arguments(self.program.topology, self._pipe, self.task, self._fields))


def _reached_denoiser(*_: Any, **__: Any) -> NoReturn:
    raise _Stop("denoiser")


def _reached_decode(*args: Any, **kwargs: Any) -> NoReturn:
    raise _Decoding(_taken_apart(args, kwargs)[0])


def _decode_instead(real: Callable[..., Any], latents: torch.Tensor) -> Callable[..., Any]:
    """A decode that decodes `latents` in place of what it is given, once."""
    left = [latents]

    def decode(*args: Any, **kwargs: Any) -> Any:
        if not left:
            raise Unsupported("this pipeline decodes more than once: it cannot be split")
        given, rest, named = _taken_apart(args, kwargs)
        own = left.pop()
        if own.shape != given.shape:
            raise WrongPayload(f"{tuple(own.shape)} came, decode takes {tuple(given.shape)}", field=LATENTS)
        return real(own.to(given.dtype), *rest, **named)

    return decode


def _taken_apart(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A call of decode as its latents, which come first (named or not), and the rest."""
    if args:
        return args[0], args[1:], dict(kwargs)
    (_, latents), *named = kwargs.items()
    return latents, (), dict(named)


def _give(scheduler: Any, latents: torch.Tensor) -> None:
    """Makes every step of a task's own scheduler return `latents`."""

    def step(*_: Any, return_dict: bool = True, **__: Any) -> Any:
        return unpack({"record": {"prev_sample": latents}}) if return_dict else (latents,)

    scheduler.step = step

"""A standard diffusers pipeline, put together from components one by one, and a task's own view of it."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.guiders.guider_utils import BaseGuidance
from PIL import Image

from triptych.errors import InvalidRequest, Unsupported, WrongPayload
from triptych.model.contract import Step, TaskInputs
from triptych.model.course import CHECKPOINT, Course
from triptych.model.replay import change_tensors, pack, skeleton, unpack
from triptych.model.schedulers import SeededStep, is_flow, own_copies
from triptych.model.topology import Topology


def pipeline_class(name: str) -> type[DiffusionPipeline]:
    """The installed pipeline class of that name. Raises Unsupported."""
    import diffusers

    found = getattr(diffusers, name, None)
    if isinstance(found, type) and issubclass(found, DiffusionPipeline):
        return found
    raise Unsupported(f"diffusers {diffusers.__version__} has no pipeline class {name}")


def assemble(index: Mapping[str, Any], kind: type[DiffusionPipeline], components: Mapping[str, Any]) -> Any:
    """The pipeline of these components and of the plain settings in its model_index.json (`index`). Components that
    its constructor wants and that are not given are None."""
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name in components:
            arguments[name] = components[name]
        elif name in index and not isinstance(index[name], list):
            arguments[name] = index[name]
        elif parameter.default is parameter.empty or isinstance(index.get(name), list):
            arguments[name] = None
    pipe = kind(**arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def view(pipe: Any, swaps: Sequence[tuple[Any, Any]]) -> Any:
    """A shallow copy of the pipeline for one task, with some components replaced by the task's own, also in the
    pipelines inside it (combined pipelines hold several)."""
    double = copy.copy(pipe)
    replaced = {id(old): new for old, new in swaps}
    for name, value in vars(pipe).items():
        if id(value) in replaced:
            vars(double)[name] = replaced[id(value)]
        elif isinstance(value, DiffusionPipeline):
            vars(double)[name] = view(value, swaps)
    return double


@dataclass
class Loop:
    """What is known of a task's denoising loop: the pipeline it runs in, the steps done, and the parts that change on
    the way, by name."""

    pipe: Any = None
    on_step: Callable[[Step], None] | None = None
    course: Course | None = None
    done: int = 0
    parts: dict[str, Any] = field(default_factory=dict)
    _seen: int = 0

    def total(self, scheduler: Any) -> int:
        """The number of steps, as the pipeline counts them where it does."""
        return max(getattr(self.pipe, "_num_timesteps", None) or len(scheduler.timesteps), self.done)

    def arrive(self) -> None:
        """The pipeline is about to call the denoiser: if a step lies behind it, it is between two steps."""
        course = self.course
        if course is None or not course.wanted:
            return
        if not course.begun:
            course.begin(self.parts)
        elif self.done > self._seen:
            scheduler = next(part for part in self.parts.values() if hasattr(part, "timesteps"))
            course.between(self.done, self.total(scheduler), self.parts)
        self._seen = self.done

    def returned(self, name: str, result: Any) -> Any:
        """What the scheduler of that name returns from a step: the result, or what a checkpoint kept in its place.
        Raises WrongPayload if that has other shapes."""
        course = self.course
        if course is None or not course.wanted:
            return result
        try:
            packed = change_tensors(pack(result), torch.clone)
        except Unsupported:  # no data, so nothing that could be kept
            course.refuse()
            return result
        count = course.results.get(name, [0])[0] + 1
        kept = course.result(name, count)
        if kept is not None:
            if skeleton(kept) != skeleton(packed):
                raise WrongPayload("other shapes than this task's", field=f"{CHECKPOINT}.results.{name}")
            device = _device_of(packed)
            packed = change_tensors(kept, lambda tensor: tensor.to(device, copy=True))
            result = unpack(change_tensors(packed, torch.clone))
        course.results[name] = [count, packed]
        return result

    def stepped(self, scheduler: Any, result: Any, estimate: Callable[[], torch.Tensor | None]) -> None:
        """A step has ended; it is told of, unless it is one of a replay."""
        index, self.done = self.done, self.done + 1
        if self.on_step is not None and not (self.course is not None and self.course.replaying):
            self.on_step(Step(index, self.total(scheduler), _latents(result), estimate))


class WatchedStep:
    """A scheduler's `step`, told of after each call. Some pipelines copy their scheduler for a second modality: the
    copy's steps are kept for checkpoints too, but not told of."""

    def __init__(self, scheduler: Any, loop: Loop, name: str, real: Any = None) -> None:
        self._scheduler, self._loop, self._name = scheduler, loop, name
        self._told = real is None
        self._real = scheduler.step if real is None else real
        self._copies = 0
        loop.parts[name] = scheduler
        functools.update_wrapper(self, self._real, updated=())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        scheduler = memo.get(id(self._scheduler), self._scheduler)
        if isinstance(self._real, SeededStep):
            real: Any = copy.deepcopy(self._real, memo)
        else:
            real = types.MethodType(type(scheduler).step, scheduler)
        self._copies += 1
        return WatchedStep(scheduler, self._loop, f"{self._name} {self._copies}", real)

    def __call__(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        sigma = _sigma(self._scheduler, timestep)
        result = self._real(model_output, timestep, sample, *args, **kwargs)
        result = self._loop.returned(self._name, result)
        if self._told:
            estimate = functools.partial(_denoised, self._scheduler, result, model_output, sample, sigma)
            self._loop.stepped(self._scheduler, result, estimate)
        return result


def _device_of(packed: Any) -> torch.device | None:
    """The device of the first tensor in a scheduler's packed result."""
    devices: list[torch.device] = []
    change_tensors(packed, lambda tensor: devices.append(tensor.device))
    return devices[0] if devices else None


def _latents(result: Any) -> torch.Tensor | None:
    latents = result[0] if isinstance(result, tuple) else getattr(result, "prev_sample", None)
    return latents if isinstance(latents, torch.Tensor) else None


def _sigma(scheduler: Any, timestep: Any) -> float | None:
    """The noise level that a step starts from, None where the scheduler has none. Read before the step: it moves on."""
    sigmas, index = getattr(scheduler, "sigmas", None), getattr(scheduler, "step_index", None)
    if sigmas is None:
        return None
    if index is None:
        index = getattr(scheduler, "begin_index", None)
    if index is None:
        index = scheduler.index_for_timestep(timestep) if hasattr(scheduler, "index_for_timestep") else 0
    return float(sigmas[min(index, len(sigmas) - 1)])


def _denoised(scheduler: Any, result: Any, output: Any, sample: Any, sigma: float | None) -> torch.Tensor | None:
    """The estimate of the final latents that the step was taken with, None where the scheduler gives no way to it."""
    estimate = getattr(result, "pred_original_sample", None)
    if estimate is None and isinstance(result, tuple) and len(result) > 1:
        estimate = result[1]
    if isinstance(estimate, torch.Tensor) and estimate.shape == sample.shape:
        return estimate
    if sigma is None or not is_flow(scheduler):
        return None
    return sample - sigma * output if output.shape == sample.shape else None


def own_schedulers(
    pipe: Any, shift: float | None, loop: Loop, generator: torch.Generator | None = None
) -> list[tuple[Any, Any]]:
    """A task's own copies of the pipeline's schedulers (see `own_copies`), as swaps for `view`, their steps told to
    `loop`. Raises InvalidRequest if `shift` is given and no scheduler knows one.
    """
    known = {name: part for name, part in pipe.components.items() if hasattr(part, "set_timesteps")}
    if shift is not None and not known:
        raise InvalidRequest.of("shift", shift, "nothing (this model has no scheduler)")
    pairs = own_copies(known.values(), shift, generator)
    for name, (_, scheduler) in zip(known, pairs, strict=True):
        scheduler.step = WatchedStep(scheduler, loop, name)
    return pairs


def own_guiders(pipe: Any, loop: Loop) -> list[tuple[Any, Any]]:
    """A task's own copies of the pipeline's guiders, which remember the step that they are at, as swaps for `view`."""
    guiders = {name: part for name, part in pipe.components.items() if isinstance(part, BaseGuidance)}
    loop.parts |= {name: copy.deepcopy(part) for name, part in guiders.items()}
    return [(part, loop.parts[name]) for name, part in guiders.items()]


def steered(loop: Loop, course: Course, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    """A denoiser's forward whose calls move the task's loop on and are answered as `course` says."""
    answer = course.around(name, real)

    @functools.wraps(real)
    def forward(*args: Any, **kwargs: Any) -> Any:
        loop.arrive()
        return answer(*args, **kwargs)

    return forward


def arguments(topology: Topology, pipe: Any, task: TaskInputs, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What to call the pipeline with. Raises InvalidRequest for a field that it does not take."""
    taken = inspect.signature(pipe.__call__).parameters
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    given = {name: value for name, value in given.items() if value is not None}
    unknown = [name for name in given if name not in taken]
    if unknown:
        raise InvalidRequest.of(unknown[0], given[unknown[0]], f"nothing ({topology.pipeline_class} has no such input)")
    scale = guidance_field(topology.guidance, taken)
    if task.guidance_scale is not None and scale is not None:
        given.pop("guidance_scale", None)
        given[scale] = task.guidance_scale
    if scale == "true_cfg_scale" and given.get(scale, taken[scale].default) > 1:
        # Without a negative prompt these pipelines leave the guidance out and only log it.
        given.setdefault("negative_prompt", _empty_like(given.get("prompt")))
    ours = {"generator": task.generator, "output_type": "pt", "return_dict": False}
    return given | {name: value for name, value in ours.items() if name in taken}


def _empty_like(prompt: Any) -> str | list[str]:
    return [""] * len(prompt) if isinstance(prompt, list) else ""


def guidance_field(guidance: str, taken: Iterable[str]) -> str | None:
    """The argument that the request's guidance scale becomes, None if the pipeline takes none."""
    order = ("guidance_scale", "true_cfg_scale")
    return next((name for name in (reversed(order) if guidance == "classifier_free" else order) if name in taken), None)


def pictures(result: Any, makes: Literal["image", "video"]) -> torch.Tensor:
    """A pipeline's result as float in 0…1: images (batch, channels, height, width), videos (batch, frames, channels,
    height, width). Raises Unsupported for what is neither."""
    made = result[0] if isinstance(result, tuple | dict) else result
    if isinstance(made, torch.Tensor):
        tensor = made
    else:
        array = np.stack([_array(item) for item in made]) if isinstance(made, list) else np.asarray(made)
        tensor = torch.from_numpy(np.ascontiguousarray(array)).movedim(-1, -3)
    if tensor.dtype == torch.uint8:
        tensor = tensor.float() / 255
    wanted = 5 if makes == "video" else 4
    if tensor.ndim != wanted or not tensor.is_floating_point():
        raise Unsupported(f"the pipeline made no {makes} but {tensor.dtype} of shape {tuple(tensor.shape)}")
    return tensor


def _array(item: Any) -> np.ndarray:
    """Channels last, from a picture, a list of frames, or an array."""
    if isinstance(item, list):
        return np.stack([_array(frame) for frame in item])
    if isinstance(item, Image.Image):
        return np.array(item.convert("RGB"))
    if isinstance(item, torch.Tensor):
        return item.movedim(-3, -1).float().cpu().numpy()
    return np.asarray(item)

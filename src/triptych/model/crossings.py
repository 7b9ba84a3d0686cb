"""What would cross between a model's stages at a size, learned by running the stages' code without weights.

Pipeline code runs for real (tokenizers, masks, latent preparation), and every model answers with zeros of the shapes
that its configuration gives on the meta device. So no weights are read and nothing heavy is computed.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL import Image

from triptych.model.contract import TaskInputs
from triptych.model.declared import DENOISERS
from triptych.model.door import inputs_of, resolve
from triptych.model.load import Components, Placement, meta_component, quiet
from triptych.model.programs import program
from triptych.model.topology import ComponentInfo, StageTopology, Topology
from triptych.model.trust import NO_TRUST, Trust
from triptych.request import Request

__all__ = ["SAMPLE_PROMPT", "BoundaryTensor", "boundary"]

SAMPLE_PROMPT = "a red apple on a wooden table left of a small green bottle, warm evening light, high detail"
"""The prompt that sizes are told for: some encoders' outputs are as long as the prompt."""

STEPS = 2
ENTRY_POINTS = ("forward", "encode", "decode")
EAGER_LIMIT = 1 << 24
"""Elements up to which zeros get memory of their own; larger ones are one zero, expanded."""

NEEDING_NUMBERS = ("attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids")
"""Inputs of text encoders whose numbers steer the code. What comes out has the same shape without them."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BoundaryTensor:
    """A tensor that crosses; `name` is dotted where it lies in a list or dict. `dtype` is torch's name for it on an
    accelerator (as on disk). None means unknown."""

    name: str
    dtype: str | None
    shape: tuple[int, ...] | None
    bytes: int | None


def boundary(
    topology: Topology,
    width: int | None = None,
    height: int | None = None,
    frames: int | None = None,
    request: Request | None = None,
    trust: Trust = NO_TRUST,
) -> dict[str, list[BoundaryTensor]]:
    """What each stage but the last hands on, by the stage's name, for `request`, or for one output of a prompt like
    SAMPLE_PROMPT at a size in pixels (None: the model's default). Empty for a model that runs unsplit.

    Raises InvalidRequest for what the model cannot make. Code that does not run without weights leaves the rest
    unknown, except the latents, which the topology tells.
    """
    found: dict[str, list[BoundaryTensor]] = {}
    if len(topology.stages) < 2:
        return found
    request = request or sample_request(topology, width, height, frames)
    resolved = resolve(topology, request)
    task = TaskInputs(
        dict(resolved.fields), resolved.guidance_scale, torch.Generator().manual_seed(0), shift=request.shift
    )
    for stage in topology.stages[:-1]:
        declared = {item.name for item in stage.request_inputs}
        try:
            with quiet(), torch.no_grad():
                part = copy.copy(task)
                part.fields = {name: value for name, value in task.fields.items() if name in declared}
                values, tags = _run(topology, stage, part, trust)
        except Exception as error:  # whatever a family's code does with tensors that hold nothing
            logger.info("%s of %s does not run without weights: %r", stage.name, topology.family, error)
            found.update(_guesses(topology, stage, resolved.request))
            break
        found[stage.name] = list(_tensors(values))
        task.values.update(values)
        task.tags.update(tags)
    return found


def sample_request(topology: Topology, width: int | None, height: int | None, frames: int | None) -> Request:
    """A request that this topology can serve, with a grey picture where it wants one."""
    inputs, defaults = inputs_of(topology), topology.defaults
    fields: dict[str, Any] = {"prompt": SAMPLE_PROMPT, "seed": 0}
    if "num_inference_steps" in inputs:
        fields["num_inference_steps"] = STEPS
    for name, asked in (("width", width), ("height", height), ("num_frames", frames)):
        fields[name] = asked or (getattr(defaults, name) if name in inputs else None)
    if "image" in inputs and not topology.workflow.startswith("text2"):
        size = (fields["width"] or 1024, fields["height"] or 1024)
        fields["images"] = (Image.new("RGB", size, (128, 128, 128)),)
        if topology.workflow == "inpaint":
            fields["mask"] = Image.new("L", size, 255)
    return Request.parse(**{name: value for name, value in fields.items() if value is not None})


def _run(
    topology: Topology, stage: StageTopology, task: TaskInputs, trust: Trust
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    runner = program(topology, stage.name)
    runner.load(_Weightless(topology.source, trust), Placement(torch.device("cpu")))
    stand_ins = {
        name: hollow(component)
        for name, component in runner.components.items()
        if isinstance(component, torch.nn.Module)
    }
    outputs = runner.run(task, stand_ins)
    return outputs.values, outputs.tags


class _Weightless(Components):
    """Components from their configurations, in the dtype that the files have."""

    def get(self, spec: ComponentInfo, placement: Placement) -> Any:
        """The component without weights."""
        component = meta_component(self.source, spec, self.trust)
        dtype = getattr(torch, spec.dtype or "", None)
        if isinstance(component, torch.nn.Module) and isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            component = component.to(dtype)
        return component


def hollow(module: torch.nn.Module) -> torch.nn.Module:
    """A shallow copy of a module on the meta device that takes and gives tensors on the CPU: its entry points give
    zeros of the shapes and dtypes that the module would give, and it says that it is on the CPU."""
    if hasattr(module, "set_attn_implementation"):
        # The others leave masks out when their numbers allow it, and here there are no numbers.
        cast(Any, module).set_attn_implementation("eager")
    double = copy.copy(module)
    dtype = next((tensor.dtype for tensor in module.parameters()), torch.float32)
    anchor = torch.nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    object.__setattr__(double, "_parameters", {"_anchor": anchor, **module._parameters})
    for name in ENTRY_POINTS:
        real = getattr(module, name, None)
        if callable(real):
            object.__setattr__(double, name, _answering(real))
    return double


def _answering(real: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(real)

    # Several pipelines filter arguments by the signature of forward: wraps keeps it.
    @functools.wraps(real)
    def answer(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*_changed(args, _to_meta), **_changed(kwargs, _to_meta))
        try:
            made = real(*bound.args, **bound.kwargs)
        except RuntimeError:
            for name in bound.arguments.keys() & set(NEEDING_NUMBERS):
                bound.arguments[name] = None
            if "kwargs" in bound.arguments:
                bound.arguments["kwargs"] = _without(bound.arguments["kwargs"], NEEDING_NUMBERS)
            made = real(*bound.args, **bound.kwargs)
        return _changed(made, _zeros)

    return answer


def _without(items: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: item for name, item in items.items() if name not in names}


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


def _zeros(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.numel() <= EAGER_LIMIT:
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def _changed(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The value with each tensor in it changed: in lists, dicts, model outputs and a distribution's attributes."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        changed = {name: _changed(item, change) for name, item in value.items()}
        return changed if type(value) is dict else type(value)(**changed)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_changed(item, change) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_changed(item, change) for item in value)
    if type(value).__name__.endswith("Distribution"):
        double = copy.copy(value)
        vars(double).update(_changed(dict(vars(value)), change))
        return double
    return value


def _tensors(value: Any, name: str = "") -> Iterator[BoundaryTensor]:
    if isinstance(value, torch.Tensor):
        size = value.numel() * value.element_size()
        yield BoundaryTensor(name, str(value.dtype).removeprefix("torch."), tuple(value.shape), size)
        return
    items = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    )
    for key, item in items:
        yield from _tensors(item, f"{name}.{key}" if name else str(key))


def _guesses(topology: Topology, stage: StageTopology, request: Request) -> dict[str, list[BoundaryTensor]]:
    """From that stage on: names as declared, and the latents' shape as the topology has it."""
    rest = topology.stages[topology.stages.index(stage) : -1]
    known = _latents(topology, request)
    return {
        each.name: [
            known
            if known and port.name == known.name and each.name == "denoise"
            else BoundaryTensor(port.name, None, None, None)
            for port in each.outputs
        ]
        for each in rest
    }


def _latents(topology: Topology, request: Request) -> BoundaryTensor | None:
    if request.width is None or request.height is None:
        return None
    info = next((topology.components[name] for name in DENOISERS if name in topology.components), None)
    dtype = (info.dtype if info else None) or "float32"
    sides = (request.height // topology.latent_scale, request.width // topology.latent_scale)
    time: tuple[int, ...] = ()
    if topology.makes == "video" and request.num_frames is not None:
        time = ((request.num_frames - 1) // (topology.temporal_scale or 1) + 1,)
    shape = (1, topology.latent_channels, *time, *sides)
    width = getattr(torch, dtype).itemsize
    return BoundaryTensor("latents", dtype, shape, int(torch.Size(shape).numel()) * width)

"""Proves a model's split: three processes, each fed only what crosses, against the pipeline's own unsplit code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from triptych.device import pick_device, pick_dtype
from triptych.errors import Unsupported
from triptych.model import (
    Components,
    Placement,
    Resolved,
    TaskInputs,
    Topology,
    Trust,
    describe,
    open_model,
    resolve,
    unsplit,
)
from triptych.request import Request, StageName
from triptych.stage import StageTask
from triptych.transfer import Payload
from triptych.worker import StageProcess, StageSpec

__all__ = ["CheckReport", "Difference", "check_model"]


@dataclass(frozen=True)
class Difference:
    """One compared value: where it crossed (`encode`, `denoise`) or came out (`decode`), its greatest absolute error,
    and that error over the reference's greatest value. `equal`: bit for bit."""

    stage: StageName
    name: str
    shape: tuple[int, ...]
    dtype: str
    equal: bool
    error: float
    relative: float


@dataclass(frozen=True)
class CheckReport:
    """What `check_model` found. `loads`: the components whose weights each process held. `split` and `whole` are the
    pictures, float (batch, channels, height, width), or clips (batch, frames, channels, height, width)."""

    topology: Topology
    request: Request
    loads: dict[StageName, tuple[str, ...]]
    differences: tuple[Difference, ...]
    crossed: dict[StageName, Payload]
    split: torch.Tensor
    whole: torch.Tensor

    @property
    def equal(self) -> bool:
        """Whether the pictures are equal bit for bit."""
        made = [item.equal for item in self.differences if item.stage == "decode"]
        return bool(made) and all(made)

    @property
    def first(self) -> Difference | None:
        """The first value on the way that differs, None if none does."""
        return next((item for item in self.differences if not item.equal), None)


def check_model(
    model: str,
    request: Request,
    *,
    workflow: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    trust: Trust | None = None,
    processes: dict[StageName, StageProcess] | None = None,
    on_stage: Callable[[str], None] = lambda _: None,
) -> CheckReport:
    """Runs a request split over three processes and unsplit in this one, and compares what crossed and what came out.

    `processes` are reused when given (imports are paid once), else started and ended here. `on_stage` is told what is
    being done. Raises Unsupported for a model that runs fused (there is nothing to compare), and whatever opening,
    loading or running raises.
    """
    trust = trust or Trust()
    source = open_model(model, revision=revision, offline=offline, trust=trust)
    topology = describe(source, workflow, trust)
    if topology.adapter == "fused":
        raise Unsupported(f"{model} is not split: {' '.join(topology.notes)}", field="model")
    resolved = resolve(topology, request)
    spec = StageSpec(model, "encode", workflow, device, dtype, revision, offline, trust, torch.get_num_threads())
    with contextlib.ExitStack() as stack:
        own = processes or {part.name: stack.enter_context(StageProcess()) for part in topology.stages}
        loads, crossed = _run_split(topology, resolved, spec, own, on_stage)
    on_stage("unsplit")
    where = pick_device(device)
    whole = _run_whole(topology, resolved, Components(source, trust), Placement(where, pick_dtype(dtype, where)))
    differences = tuple(_compare(topology, crossed, whole))
    name, split = _pictures(crossed[topology.stages[-1].name].values)
    return CheckReport(topology, resolved.request, loads, differences, crossed, split, whole[name].cpu())


def _run_split(
    topology: Topology,
    resolved: Resolved,
    spec: StageSpec,
    processes: dict[StageName, StageProcess],
    on_stage: Callable[[str], None],
) -> tuple[dict[StageName, tuple[str, ...]], dict[StageName, Payload]]:
    loads: dict[StageName, tuple[str, ...]] = {}
    crossed: dict[StageName, Payload] = {}
    payload: Payload | None = None
    for part in topology.stages:
        on_stage(part.name)
        loads[part.name] = processes[part.name].open(replace(spec, stage=part.name))
        declared = {item.name for item in part.request_inputs}
        fields = {name: value for name, value in resolved.fields.items() if name in declared}
        task = StageTask(
            "check", fields, resolved.seed, resolved.guidance_scale, resolved.request.shift, payload, raw=True
        )
        payload = processes[part.name].run(task).payload
        crossed[part.name] = payload
    return loads, crossed


@torch.no_grad()
def _run_whole(topology: Topology, resolved: Resolved, components: Components, placement: Placement) -> dict[str, Any]:
    whole = unsplit(topology)
    whole.load(components, placement)
    generator = torch.Generator("cpu").manual_seed(resolved.seed)
    task = TaskInputs(dict(resolved.fields), resolved.guidance_scale, generator, shift=resolved.request.shift)
    return whole.run(task, {}).values


def _pictures(values: dict[str, Any]) -> tuple[str, torch.Tensor]:
    name = "images" if "images" in values else "videos"
    return name, values[name]


def _compare(topology: Topology, crossed: dict[StageName, Payload], whole: dict[str, Any]) -> Iterator[Difference]:
    """Stage by stage; on the way only where the unsplit code names what would cross (the standard pipelines' does
    not), and pictures always."""
    for part in topology.stages[:-1]:
        reference = whole.get("crossed", {}).get(part.name, {})
        for name, value in crossed[part.name].values.items():
            if name in reference:
                yield from _difference(part.name, name, value, reference[name])
    last = topology.stages[-1].name
    for name, value in crossed[last].values.items():
        yield from _difference(last, name, value, whole.get(name))


def _difference(stage: StageName, name: str, got: Any, want: Any) -> Iterator[Difference]:
    if isinstance(got, list | tuple) and isinstance(want, list | tuple | torch.Tensor):
        for index, (a, b) in enumerate(zip(got, want, strict=False)):
            yield from _difference(stage, f"{name}[{index}]", a, b)
        if len(got) != len(want):
            yield Difference(stage, f"{name}, {len(got)} for {len(want)}", (), "", False, float("inf"), float("inf"))
    if isinstance(got, dict) and isinstance(want, dict):
        for key in got.keys() | want.keys():
            yield from _difference(stage, f"{name}.{key}", got.get(key), want.get(key))
    if not isinstance(got, torch.Tensor):
        return
    if not isinstance(want, torch.Tensor):
        yield Difference(stage, f"{name}, absent unsplit", tuple(got.shape), "", False, float("inf"), float("inf"))
        return
    want = want.cpu()
    equal = got.shape == want.shape and torch.equal(got, want)
    error, scale = float("inf"), 1.0
    if got.shape == want.shape and got.numel():
        error = float((got.double() - want.double()).abs().max())
        scale = max(float(want.double().abs().max()), 1e-12)
    kind = str(got.dtype).removeprefix("torch.")
    yield Difference(stage, name, tuple(got.shape), kind, equal, 0.0 if equal else error, error / scale)

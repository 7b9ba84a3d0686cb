"""`triptych inspect`: what a model is made of, how it splits, and what crosses, without reading its weights."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triptych.cli.console import grid, human_bytes, table_console
from triptych.cli.options import AllowRemoteCode, Findings, Model, Offline, Revision
from triptych.cli.weights import refused_weights

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from triptych.model import BoundaryTensor, ComponentInfo, StageTopology, Topology

__all__ = ["inspect"]


def inspect(
    model: Model,
    workflow: Annotated[str | None, typer.Option(help="Only this one of the model's workflows.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", show_default="the model's own")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.", show_default="the model's own")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames.", show_default="the model's own")] = None,
    revision: Revision = None,
    offline: Offline = False,
    allow_remote_code: AllowRemoteCode = False,
    as_json: Findings = False,
) -> None:
    """Show a model's workflows, stages and components, what crosses between stages, and what is unsupported.

    Reads configurations and file headers, no weights. Of a hub model only small files are fetched.
    """
    from triptych.model import Trust, boundary, describe, open_model
    from triptych.request import Request

    # A size asked for is checked before a model is looked at.
    Request.parse(prompt="", width=width, height=height, num_frames=num_frames)
    trust = Trust(remote_code=allow_remote_code)
    source = open_model(model, revision=revision, offline=offline, trust=trust)
    topology = describe(source, workflow, trust)
    topology = replace(topology, notes=(*topology.notes, *refused_weights(topology, trust)))
    crossing = boundary(topology, width, height, num_frames, trust=trust)
    size = (
        width or topology.defaults.width,
        height or topology.defaults.height,
        num_frames or topology.defaults.num_frames,
    )
    if as_json:
        print(json.dumps(_findings(topology, crossing, size), indent=2, default=str))
    else:
        _show(topology, crossing, size)


_Size = tuple[int | None, int | None, int | None]


def _findings(topology: Topology, crossing: dict[str, list[BoundaryTensor]], size: _Size) -> dict[str, Any]:
    from triptych.model import SAMPLE_PROMPT

    found = asdict(topology)
    for stage, part in zip(found["stages"], topology.stages, strict=True):
        stage["parameters"], stage["bytes"] = _weight(topology, part)
    for info in found["components"].values():
        info["encoder"] = _encoder(info["causal"])
    return {
        "model": found.pop("source"),
        **found,
        "boundary": {
            "width": size[0],
            "height": size[1],
            "num_frames": size[2] if topology.makes == "video" else None,
            "prompt": SAMPLE_PROMPT,
            "tensors": {stage: [asdict(tensor) for tensor in tensors] for stage, tensors in crossing.items()},
        },
    }


def _weight(topology: Topology, stage: StageTopology) -> tuple[int, int]:
    """Parameters and bytes of what a stage loads."""
    infos = [topology.components[name] for name in stage.loads if name in topology.components]
    return sum(info.parameters for info in infos), sum(info.bytes for info in infos)


def _encoder(causal: bool | None) -> str | None:
    return None if causal is None else "causal" if causal else "bidirectional"


def _show(topology: Topology, crossing: dict[str, list[BoundaryTensor]], size: _Size) -> None:
    console = table_console()
    for line in _facts(topology):
        console.print(line, markup=False)
    for title, table in (
        ("Components", _components(topology)),
        ("Stages", _stages(topology)),
        (_crossing_title(topology, size), _crossing(crossing)),
    ):
        if table.row_count:
            console.print()
            console.print(title, style="bold", markup=False)
            console.print(table)
    _notes(console, topology)


def _facts(topology: Topology) -> list[str]:
    """The first lines: what it is, what it does, what it takes."""
    source, defaults = topology.source, topology.defaults
    origin = f" at {source.revision}" if source.revision else ""
    how = {
        "modular": "split, by Modular Diffusers' blocks",
        "standard": "split, by replaying the standard pipeline",
        "fused": "not split: runs in one piece",
    }[topology.adapter]
    own = {name: value for name, value in asdict(defaults).items() if value not in (None, {})}
    guided = {
        "classifier_free": "guidance scale and negative prompt",
        "embedded": "guidance scale, no negative prompt",
        "none": "no guidance",
    }[topology.guidance]
    sides = f"{topology.makes}s with sides in multiples of {topology.spatial_multiple}"
    frames = f", {topology.temporal_scale}k + 1 frames" if topology.temporal_scale else ""
    return [
        f"{source.name} ({source.kind}{origin}): {topology.pipeline_class}, family {topology.family}",
        f"workflows  {', '.join(topology.workflows)} (shown: {topology.workflow})",
        f"stages     {how}",
        f"makes      {sides}{frames}; {guided}",
        f"defaults   {', '.join(f'{name} {value}' for name, value in own.items()) or 'the pipeline decides'}",
        f"inputs     {', '.join(_inputs(topology))}",
    ]


def _inputs(topology: Topology) -> list[str]:
    """The names that a request may give, required ones marked."""
    found: dict[str, str] = {}
    for stage in topology.stages:
        for item in stage.request_inputs:
            found.setdefault(item.name, f"{item.name}*" if item.required else item.name)
    return list(found.values())


def _components(topology: Topology) -> Table:
    table = grid("name", "class", "parameters", "bytes", "dtype", "kind", right=("parameters", "bytes"))
    for info in topology.components.values():
        table.add_row(
            info.name,
            info.class_name,
            f"{info.parameters:,}" if info.parameters else "",
            human_bytes(info.bytes) if info.bytes else "",
            info.dtype or "",
            _kind(info),
        )
    return table


def _kind(info: ComponentInfo) -> str:
    encoder = _encoder(info.causal)
    return f"{encoder} text encoder" if encoder else ""


def _stages(topology: Topology) -> Table:
    table = grid("stage", "loads", "reads", "weights", "takes", "gives", right=("weights",))
    for stage in topology.stages:
        table.add_row(
            stage.name,
            ", ".join(stage.loads),
            ", ".join(stage.reads),
            human_bytes(_weight(topology, stage)[1]),
            ", ".join(f"{port.name}*" if port.required else port.name for port in stage.inputs),
            ", ".join(port.name for port in stage.outputs),
        )
    return table


def _crossing_title(topology: Topology, size: _Size) -> str:
    sides = f"{size[0]}×{size[1]}" if size[0] and size[1] else "the default size"
    frames = f", {size[2]} frames" if topology.makes == "video" and size[2] else ""
    return f"What crosses at {sides}{frames}, for one {topology.makes} ({topology.workflow}) of a short prompt"


def _crossing(crossing: dict[str, list[BoundaryTensor]]) -> Table:
    table = grid("from", "tensor", "dtype", "shape", "bytes", right=("bytes",))
    for stage, tensors in crossing.items():
        for tensor in tensors:
            shape = "unknown" if tensor.shape is None else "×".join(map(str, tensor.shape)) or "scalar"
            size = "unknown" if tensor.bytes is None else human_bytes(tensor.bytes)
            table.add_row(stage, tensor.name, tensor.dtype or "unknown", shape, size)
    return table


def _notes(console: Console, topology: Topology) -> None:
    if topology.notes:
        console.print()
        console.print("Unsupported", style="bold")
        for note in topology.notes:
            console.print(f"- {note}", markup=False)

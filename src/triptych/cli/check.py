"""`triptych check`: is a model, split over three processes, still the same model?"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triptych.cli.console import note
from triptych.cli.options import (
    AllowPickle,
    AllowRemoteCode,
    Device,
    Dtype,
    Findings,
    Model,
    Offline,
    Revision,
    Workflow,
)
from triptych.cli.weights import check_weights

if TYPE_CHECKING:
    from PIL import Image

    from triptych.check import CheckReport
    from triptych.model import Topology

__all__ = ["check"]

_MULTIPLES = 8
"""A small size: so many times the smallest one."""


def check(
    model: Model,
    workflow: Workflow = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 2,
    width: Annotated[int | None, typer.Option(help="Pixels.", show_default="a small size")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.", show_default="a small size")] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    revision: Revision = None,
    offline: Offline = False,
    allow_pickle: AllowPickle = False,
    allow_remote_code: AllowRemoteCode = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Findings = False,
) -> None:
    """Run a model split over three processes and unsplit, and compare.

    Says whether the results are equal bit for bit, or where and by how much they differ (then exits with 1).
    """
    from triptych import Request, Trust
    from triptych.check import check_model
    from triptych.device import pick_device, pick_dtype
    from triptych.model import describe, open_model

    trust = Trust(pickle_weights=allow_pickle, remote_code=allow_remote_code)
    # What was asked for is checked before a model is looked at, and before any process starts.
    Request.parse(prompt="", width=width, height=height, num_inference_steps=steps)
    pick_dtype(dtype, pick_device(device))
    source = open_model(model, revision=revision, offline=offline, trust=trust)
    topology = describe(source, workflow, trust)
    check_weights(topology, trust)
    fields = _small_request(topology, width, height)
    report = check_model(
        model,
        Request.parse(**fields, num_inference_steps=steps),
        workflow=workflow,
        device=device,
        dtype=dtype,
        revision=revision,
        offline=offline,
        trust=trust,
        on_stage=(lambda _: None) if quiet else (lambda stage: note(f"running {stage}")),
    )
    print(json.dumps(_findings(report)) if as_json else _table(report))
    if report.first is not None or not report.equal:
        raise typer.Exit(1)


def _small_request(topology: Topology, width: int | None, height: int | None) -> dict[str, Any]:
    """The fields of a request that every model of this topology can serve, at a small size."""
    small = _MULTIPLES * topology.spatial_multiple
    default = topology.defaults
    wide = width or min(small, default.width or small)
    high = height or min(small, default.height or small)
    inputs = {item.name for stage in topology.stages for item in stage.request_inputs}
    fields: dict[str, Any] = {"prompt": "a red apple on a table", "seed": 0, "width": width, "height": height}
    # A model that takes no size works at its pictures' own; one asked for all the same is refused by name.
    fields |= {name: side for name, side in (("width", wide), ("height", high)) if name in inputs}
    if topology.makes == "video":
        fields["num_frames"] = (topology.temporal_scale or 4) + 1
    if "image" in inputs and not topology.workflow.startswith("text2"):
        fields["images"] = (_picture(wide, high),)
    if "mask_image" in inputs and topology.workflow == "inpaint":
        fields["mask"] = _picture(wide, high).convert("L").point([0] * 128 + [255] * 128)
    return fields


def _picture(width: int, height: int) -> Image.Image:
    """A picture with a different colour at each place."""
    from PIL import Image

    down = Image.linear_gradient("L").resize((width, height))
    across = Image.linear_gradient("L").rotate(90).resize((width, height))
    return Image.merge("RGB", (down, across, down.rotate(180)))


def _findings(report: CheckReport) -> dict[str, Any]:
    return {
        "model": report.topology.source.name,
        "workflow": report.topology.workflow,
        "family": report.topology.family,
        "equal": report.equal,
        "first_difference": asdict(report.first) if report.first else None,
        "loads": report.loads,
        "values": [asdict(item) for item in report.differences],
    }


def _table(report: CheckReport) -> str:
    topology = report.topology
    lines = [f"{topology.source.name}, {topology.workflow}, {topology.family}: split over three processes"]
    lines += [f"  {stage} held {', '.join(names) or 'no weights'}" for stage, names in report.loads.items()]
    lines += ["", f"{'stage':8} {'value':32} {'shape':22} {'dtype':9} {'split = unsplit':>16}"]
    for item in report.differences:
        shape = "×".join(map(str, item.shape)) or "scalar"
        verdict = "bit for bit" if item.equal else f"off by {item.error:.2e}"
        lines.append(f"{item.stage:8} {item.name[:32]:32} {shape:22} {item.dtype:9} {verdict:>16}")
    return "\n".join([*lines, "", _verdict(report)])


def _verdict(report: CheckReport) -> str:
    first = report.first
    if first is None:
        return "equal bit for bit"
    where = f"first at {first.name} out of {first.stage}: off by {first.error:.2e}, {first.relative:.2e} relative"
    return f"{'the output is equal, but a value on the way differs' if report.equal else 'not equal'}; {where}"

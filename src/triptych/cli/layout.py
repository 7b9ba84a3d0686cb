"""`triptych layout check`: what a layout would start where, and what it takes, without starting anything."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triptych.cli.console import grid, human_bytes, note, table_console
from triptych.cli.generation import DEFAULT_MODEL
from triptych.cli.options import AllowRemoteCode, Findings, Offline, Revision, Workflow
from triptych.errors import InvalidRequest, TriptychError

if TYPE_CHECKING:
    import torch

    from triptych.config import Layout, Slot
    from triptych.model import StageName, Topology

__all__ = ["layout"]

layout = typer.Typer(help="Say what a layout file would start.", rich_markup_mode=None)

_WRONG_INPUT = 2


@layout.callback()
def _layout() -> None:
    pass


@dataclass(frozen=True)
class Place:
    """A worker as it would be started: its slot, the device it would get (None on another host), and the bytes of
    its weights there."""

    slot: Slot
    device: torch.device | None
    weights: int


@layout.command()
def check(
    file: Annotated[str, typer.Argument(help="A layout file, or fused or split.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The model to run.")] = DEFAULT_MODEL,
    workflow: Workflow = None,
    revision: Revision = None,
    offline: Offline = False,
    allow_remote_code: AllowRemoteCode = False,
    as_json: Findings = False,
) -> None:
    """Check a layout against a model, and show what would start where and the memory of its weights.

    One line for each thing that is wrong, and exit code 2; 1 if something does not fit into memory. No weights are
    read and no process is started.
    """
    from triptych.config import Layout
    from triptych.model import Trust, describe, open_model

    found = Layout.of(file) if file in ("fused", "split") else Layout.look(file)
    if not isinstance(found, Layout):
        raise _refuse(found)
    trust = Trust(remote_code=allow_remote_code)
    topology = describe(open_model(model, revision=revision, offline=offline, trust=trust), workflow, trust)
    places, problems = look(found, topology)
    if problems:
        raise _refuse(problems)
    totals = _totals(places)
    if as_json:
        print(json.dumps(_findings(found, topology, places, totals), indent=2))
    else:
        _show(found, topology, places, totals)
    over = [
        total for total in totals if total["free_bytes"] is not None and total["weights_bytes"] > total["free_bytes"]
    ]
    for total in over:
        weights, free = human_bytes(total["weights_bytes"]), human_bytes(total["free_bytes"])
        note(f"does not fit: {weights} of weights on {total['device']}, where {free} are free")
    if over:
        raise typer.Exit(1)


def _refuse(problems: Iterable[TriptychError]) -> typer.Exit:
    for problem in problems:
        note(f"error: {' '.join(str(problem).split())}")
    return typer.Exit(_WRONG_INPUT)


def look(layout: Layout, topology: Topology) -> tuple[list[Place], list[TriptychError]]:
    """The workers that a layout would start for a model, and all that is wrong with it."""
    import psutil

    stages: tuple[StageName, ...] = tuple(stage.name for stage in topology.stages)
    problems: list[TriptychError] = [*layout.problems(stages, psutil.virtual_memory().total)]
    told = {problem.field for problem in problems}
    problems += [problem for problem in _sections(layout) if problem.field not in told]
    if problems:
        return [], problems
    places = []
    for slot in layout.slots(stages):
        try:
            places.append(_place(slot, topology))
        except TriptychError as error:
            error.message += f" (worker {slot.name})"
            problems.append(error)
    return places, problems


def _sections(layout: Layout) -> list[TriptychError]:
    """What the parts that the sections are for would refuse."""
    from triptych.cluster import Limits
    from triptych.transfer import TransferSettings

    found: list[TriptychError] = []
    for make, section in ((TransferSettings, layout.transfer), (Limits, layout.limits)):
        try:
            make(**section.given())
        except InvalidRequest as error:
            found.append(error)
    return found


def _place(slot: Slot, topology: Topology) -> Place:
    """Raises InvalidRequest or DeviceError for a device or processor that is not here."""
    from triptych.device import DTYPES, pick_device, pick_dtype
    from triptych.errors import DeviceError

    if not slot.local:
        with contextlib.suppress(DeviceError):  # it need not be here; but it must be the name of one
            pick_device(slot.device)
        return Place(slot, None, _weights(slot, topology, DTYPES[slot.dtype] if slot.dtype else None))
    device = pick_device(slot.device)
    here = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    if slot.cpus and not set(slot.cpus) <= here:
        raise InvalidRequest.of("cpus", list(slot.cpus), f"processors of this machine: {sorted(here)}")
    return Place(slot, device, _weights(slot, topology, pick_dtype(slot.dtype, device)))


def _weights(slot: Slot, topology: Topology, dtype: torch.dtype | None) -> int:
    """Bytes of what a worker loads, each component once."""
    names = dict.fromkeys(name for stage in slot.stages for name in topology.stage(stage).loads)
    infos = (topology.components[name] for name in names if name in topology.components)
    return sum(info.parameters * dtype.itemsize if dtype and info.parameters else info.bytes for info in infos)


def _totals(places: Iterable[Place]) -> list[dict[str, Any]]:
    """Weights by host and device, beside what is free there (None: not known here)."""
    from triptych.device import free_bytes

    found: dict[tuple[str, str], dict[str, Any]] = {}
    for place in places:
        device = place.slot.device if place.device is None else str(place.device)
        free = None if place.device is None else free_bytes(place.device)
        total = found.setdefault(
            (place.slot.host, device),
            {"host": place.slot.host, "device": device, "workers": 0, "weights_bytes": 0, "free_bytes": free},
        )
        total["workers"] += 1
        total["weights_bytes"] += place.weights
    return list(found.values())


def _findings(
    layout: Layout, topology: Topology, places: Iterable[Place], totals: list[dict[str, Any]]
) -> dict[str, Any]:
    workers = [
        {**asdict(place.slot), "device": str(place.device or place.slot.device), "weights_bytes": place.weights}
        for place in places
    ]
    return {
        "layout": layout.name,
        "model": topology.source.name,
        "workflow": topology.workflow,
        "workers": workers,
        "totals": totals,
        "missing": list(layout.missing_stages(stage.name for stage in topology.stages)),
    }


def _show(layout: Layout, topology: Topology, places: Iterable[Place], totals: list[dict[str, Any]]) -> None:
    console = table_console()
    console.print(f"layout {layout.name} of {topology.source.name}, {topology.workflow}", markup=False)
    table = grid("worker", "stages", "host", "device", "dtype", "threads", "capacity", "weights", right=("weights",))
    for place in places:
        slot = place.slot
        own = (slot.dtype or "default", slot.threads or "default", slot.capacity or "default")
        device, weights = str(place.device or slot.device), human_bytes(place.weights)
        table.add_row(slot.name, ", ".join(slot.stages), slot.host, device, *map(str, own), weights)
    console.print(table)
    table = grid("host", "device", "workers", "weights", "free", right=("workers", "weights", "free"))
    for total in totals:
        free = "unknown" if total["free_bytes"] is None else human_bytes(total["free_bytes"])
        weights = human_bytes(total["weights_bytes"])
        table.add_row(total["host"], total["device"], str(total["workers"]), weights, free)
    console.print(table)
    missing = layout.missing_stages(stage.name for stage in topology.stages)
    if missing:
        console.print(f"waits for a worker to join with: {', '.join(missing)}", markup=False)

"""From a topology's stage to the object that runs it."""

from __future__ import annotations

from triptych.decode import DecodeStage, FusedStage
from triptych.denoise import DenoiseStage
from triptych.encode import EncodeStage
from triptych.model import Components, Placement, Topology, program
from triptych.request import StageName
from triptych.stage import GatherStage

_STAGES: dict[StageName, type[GatherStage]] = {
    "encode": EncodeStage,
    "denoise": DenoiseStage,
    "decode": DecodeStage,
}


def build_stage(
    topology: Topology, name: StageName, components: Components, placement: Placement, capacity: int = 4
) -> GatherStage:
    """The stage of that name, not loaded yet. `components` may be shared by the stages of one process."""
    kind = FusedStage if topology.adapter == "fused" else _STAGES[name]
    return kind(program(topology, name), components, placement, capacity)

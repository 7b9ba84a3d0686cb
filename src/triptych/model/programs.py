"""From a topology to what runs its stages."""

from __future__ import annotations

from triptych.errors import Unsupported
from triptych.model.program import StageProgram
from triptych.model.topology import StageName, Topology

__all__ = ["program"]


def program(topology: Topology, stage_name: StageName) -> StageProgram:
    """What runs that stage, not loaded yet. Raises Unsupported if the topology has no such stage."""
    try:
        stage = topology.stage(stage_name)
    except KeyError:
        allowed = ", ".join(stage.name for stage in topology.stages)
        raise Unsupported(f"given {stage_name!r}; allowed: {allowed}", field="stage") from None
    # Each adapter costs imports that the others' users need not pay for.
    if topology.adapter == "modular":
        from triptych.model.modular import ModularProgram

        return ModularProgram(topology, stage)
    if topology.adapter == "standard":
        from triptych.model.standard import StandardProgram

        return StandardProgram(topology, stage)
    from triptych.model.fused import FusedProgram

    return FusedProgram(topology, stage)

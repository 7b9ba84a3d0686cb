"""From a topology to what runs its stages."""

from __future__ import annotations

from dataclasses import replace

from triptych.errors import Unsupported
from triptych.model.contract import StageProgram
from triptych.model.topology import StageName, Topology

__all__ = ["program", "unsplit"]


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


def unsplit(topology: Topology) -> StageProgram:
    """The program that runs every block in one piece, with all weights. What it gives holds, beside the pictures,
    `crossed`: by stage, the values that would cross from it, as far as the pipeline's code names them."""
    if topology.adapter != "modular":
        return program(replace(topology, adapter="fused"), "denoise")
    stages = topology.stages
    inputs = {item.name: item for stage in reversed(stages) for item in stage.request_inputs}
    whole = replace(
        topology.stage("denoise"),
        blocks=tuple(block for stage in stages for block in stage.blocks),
        loads=tuple(dict.fromkeys(name for stage in stages for name in stage.loads)),
        reads=(),
        request_inputs=tuple(inputs.values()),
        inputs=(),
        outputs=stages[-1].outputs,
    )
    from triptych.model.modular import ModularProgram

    marks = {stage.blocks[-1]: stage for stage in stages[:-1]}
    return ModularProgram(replace(topology, stages=(whole,)), whole, marks)

"""A pipeline's own code, whole: what a split is proved against."""

from __future__ import annotations

from dataclasses import replace

from triptych.model.program import StageProgram
from triptych.model.programs import program
from triptych.model.topology import Port, Topology

__all__ = ["unsplit"]


def unsplit(topology: Topology) -> StageProgram:
    """The program that runs every block in one piece, with all weights. What it gives holds, beside the pictures, the
    values that cross between stages, as far as the pipeline's code names them."""
    if topology.adapter != "modular":
        return program(replace(topology, adapter="fused"), "denoise")
    stages = topology.stages
    ports = {port.name: Port(port.name, port.tag) for stage in stages for port in stage.outputs}
    inputs = {item.name: item for stage in reversed(stages) for item in stage.request_inputs}
    whole = replace(
        topology.stage("denoise"),
        blocks=tuple(block for stage in stages for block in stage.blocks),
        loads=tuple(dict.fromkeys(name for stage in stages for name in stage.loads)),
        reads=(),
        request_inputs=tuple(inputs.values()),
        inputs=(),
        outputs=tuple(ports.values()),
    )
    return program(replace(topology, stages=(whole,)), "denoise")

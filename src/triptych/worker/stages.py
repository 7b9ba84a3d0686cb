"""From a topology's stage to the object that runs it, and one task's way through it."""

from __future__ import annotations

from collections.abc import Callable

from triptych.decode import DecodeStage, FusedStage
from triptych.denoise import DenoiseStage
from triptych.encode import EncodeStage
from triptych.model import Components, Placement, Topology, program
from triptych.request import StageName
from triptych.stage import Failed, GatherStage, Output, Refused, Stage, StageTask, StepDone

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


def run_alone(stage: Stage, task: StageTask, told: Callable[[StepDone], None] = lambda _: None) -> Output:
    """Drives a stage that holds nothing else until the task is done; `told` hears of its steps. Raises what the task
    failed with."""
    admitted = stage.admit(task)
    if isinstance(admitted, Refused):
        raise admitted.error
    while True:
        for event in stage.step():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, StepDone):
                told(event)
            if isinstance(event, Output):
                return event

"""The Stage contract, and the primitive that runs many tasks' own pipeline code in one thread."""

from triptych.stage.caches import Caches, Freed
from triptych.stage.gather import Call, Gather, Parked
from triptych.stage.gathered import GatherStage, Live
from triptych.stage.protocol import (
    Admitted,
    Checkpoint,
    Failed,
    Flush,
    Full,
    JobId,
    LoadProgress,
    Order,
    Output,
    Refused,
    Stage,
    StageEvent,
    StageInfo,
    StageTask,
    StepDone,
    UsePreview,
)

__all__ = [
    "Admitted",
    "Caches",
    "Call",
    "Checkpoint",
    "Failed",
    "Flush",
    "Freed",
    "Full",
    "Gather",
    "GatherStage",
    "JobId",
    "Live",
    "LoadProgress",
    "Order",
    "Output",
    "Parked",
    "Refused",
    "Stage",
    "StageEvent",
    "StageInfo",
    "StageTask",
    "StepDone",
    "UsePreview",
]

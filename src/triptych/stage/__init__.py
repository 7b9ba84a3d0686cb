"""The Stage contract, and the primitive that runs many tasks' own pipeline code in one thread."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych.stage.caches import Caches, Freed, Used
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
    from triptych.stage.vae import middle_of

# Imported on first use: the words of the contract must not cost diffusers.
_FILES = {
    "caches": ("Caches", "Freed", "Used"),
    "gather": ("Call", "Gather", "Parked"),
    "gathered": ("GatherStage", "Live"),
    "protocol": (
        "Admitted",
        "Checkpoint",
        "Failed",
        "Flush",
        "Full",
        "JobId",
        "LoadProgress",
        "Order",
        "Output",
        "Refused",
        "Stage",
        "StageEvent",
        "StageInfo",
        "StageTask",
        "StepDone",
        "UsePreview",
    ),
    "vae": ("middle_of",),
}
_HOME = {name: file for file, names in _FILES.items() for name in names}

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
    "Used",
    "middle_of",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Triptych: a serving engine for image and video diffusion models, in three panels: encode, denoise, decode."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych.engine import Engine, Job
    from triptych.errors import (
        Cancelled,
        DeviceError,
        InvalidRequest,
        LoadError,
        MediaError,
        ModelNotFound,
        NotEnoughMemory,
        NoWorker,
        QueueFull,
        StageFailed,
        TriptychError,
        Unsupported,
        WrongPayload,
    )
    from triptych.model.load import Trust
    from triptych.request import Clip, Progress, Request, Result, StageTime

__version__ = "0.1.0"

# Imported on first use: the command line's --help and the torch-free rooms must not pay for torch.
_ROOMS = {
    "triptych.engine": ("Engine", "Job"),
    "triptych.errors": (
        "Cancelled",
        "DeviceError",
        "InvalidRequest",
        "LoadError",
        "MediaError",
        "ModelNotFound",
        "NoWorker",
        "NotEnoughMemory",
        "QueueFull",
        "StageFailed",
        "TriptychError",
        "Unsupported",
        "WrongPayload",
    ),
    "triptych.model.load": ("Trust",),
    "triptych.request": ("Clip", "Progress", "Request", "Result", "StageTime"),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "Cancelled",
    "Clip",
    "DeviceError",
    "Engine",
    "InvalidRequest",
    "Job",
    "LoadError",
    "MediaError",
    "ModelNotFound",
    "NoWorker",
    "NotEnoughMemory",
    "Progress",
    "QueueFull",
    "Request",
    "Result",
    "StageFailed",
    "StageTime",
    "TriptychError",
    "Trust",
    "Unsupported",
    "WrongPayload",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

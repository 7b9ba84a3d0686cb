"""Triptych: a serving engine for image and video diffusion models, in three panels: encode, denoise, decode."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych.client import AsyncClient, AsyncRemoteJob, Client, JobUpdate, RemoteFile, RemoteJob, RemoteResult
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
        Unreachable,
        Unsupported,
        WrongPayload,
    )
    from triptych.model import Trust
    from triptych.request import Clip, Progress, Request, Result, StageTime

__version__ = "0.1.0"

# Imported on first use: the command line's --help and the torch-free rooms must not pay for torch.
_ROOMS = {
    "triptych.client": (
        "AsyncClient",
        "AsyncRemoteJob",
        "Client",
        "JobUpdate",
        "RemoteFile",
        "RemoteJob",
        "RemoteResult",
    ),
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
        "Unreachable",
        "Unsupported",
        "WrongPayload",
    ),
    "triptych.model": ("Trust",),
    "triptych.request": ("Clip", "Progress", "Request", "Result", "StageTime"),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "AsyncClient",
    "AsyncRemoteJob",
    "Cancelled",
    "Client",
    "Clip",
    "DeviceError",
    "Engine",
    "InvalidRequest",
    "Job",
    "JobUpdate",
    "LoadError",
    "MediaError",
    "ModelNotFound",
    "NoWorker",
    "NotEnoughMemory",
    "Progress",
    "QueueFull",
    "RemoteFile",
    "RemoteJob",
    "RemoteResult",
    "Request",
    "Result",
    "StageFailed",
    "StageTime",
    "TriptychError",
    "Trust",
    "Unreachable",
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

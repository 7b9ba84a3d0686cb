"""What holds stages: a worker in this process or in one of its own."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych.worker.line import InProcessUplink, LocalCoordinator, LocalLink, Uplink
    from triptych.worker.main import worker_main
    from triptych.worker.opening import Opened, open_for
    from triptych.worker.process import StageProcess
    from triptych.worker.replay import keep_task, read_payload, replay_task, write_payload
    from triptych.worker.settings import WorkerSettings
    from triptych.worker.stages import build_stage, run_alone
    from triptych.worker.uplink import ProcessUplink
    from triptych.worker.wire import StageSpec
    from triptych.worker.worker import Worker

# Imported on first use: a worker in the engine's process needs no network, and a stage process no worker.
_FILES = {
    "line": ("InProcessUplink", "LocalCoordinator", "LocalLink", "Uplink"),
    "main": ("worker_main",),
    "opening": ("Opened", "open_for"),
    "process": ("StageProcess",),
    "replay": ("keep_task", "read_payload", "replay_task", "write_payload"),
    "settings": ("WorkerSettings",),
    "stages": ("build_stage", "run_alone"),
    "uplink": ("ProcessUplink",),
    "wire": ("StageSpec",),
    "worker": ("Worker",),
}
_HOME = {name: file for file, names in _FILES.items() for name in names}

__all__ = [
    "InProcessUplink",
    "LocalCoordinator",
    "LocalLink",
    "Opened",
    "ProcessUplink",
    "StageProcess",
    "StageSpec",
    "Uplink",
    "Worker",
    "WorkerSettings",
    "build_stage",
    "keep_task",
    "open_for",
    "read_payload",
    "replay_task",
    "run_alone",
    "worker_main",
    "write_payload",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"triptych.worker.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

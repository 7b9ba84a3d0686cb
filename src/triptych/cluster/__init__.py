"""The cluster's mind: jobs, workers and queues, and what keeps them in touch. Free of torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych.cluster.coordinator import Coordinator
    from triptych.cluster.delivery import Watcher
    from triptych.cluster.flushing import FlushReport, WorkerFlush
    from triptych.cluster.folders import private_folder
    from triptych.cluster.host.supervisor import RestartPolicy, SlotState, Supervisor, WorkerSlot
    from triptych.cluster.jobs import (
        ENDED,
        Failure,
        JobRecord,
        JobSpec,
        JobState,
        JobStore,
        Keeper,
        Kept,
        Link,
        NotNear,
        Outcome,
        StageRecord,
        StageSpec,
    )
    from triptych.cluster.limits import Limits
    from triptych.cluster.lines.keys import (
        ClientKeys,
        ServerKeys,
        load_client_keys,
        load_server_keys,
        make_client_keys,
        make_server_keys,
        remove_client,
    )
    from triptych.cluster.lines.network import Listener
    from triptych.cluster.measures import BOUNDS, Measures
    from triptych.cluster.observers import Observer
    from triptych.cluster.scheduling.estimate import Estimate
    from triptych.cluster.status import StageStatus, Status, Totals, WorkerStatus
    from triptych.cluster.storage.artifacts import ArtifactFolder
    from triptych.cluster.storage.memory_store import MemoryStore
    from triptych.cluster.storage.sqlite_store import SqliteStore
    from triptych.cluster.trace import Trace

# Imported on first use: a command that needs a limit must not pay for ZeroMQ.
_ROOMS = {
    "coordinator": ("Coordinator",),
    "delivery": ("Watcher",),
    "flushing": ("FlushReport", "WorkerFlush"),
    "folders": ("private_folder",),
    "host.supervisor": ("RestartPolicy", "SlotState", "Supervisor", "WorkerSlot"),
    "jobs": (
        "ENDED",
        "Failure",
        "JobRecord",
        "JobSpec",
        "JobState",
        "JobStore",
        "Keeper",
        "Kept",
        "Link",
        "NotNear",
        "Outcome",
        "StageRecord",
        "StageSpec",
    ),
    "limits": ("Limits",),
    "lines.keys": (
        "ClientKeys",
        "ServerKeys",
        "load_client_keys",
        "load_server_keys",
        "make_client_keys",
        "make_server_keys",
        "remove_client",
    ),
    "lines.network": ("Listener",),
    "measures": ("BOUNDS", "Measures"),
    "observers": ("Observer",),
    "scheduling.estimate": ("Estimate",),
    "status": ("StageStatus", "Status", "Totals", "WorkerStatus"),
    "storage.artifacts": ("ArtifactFolder",),
    "storage.memory_store": ("MemoryStore",),
    "storage.sqlite_store": ("SqliteStore",),
    "trace": ("Trace",),
}
_HOME = {name: f"{__name__}.{room}" for room, names in _ROOMS.items() for name in names}

__all__ = [
    "BOUNDS",
    "ENDED",
    "ArtifactFolder",
    "ClientKeys",
    "Coordinator",
    "Estimate",
    "Failure",
    "FlushReport",
    "JobRecord",
    "JobSpec",
    "JobState",
    "JobStore",
    "Keeper",
    "Kept",
    "Limits",
    "Link",
    "Listener",
    "Measures",
    "MemoryStore",
    "NotNear",
    "Observer",
    "Outcome",
    "RestartPolicy",
    "ServerKeys",
    "SlotState",
    "SqliteStore",
    "StageRecord",
    "StageSpec",
    "StageStatus",
    "Status",
    "Supervisor",
    "Totals",
    "Trace",
    "Watcher",
    "WorkerFlush",
    "WorkerSlot",
    "WorkerStatus",
    "load_client_keys",
    "load_server_keys",
    "make_client_keys",
    "make_server_keys",
    "private_folder",
    "remove_client",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

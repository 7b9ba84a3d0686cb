"""A model opened for a worker: its topology and digest before any weight is read, its stages not loaded yet."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from triptych.decode import load_preview_vae
from triptych.device import pick_device, pick_dtype
from triptych.errors import InvalidRequest, Unsupported
from triptych.model import Components, Placement, Topology, Trust, describe, model_digest, open_model
from triptych.request import StageName
from triptych.stage import Stage
from triptych.worker.settings import WorkerSettings
from triptych.worker.stages import build_stage

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
KEPT_BYTES, MAPPED_BYTES = 256 << 20, 32 << 20
"""Freed memory that stays with the process; what is allocated by a mapping of its own (glibc takes no more)."""


@dataclass(frozen=True)
class Opened:
    """What a worker works with. `stages` are in the topology's order."""

    topology: Topology
    digest: str
    stages: Mapping[StageName, Stage]
    placement: Placement
    trust: Trust = field(default_factory=Trust)
    preview_vae: Any = None


def open_for(settings: WorkerSettings) -> Opened:
    """Opens the settings' model. Raises ModelNotFound, LoadError, DeviceError, Unsupported or InvalidRequest."""
    device = pick_device(settings.device)
    placement = Placement(device, pick_dtype(settings.dtype, device))
    trust = settings.trust
    source = open_model(settings.model, revision=settings.revision, offline=settings.offline, trust=trust)
    topology = describe(source, settings.workflow, trust)
    known: list[StageName] = [part.name for part in topology.stages]
    unknown = [name for name in settings.stages if name not in known]
    if unknown:
        raise InvalidRequest.of("stages", unknown[0], known)
    components = Components(source, trust)
    stages: dict[StageName, Stage] = {
        name: build_stage(topology, name, components, placement, settings.capacity)
        for name in known
        if name in (settings.stages or known)
    }
    tiny = None if settings.preview_vae is None else load_preview_vae(settings.preview_vae, placement, trust)
    return Opened(topology, model_digest(source, topology.workflow), stages, placement, trust, tiny)


def pin(settings: WorkerSettings) -> None:
    """Keeps the calling thread, and those it starts, to the settings' processors, and sets torch's threads. Raises
    InvalidRequest for processors that are not here, Unsupported where the system cannot."""
    if settings.cpus:
        if not hasattr(os, "sched_setaffinity"):
            raise Unsupported("this system keeps no thread to a processor", field="cpus")
        here = os.sched_getaffinity(0)
        if not set(settings.cpus) <= here:
            raise InvalidRequest.of("cpus", settings.cpus, f"processors of this process: {sorted(here)}")
        os.sched_setaffinity(threading.get_native_id(), settings.cpus)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)


def settle() -> None:
    """For a process that has loaded and is to serve: what is here stays, and Python's collector looks at it no more.
    With torch and a model here, each of its full rounds would take a small task's time."""
    gc.collect()
    gc.freeze()


def keep_memory() -> None:
    """By itself glibc returns much of what one task frees, and the next has it zeroed again, page by page: a tenth of a
    small decode's time (mallopt(3)). The heaps that threads have of their own return it whatever the threshold: all
    share one."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
        libc.mallopt(_MMAP_THRESHOLD, MAPPED_BYTES)
        libc.mallopt(_ARENA_MAX, 1)

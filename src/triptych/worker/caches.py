"""What a worker keeps only to be faster: its stages' caches, and those of the process that they share."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Mapping

import psutil
import torch

from triptych.messages import CacheUse, Flushed
from triptych.request import StageName
from triptych.stage import Caches, Flush, Freed, Stage, Used
from triptych.transfer import Exchange

__all__ = ["caches_used", "flush_all", "process_caches"]


def process_caches(exchange: Exchange, device: torch.device) -> Caches:
    """The caches of a worker's process: the transfer pools' unused segments, and what its memory allocator holds. The
    allocator comes last, since it holds what the others let go of."""
    caches = Caches()
    caches.register("transfer", exchange.trim, lambda: Used(*exchange.reserved()))
    caches.register("allocator", lambda: _empty_allocator(device))
    return caches


def flush_all(number: int, stages: Mapping[StageName, Stage], process: Caches) -> Flushed:
    """Flushes the stages' caches, then the process'. To be called between two units."""
    freed: dict[StageName, Freed] = {name: stage.control(Flush()) or Freed() for name, stage in stages.items()}
    shared = process.flush()
    failed = {f"{name}/{cache}": why for name, one in freed.items() for cache, why in one.failed.items()}
    return Flushed(
        number=number,
        stages={name: one.bytes for name, one in freed.items()},
        process=shared.bytes,
        failed={**failed, **{f"process/{cache}": why for cache, why in shared.failed.items()}},
    )


def caches_used(stages: Mapping[StageName, Stage], process: Caches) -> tuple[CacheUse, ...]:
    """How the stages' caches and the process' have served. Any thread may ask."""
    every: dict[StageName | None, Caches] = {name: stage.caches for name, stage in stages.items()}
    return tuple(
        CacheUse(stage=name, cache=cache, hits=used.hits, misses=used.misses)
        for name, caches in {**every, None: process}.items()
        for cache, used in caches.used().items()
    )


def _empty_allocator(device: torch.device) -> int:
    """Gives freed memory back: torch's pool of a device, glibc's heap on a CPU."""
    gc.collect()
    if device.type != "cpu" and hasattr(torch.accelerator, "empty_cache"):
        before = torch.accelerator.memory_reserved(device)
        torch.accelerator.empty_cache()
        torch.accelerator.empty_host_cache()
        return max(0, before - torch.accelerator.memory_reserved(device))
    if platform.libc_ver()[0] != "glibc":
        return 0
    process = psutil.Process()
    before = process.memory_info().rss
    ctypes.CDLL(None).malloc_trim(0)
    return max(0, before - process.memory_info().rss)

"""A worker's pulse: what it tells each second, and how it proves that it still works after a task failed."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterable

import psutil
import torch
import xxhash

from triptych.device import free_bytes
from triptych.messages import Busy, CacheUse, Heartbeat, Proved
from triptych.request import StageName
from triptych.transfer import Exchange

logger = logging.getLogger(__name__)

SAMPLED_WEIGHTS = 64
SAMPLED_ELEMENTS = 256


class Pulse:
    """Sends a Heartbeat every so many seconds, on a thread of its own, and sees to what the dead leave behind. `unit`
    is set by the thread that works."""

    def __init__(
        self, send: Callable[[Heartbeat], None], exchange: Exchange, device: torch.device, seconds: float
    ) -> None:
        self.unit: tuple[str, StageName, float] | None = None
        """job, stage and beginning (of time.monotonic) of the unit that runs now"""
        self.moving: Callable[[], bool] = lambda: False
        """whether a task's inputs or outputs are on their way"""
        self.caches: Callable[[], tuple[CacheUse, ...]] = tuple
        """how its caches have served"""
        self.seconds = seconds
        self._send = send
        self._exchange = exchange
        self._device = device
        self._process = psutil.Process()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="triptych-pulse", daemon=True)
        self._thread.start()

    def beat(self) -> Heartbeat:
        """How things are now."""
        unit, stats = self.unit, self._exchange.stats()
        busy = None if unit is None else Busy(job=unit[0], stage=unit[1], seconds=time.monotonic() - unit[2])
        return Heartbeat(
            busy=busy,
            moving=self.moving(),
            memory_bytes=_used_bytes(self._device, self._process),
            free_bytes=free_bytes(self._device),
            kept=stats.kept,
            kept_bytes=stats.kept_bytes,
            caches=self.caches(),
        )

    def stop(self) -> None:
        """No further beats."""
        self._ended.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(5.0)

    def _run(self) -> None:
        while not self._ended.wait(self.seconds):
            try:
                self._exchange.tidy()
                self._send(self.beat())
            except Exception:  # the next may go well; if none does, the silence tells
                logger.exception("no heartbeat")


def _used_bytes(device: torch.device, process: psutil.Process) -> int:
    if device.type != "cpu" and hasattr(torch.accelerator, "memory_allocated"):
        return int(torch.accelerator.memory_allocated(device))
    return int(process.memory_info().rss)


class Proof:
    """Knows what the weights looked like when they had just been loaded."""

    def __init__(self, modules: Iterable[torch.nn.Module], device: torch.device) -> None:
        self._modules = list(modules)
        self._device = device
        self._fingerprint = fingerprint(self._modules)

    def prove(self) -> Proved:
        """Whether the device still computes and the weights are still the same; frees what the failure left. To be
        called when no task is alive."""
        try:
            gc.collect()
            if self._device.type != "cpu" and hasattr(torch.accelerator, "empty_cache"):
                torch.accelerator.empty_cache()
            _compute(self._device)
            if fingerprint(self._modules) != self._fingerprint:
                return Proved(healthy=False, reason="its weights have changed since they were loaded")
        except Exception as error:
            return Proved(healthy=False, reason=f"{type(error).__name__}: {error}")
        return Proved(healthy=True)


def fingerprint(modules: Iterable[torch.nn.Module]) -> str:
    """An XXH3-128 over samples of the weights."""
    total = xxhash.xxh3_128()
    for module in modules:
        weights = [weight.detach() for weight in module.parameters() if not weight.is_meta and weight.numel()]
        for weight in weights[:: -(-len(weights) // SAMPLED_WEIGHTS) or 1]:
            flat = weight.reshape(-1) if weight.is_contiguous() else weight[:1].reshape(-1)
            sample = flat[:: -(-flat.numel() // SAMPLED_ELEMENTS)].cpu().contiguous()
            total.update(sample.view(torch.uint8).numpy().data)
    return total.hexdigest()


def _compute(device: torch.device) -> None:
    """Raises RuntimeError if a product of small whole numbers is not what it has to be."""
    left = torch.arange(4096, dtype=torch.float32, device=device).reshape(64, 64) % 7
    product = (left @ left.T).cpu()
    expected = (left.cpu().long() @ left.cpu().long().T).float()
    if not torch.equal(product, expected):
        raise RuntimeError("the device computes wrong")

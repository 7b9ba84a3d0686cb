"""What a stage measures and checks of its device and its weights."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import psutil
import torch

from triptych.transfer import tensors_in


def is_finite(value: Any) -> bool:
    """Whether every floating tensor in a (nested) result is free of NaN and infinity; of a latent distribution, its
    parameters."""
    if isinstance(value, dict) and "latent_dist" in value:
        value = getattr(value["latent_dist"], "parameters", None)
    return all(bool(torch.isfinite(t).all()) for t in tensors_in(value) if t.is_floating_point())


def first_bad_weight(module: torch.nn.Module) -> str | None:
    """The name of the first parameter or buffer that holds NaN or infinity, None if all are sound."""
    for named in (module.named_parameters(), module.named_buffers()):
        for name, weight in named:
            if weight.is_floating_point() and not weight.is_meta and not is_finite(weight):
                return name
    return None


def _accelerated(device: torch.device) -> bool:
    return device.type != "cpu" and hasattr(torch.accelerator, "max_memory_allocated")


def reset_peak(device: torch.device) -> None:
    """Starts a new peak on a device that counts; a CPU process' resident memory has no such switch."""
    if _accelerated(device) and hasattr(torch.accelerator, "reset_peak_memory_stats"):
        torch.accelerator.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The peak of allocated device memory since `reset_peak`; on a CPU the process' peak of resident memory (where
    the system does not tell it, what is resident now)."""
    if _accelerated(device):
        return int(torch.accelerator.max_memory_allocated(device))
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return int(psutil.Process().memory_info().rss)

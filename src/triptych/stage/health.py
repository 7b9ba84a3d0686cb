"""What a stage measures and checks of its device and its weights."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from triptych.transfer import tensors_in


def is_finite(value: Any) -> bool:
    """Whether every floating tensor in a (nested) result is free of NaN and infinity."""
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
    """The peak of allocated device memory since `reset_peak`; on a CPU the process' resident bytes now."""
    if _accelerated(device):
        return int(torch.accelerator.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)

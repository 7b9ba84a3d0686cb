"""Which device, which dtype, how much memory is free: asked of torch.accelerator, whatever its vendor."""

from __future__ import annotations

import re

import psutil
import torch

from triptych.errors import DeviceError, InvalidRequest

DEVICES = ("auto", "cpu", "cuda", "xpu", "mps")
NAMED = re.compile(r"(?P<name>auto|cpu)|(?P<kind>cuda|xpu|mps)(?::(?P<index>[0-9]{1,4}))?")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def accelerator() -> torch.device | None:
    """The accelerator that torch sees here, None if there is none."""
    return torch.accelerator.current_accelerator(check_available=True)


def pick_device(name: str = "auto") -> torch.device:
    """`auto`: the accelerator if there is one, else the CPU; or a kind, with an index such as `xpu:1`.

    Raises InvalidRequest for an unknown kind, DeviceError for one that is not here.
    """
    found = NAMED.fullmatch(name)
    if found is None:
        raise InvalidRequest.of("device", name, [*DEVICES, "cuda:N, xpu:N (N the device's number)"])
    kind, index = found["kind"] or found["name"], found["index"]
    here = accelerator()
    if kind == "auto":
        return here or torch.device("cpu")
    if kind == "cpu":
        return torch.device("cpu")
    if here is None or here.type != kind:
        has = "cpu" if here is None else f"cpu, {here.type}"
        raise DeviceError(f"given {name!r}; this machine has: {has}", field="device")
    count = torch.accelerator.device_count()
    if index and int(index) >= count:
        raise DeviceError(f"given {name!r}; this machine has {count} of them", field="device")
    return torch.device(kind, int(index)) if index else torch.device(kind)


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype | None:
    """The dtype of that name; None stays None (as on disk). Raises InvalidRequest."""
    if name is None:
        return torch.float32 if device.type == "cpu" else None
    if name not in DTYPES:
        raise InvalidRequest.of("dtype", name, DTYPES)
    return DTYPES[name]


def free_bytes(device: torch.device) -> int:
    """Bytes that new work may take on a device: unused, and on a CPU what the system can free."""
    if device.type in ("cpu", "mps"):
        return int(psutil.virtual_memory().available)
    free, _ = torch.accelerator.get_memory_info(device)
    return int(free)

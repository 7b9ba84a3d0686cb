"""Tensors on an accelerator reach the host through pinned memory on a stream of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def to_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors, those on a device copied to the host; the copies wait for what was queued on the device so far, and
    hold up nothing that is queued after. The calling thread waits for them."""
    if all(tensor.is_cpu for tensor in tensors):
        return list(tensors)
    found: list[torch.Tensor] = []
    streams: dict[torch.device, torch.Stream] = {}
    for tensor in tensors:
        if tensor.device.type == "cpu":
            found.append(tensor)
        elif not _has_streams(tensor.device):
            found.append(tensor.to("cpu"))
        else:
            stream = streams.get(tensor.device)
            if stream is None:
                stream = streams[tensor.device] = torch.Stream(tensor.device)
                stream.wait_stream(torch.accelerator.current_stream(tensor.device))
            found.append(_staged(tensor, stream))
    for stream in streams.values():
        stream.synchronize()
    return found


def _has_streams(device: torch.device) -> bool:
    here = torch.accelerator.current_accelerator(check_available=True)
    return here is not None and here.type == device.type and device.type != "mps"


def _staged(tensor: torch.Tensor, stream: torch.Stream) -> torch.Tensor:
    with stream:
        # Contiguous first, on the device, where it is fast; pinned memory is pooled by torch's own allocator.
        dense = tensor.contiguous()
        pinned = torch.empty(dense.shape, dtype=dense.dtype, pin_memory=True)
        pinned.copy_(dense, non_blocking=True)
        tensor.record_stream(stream)
    return pinned

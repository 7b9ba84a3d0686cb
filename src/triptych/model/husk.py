"""Components that a stage only looks at: right in their settings, without weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from triptych.model.load import Components, Placement, checked_weights, meta_component
from triptych.model.topology import ComponentInfo

__all__ = ["husk"]


def husk(components: Components, info: ComponentInfo, placement: Placement, buffers: Iterable[str]) -> Any:
    """The component on the meta device, which says that it is where, and of the dtype that, the loaded one would be:
    pipelines ask their components where to compute.

    `buffers` are attributes whose buffers are read from the files after all, a few numbers such as a VAE's latent
    statistics (`latents_mean`, `bn`). Raises LoadError.
    """
    module = meta_component(components.source, info, components.trust)
    dtype = _dtype(info, placement)
    anchor = torch.nn.Parameter(torch.empty(0, device=placement.device, dtype=dtype), False)
    vars(module)["_parameters"] = {"anchor": anchor, **module._parameters}
    wanted = {name for name, _ in module.named_buffers() if name.split(".")[0] in buffers}
    if wanted:
        for name, tensor in _read(components, info, wanted).items():
            owner, _, attribute = name.rpartition(".")
            value = tensor.to(placement.device, dtype if tensor.is_floating_point() else tensor.dtype)
            module.get_submodule(owner)._buffers[attribute] = value
    return module


def _read(components: Components, info: ComponentInfo, names: set[str]) -> dict[str, torch.Tensor]:
    """These tensors of the component's files. The files are fetched for it, where they are still on a hub."""
    weights = checked_weights(components.source, info, components.trust)
    found: dict[str, torch.Tensor] = {}
    for file in () if weights.pickle else weights.files:
        path = Path(components.source.folder) / info.subfolder / file
        with safe_open(str(path), framework="pt") as content:
            found.update({name: content.get_tensor(name) for name in names & set(content.keys())})
    return found


def _dtype(info: ComponentInfo, placement: Placement) -> torch.dtype:
    """The dtype that loading gives."""
    on_disk = getattr(torch, info.dtype or "", None)
    if placement.device.type == "cpu" or not isinstance(on_disk, torch.dtype) or not on_disk.is_floating_point:
        return placement.dtype or torch.float32
    return placement.dtype or on_disk

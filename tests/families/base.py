"""What a family of tiny models is, for the tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class Family:
    """A tiny random model and a small run of it.

    `builder` makes the standard diffusers pipeline that is saved as the folder. `fields` are a request's, in the
    pipeline's own names; `guidance_scale` is the request's; `standard` what the standard pipeline's `__call__` is
    given to do the same.
    """

    name: str
    builder: Callable[[], Any]
    fields: dict[str, Any]
    guidance_scale: float | None
    standard: dict[str, Any]
    off: dict[str, Any] = field(default_factory=dict)
    """What changes in `standard` when guidance is off."""
    unguided: float = 1.0
    """The request's guidance_scale that means off."""
    two: dict[str, Any] = field(default_factory=dict)
    """What changes in `fields` and `standard` for two prompts with two outputs each; {} where a family cannot."""
    two_standard: dict[str, Any] = field(default_factory=dict)
    """What changes in `standard` for them, where that is something else."""


STILL = {"height": 64, "width": 64}
PROMPT = {"prompt": "a photo of a cat"}
BOTH = {**PROMPT, "negative_prompt": "bad quality"}
TWO_PROMPTS = {"prompt": ["a photo of a cat", "make the sky red"]}
TWO_NEGATIVES = {"negative_prompt": ["bad quality", "blurry"]}
"""What the families' runs ask for."""


def guided(
    name: str, builder: Callable[[], Any], fields: dict[str, Any], scale: float, key: str = "guidance_scale",
    unguided: float = 1.0, switchable: bool = True, **more: Any,
) -> Family:  # fmt: skip
    """A family whose standard pipeline takes the guidance as `key`, and is without it at `unguided`."""
    off = {key: unguided} if switchable else {}
    return Family(name, builder, fields, scale, {**fields, key: scale}, off=off, unguided=unguided, **more)


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    """A picture of noise."""
    values = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@torch.no_grad()
def randomize(module: torch.nn.Module, seed: int) -> Any:
    """Random weights of plausible scale everywhere, in tensors too that start as zeros (adaLN, projections out)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(noise * max(parameter[0].numel(), 1) ** -0.5)
        elif "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.05 * noise)
        else:
            parameter.copy_(0.02 * noise)
    return module.eval()


def seeded(seed: int, make: Callable[[], Any]) -> Any:
    """A model whose own initialisation is drawn from `seed`, without touching the process' generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()

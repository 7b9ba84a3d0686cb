"""What a deployment lets a request ask for, below what the model could do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from triptych.config import BoundsSection
from triptych.errors import InvalidRequest
from triptych.model import made_size
from triptych.request import Request

if TYPE_CHECKING:
    from triptych.model import Extent, Topology

__all__ = ["check_bounds", "check_extent"]


def check_bounds(bounds: BoundsSection, topology: Topology, request: Request) -> None:
    """Raises InvalidRequest naming the first field of a request, its defaults filled in, that asks for more than the
    deployment gives."""
    width, height = made_size(topology, request)
    timesteps = request.extra.get("timesteps")
    asked = {
        "width": (width, bounds.width),
        "height": (height, bounds.height),
        "num_frames": (request.num_frames, bounds.frames),
        "num_inference_steps": (request.num_inference_steps, bounds.steps),
        "sigmas": (request.sigmas and len(request.sigmas), bounds.steps),
        "extra.timesteps": (len(timesteps) if isinstance(timesteps, list) else None, bounds.steps),
        "num_outputs": (len(request.prompts) * request.num_outputs, bounds.outputs),
        "images": (len(request.images), bounds.images),
    }
    for field, (given, most) in asked.items():
        if given is not None and most is not None and given > most:
            raise InvalidRequest.of(field, given, f"at most {most} here")
    if bounds.pixels is not None and width * height > bounds.pixels:
        raise InvalidRequest.of("width", f"{width} × {height}", f"at most {bounds.pixels} pixels here")


def check_extent(bounds: BoundsSection, extent: Extent, most: int) -> None:
    """The same for what a VAE makes or takes, at most so many pictures or clips of it."""
    asked = {
        "height": (extent.height, bounds.height),
        "width": (extent.width, bounds.width),
        "frames": (extent.frames, bounds.frames),
        "batch": (extent.batch, most),
        "pixels": (extent.height * extent.width, bounds.pixels),
    }
    for name, (given, allowed) in asked.items():
        if allowed is not None and given > allowed:
            raise InvalidRequest.of("shape", f"a tensor for a {name} of {given}", f"at most {allowed} here")

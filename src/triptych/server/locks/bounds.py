"""What a deployment lets a request ask for, below what the model could do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from triptych.config import BoundsSection
from triptych.errors import InvalidRequest
from triptych.request import Request

if TYPE_CHECKING:
    from triptych.model import Topology

__all__ = ["check_bounds"]


def check_bounds(bounds: BoundsSection, request: Request, topology: Topology) -> None:
    """Raises InvalidRequest naming the first field that asks for more than the deployment gives."""
    defaults = topology.defaults
    width, height = request.width or defaults.width, request.height or defaults.height
    outputs = len(request.prompts) * request.num_outputs
    asked = {
        "width": (width, bounds.width),
        "height": (height, bounds.height),
        "num_frames": (request.num_frames or defaults.num_frames, bounds.frames),
        "num_inference_steps": (request.num_inference_steps, bounds.steps),
        "sigmas": (None if request.sigmas is None else len(request.sigmas), bounds.steps),
        "num_outputs": (outputs, bounds.outputs),
        "images": (len(request.images), bounds.images),
    }
    for field, (given, most) in asked.items():
        if given is not None and most is not None and given > most:
            raise InvalidRequest.of(field, given, f"at most {most} here")
    if width and height and bounds.pixels is not None and width * height > bounds.pixels:
        raise InvalidRequest.of("width", f"{width} × {height}", f"at most {bounds.pixels} pixels here")

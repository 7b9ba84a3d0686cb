"""The model's VAE called by itself: what may be asked of it, and how large what comes of it is. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from PIL import Image
from PIL.Image import Resampling

from triptych.errors import InvalidRequest, NotEnoughMemory, Unsupported
from triptych.model.door import decoding_bytes
from triptych.model.topology import StageName, Topology
from triptych.request import MAX_OUTPUTS, MAX_SIDE, VaeTask

__all__ = ["Extent", "VaeCall", "VaeOptions", "check_memory", "extent_of", "picture_call", "vae_stage"]

ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}
PATCH = 2
"""Packed latents come in patches of so many along width and height."""
MAX_FRAMES = 10_000


@dataclass(frozen=True)
class VaeOptions:
    """How the latents are scaled, and what is to become of what a decode makes.

    `scaling_factor` and `shift_factor` are divided by and added before decoding, the other way round after encoding;
    with `do_scaling` those that are left out, and the latents' mean and deviation, are the VAE's own. `height` and
    `width`: pixels of what packed latents stand for. `output`: the tensor as the VAE makes it (`raw`), its frames one
    after another in 0…1 (`unit`), pictures (`images`) or clips (`videos`).
    """

    scaling_factor: float | None = None
    shift_factor: float | None = None
    do_scaling: bool = False
    height: int | None = None
    width: int | None = None
    output: Literal["raw", "unit", "images", "videos"] = "raw"

    def check(self) -> None:
        """Raises InvalidRequest for factors that no number comes of."""
        for name in ("scaling_factor", "shift_factor"):
            factor = getattr(self, name)
            if factor is not None and not math.isfinite(factor):
                raise InvalidRequest.of(name, factor, "a finite number")
        if self.scaling_factor == 0:
            raise InvalidRequest.of("scaling_factor", self.scaling_factor, "a number other than 0")


@dataclass(frozen=True)
class VaeCall:
    """What is asked of the VAE, without the numbers themselves. Latents are (batch, channels, [frames,] height,
    width), or packed (batch, patches, 4 × channels); pixels are floats in −1…1 (batch, 3, [frames,] height, width), or
    uint8 (batch, height, width, 3)."""

    task: VaeTask
    shape: tuple[int, ...]
    dtype: str
    options: VaeOptions = VaeOptions()

    @property
    def bytes(self) -> int:
        """Of the tensor that comes with it."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class Extent:
    """Pictures, or clips of some frames, on the pixels' side of the VAE."""

    batch: int
    frames: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        """Of all frames of all of them."""
        return self.batch * self.frames * self.height * self.width


def vae_stage(topology: Topology, task: VaeTask) -> StageName:
    """The stage whose VAE does it: the first that holds one encodes, the last decodes. Raises Unsupported."""
    holders: list[StageName] = [stage.name for stage in topology.stages if "vae" in stage.loads]
    if not holders:
        raise Unsupported(f"{topology.source.name} has no VAE to call by itself")
    return holders[0] if task == "vae.encode" else holders[-1]


def extent_of(topology: Topology, call: VaeCall) -> Extent:
    """How large the pixels are that a call makes or takes. Raises InvalidRequest for a tensor that the model's VAE
    cannot take: nothing but its shape and dtype is needed to tell."""
    call.options.check()
    decodes = call.task == "vae.decode"
    allowed = [name for name in ITEM_SIZES if not (decodes and name == "uint8")]
    if call.dtype not in allowed:
        raise InvalidRequest.of("dtype", call.dtype, allowed)
    if any(size < 1 for size in call.shape):
        raise InvalidRequest.of("shape", list(call.shape), "sizes of at least 1")
    extent = _decoded(topology, call) if decodes else _encoded(topology, call)
    for name, given, most in (
        ("batch", extent.batch, MAX_OUTPUTS),
        ("frames", extent.frames, MAX_FRAMES),
        ("height", extent.height, MAX_SIDE),
        ("width", extent.width, MAX_SIDE),
    ):
        if given > most:
            raise InvalidRequest.of("shape", list(call.shape), f"a {name} of at most {most}, not {given}")
    return extent


def check_memory(topology: Topology, extent: Extent, memory: int | None) -> None:
    """Raises NotEnoughMemory for what `memory` bytes will not hold; None: nobody knows."""
    needed = decoding_bytes(topology, extent.width, extent.height, extent.frames, extent.batch)
    if memory is not None and needed > max(memory, 2**30):
        raise NotEnoughMemory(
            f"{extent.batch} × {extent.frames} × {extent.height} × {extent.width} pixels take about "
            f"{needed / 2**30:.1f} GiB, {memory / 2**30:.1f} GiB are free",
            field="shape",
        )


def _decoded(topology: Topology, call: VaeCall) -> Extent:
    channels, scale = topology.latent_channels, topology.latent_scale
    if len(call.shape) == 3:
        return _unpacked(topology, call)
    if len(call.shape) not in (4, 5) or call.shape[1] != channels:
        raise InvalidRequest.of("shape", list(call.shape), f"batch, {channels} channels, [frames,] height, width")
    frames = _frames_decoded(topology, call.shape[2]) if len(call.shape) == 5 else 1
    height, width = (size * scale for size in call.shape[-2:])
    for name, own in (("height", height), ("width", width)):
        given = getattr(call.options, name)
        if given is not None and given != own:
            raise InvalidRequest.of(name, given, f"{own}, which latents of this shape stand for")
    return Extent(call.shape[0], frames, height, width)


def _frames_decoded(topology: Topology, latents: int) -> int:
    if topology.makes == "video":
        return (latents - 1) * (topology.temporal_scale or 1) + 1
    if latents != 1:
        raise InvalidRequest.of("shape", f"{latents} frames", "1 frame: this model makes pictures")
    return 1


def _unpacked(topology: Topology, call: VaeCall) -> Extent:
    """Of patches of 2 × 2 latents, as the pipelines that make pictures pack them."""
    if topology.makes == "video":
        raise InvalidRequest.of("shape", list(call.shape), "batch, channels, frames, height, width for clips")
    height, width = call.options.height, call.options.width
    if height is None or width is None:
        raise InvalidRequest.of("height", None, "height and width in pixels, with packed latents")
    step, channels = topology.latent_scale * PATCH, topology.latent_channels * PATCH * PATCH
    for name, given in (("height", height), ("width", width)):
        if given < step or given % step:
            raise InvalidRequest.of(name, given, f"multiples of {step}")
    patches = (height // step) * (width // step)
    if call.shape[1:] != (patches, channels):
        raise InvalidRequest.of(
            "shape", list(call.shape), f"batch, {patches}, {channels} for packed latents of {height} × {width}"
        )
    return Extent(call.shape[0], 1, height, width)


def _encoded(topology: Topology, call: VaeCall) -> Extent:
    shape, scale = call.shape, topology.latent_scale
    rows = call.dtype == "uint8"
    if rows and (len(shape) != 4 or shape[-1] != 3):
        raise InvalidRequest.of("shape", list(shape), "batch, height, width, 3 for uint8")
    if not rows and (len(shape) not in (4, 5) or shape[1] != 3):
        raise InvalidRequest.of("shape", list(shape), "batch, 3, [frames,] height, width")
    height, width = shape[1:3] if rows else shape[-2:]
    frames, every = (shape[2] if len(shape) == 5 else 1), topology.temporal_scale or 1
    if height % scale or width % scale:
        raise InvalidRequest.of("shape", list(shape), f"height and width in multiples of {scale}")
    if frames != 1 and (topology.makes != "video" or (frames - 1) % every):
        allowed = f"{every} × k + 1 frames" if topology.makes == "video" else "1 frame: this model makes pictures"
        raise InvalidRequest.of("shape", list(shape), allowed)
    return Extent(shape[0], frames, height, width)


def picture_call(topology: Topology, image: Image.Image, options: VaeOptions) -> tuple[VaeCall, bytearray]:
    """A call that encodes an RGB picture, and its pixels. A side that is no multiple of the VAE's is made a little
    shorter, as diffusers' image processor does. Raises InvalidRequest for a picture smaller than a latent."""
    scale = topology.latent_scale
    width, height = (side - side % scale for side in image.size)
    if not (width and height):
        raise InvalidRequest.of("image", f"{image.width} × {image.height} pixels", f"at least {scale} × {scale}")
    if (width, height) != image.size:
        image = image.resize((width, height), Resampling.LANCZOS)
    return VaeCall("vae.encode", (1, height, width, 3), "uint8", options), bytearray(image.convert("RGB").tobytes())

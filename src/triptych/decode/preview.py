"""Previews: a linear map from the VAE's latents to RGB, fitted to the VAE itself.

Fitted once: random pictures of plain shapes are encoded, then least squares from a latent pixel and its neighbours to
the four pixels that it becomes (diffusion UIs' hand-made "latent RGB factors", measured instead). A VAE that cannot
encode decodes random latents for that. A process without the VAE is given the map as bytes, and runs the decode blocks
up to where the VAE would be called on a VAE without weights.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from triptych.decode.stage import pictures
from triptych.errors import LoadError, Unsupported, WrongPayload
from triptych.model import (
    ComponentInfo,
    Components,
    Placement,
    Source,
    StageProgram,
    TaskInputs,
    Topology,
    Trust,
    boundary,
    load_component,
    meta_component,
    program,
)
from triptych.stage import middle_of
from triptych.transfer import Payload, payload_of, payload_parts

MAX_BUFFER = 1 << 16
"""Elements of a VAE's buffer that goes along with the map: statistics of latents have a few per channel."""

SIDE = 16
"""Latent pixels along each side of the samples that the map is fitted to."""
SAMPLES, AT_ONCE = 24, 6
"""How many samples, in all and in one batch; no more than one batch of those above WIDE pixels."""
WIDE = 128
ENOUGH = 8
"""Latent pixels to fit to for each number of the map; where there are fewer, it does without the neighbours."""
SHAPES = 6
"""in every picture"""
RIDGE = 1e-3
REACH, SCALE = 3, 2
"""Pixels of a preview are made from REACH × REACH latent pixels, SCALE × SCALE of them for each."""


class _Reached(Exception):
    """The decode blocks have come to the VAE, with these latents."""

    def __init__(self, latents: torch.Tensor) -> None:
        super().__init__("reached the VAE")
        self.latents = latents


class LatentPreview:
    """Makes a picture twice as wide and high as the latents, from latents as they cross to decode.

    `program` is the decode stage's: its blocks unpack and denormalise, and its VAE teaches the map. With a `tiny` VAE
    (one that takes the place of the model's own, such as TAESD), that decodes previews instead, at full size.
    """

    def __init__(self, program: StageProgram, tiny: Any = None, weights: torch.Tensor | None = None) -> None:
        self._program = program
        self._tiny = tiny
        self._weights = weights

    @property
    def nbytes(self) -> int:
        """Bytes of the map, once it is fitted."""
        return 0 if self._weights is None else self._weights.nbytes

    def __call__(self, fields: dict[str, Any], latents: torch.Tensor) -> torch.Tensor:
        """uint8 (height, width, 3) of the first picture of the batch (of a clip: its middle frame)."""
        if self._tiny is not None:
            return self._tiny_picture(fields, latents)
        z = self._vae_input(fields, latents)
        if self._weights is None:
            self._weights = self._fit(fields, latents)
        z = z[:1, :, z.shape[2] // 2] if z.ndim == 5 else z[:1]
        reach = REACH if len(self._weights) - 1 > z.shape[1] else 1
        rgb = _neighbourhoods(z.float(), reach) @ self._weights[:-1] + self._weights[-1]
        shown = F.pixel_shuffle(rgb.permute(0, 3, 1, 2), SCALE)[0].permute(1, 2, 0)
        return (shown.clamp(0, 1) * 255).round().to(torch.uint8).cpu()

    def learn(self, fields: dict[str, Any], latents: torch.Tensor) -> None:
        """Fits the map now, for latents of that dtype; `latents` and the fields of their task are an example."""
        self._weights = self._fit(fields, latents)

    def to_bytes(self) -> bytes:
        """The map, for `from_bytes` in another process. Raises Unsupported before it is fitted."""
        if self._weights is None:
            raise Unsupported("no map from latents to colours has been fitted", field="preview")
        vae = self._vae()
        named = dict(vae.named_buffers())
        beside = [name for name in named if name.split(".")[0] not in ("encoder", "decoder")]
        buffers = {name: named[name].cpu() for name in beside if named[name].numel() <= MAX_BUFFER}
        dtype = str(vae.dtype).removeprefix("torch.")
        values = {"weights": self._weights.cpu(), "buffers": buffers, "dtype": dtype}
        return b"".join(payload_parts(Payload(values)))

    @classmethod
    def from_bytes(cls, data: bytes, topology: Topology, placement: Placement, trust: Trust) -> LatentPreview:
        """What `to_bytes` gave, on `placement`'s device, of the same model. Needs none of the decode stage's weights.
        Raises WrongPayload or LoadError."""
        values = payload_of(data).values
        weights, dtype = values.get("weights"), getattr(torch, str(values.get("dtype")), None)
        if not (isinstance(weights, torch.Tensor) and isinstance(dtype, torch.dtype)):
            raise WrongPayload("no map from latents to colours", field="preview")
        if weights.ndim != 2 or weights.shape[1] != 3 * SCALE**2:
            raise WrongPayload("no map from latents to colours", field="preview")
        own = Placement(placement.device, dtype)
        husks = _Husks(topology.source, trust, values.get("buffers", {}))
        return cls(_loaded(topology, husks, own), weights=weights.to(placement.device))

    @classmethod
    def with_tiny(cls, tiny: Any, topology: Topology, placement: Placement, trust: Trust) -> LatentPreview:
        """Previews by a tiny VAE where the decode stage's weights are not. Raises LoadError."""
        return cls(_loaded(topology, _Husks(topology.source, trust, {}), placement), tiny)

    def _tiny_picture(self, fields: dict[str, Any], latents: torch.Tensor) -> torch.Tensor:
        made = pictures(Payload(self._program.run(_task(fields, latents), {"vae": self._tiny}).values))
        first = next(iter(made.values.values()))[0]
        return first[len(first) // 2] if first.ndim == 4 else first

    def _vae(self) -> Any:
        vae = self._program.components.get("vae")
        if vae is None or not hasattr(vae, "decode"):
            raise Unsupported("this model has no VAE to make previews with", field="preview")
        return vae

    def _vae_input(self, fields: dict[str, Any], latents: torch.Tensor) -> torch.Tensor:
        """The argument that the decode blocks give to the VAE: (batch, channels, [frames,] height, width)."""
        vae = self._vae()

        def reached(z: torch.Tensor, *_: Any, **__: Any) -> None:
            raise _Reached(z)

        try:
            self._program.run(_task(fields, latents), {"vae": _with_decode(vae, reached)})
        except _Reached as end:
            return end.latents
        raise Unsupported("this model's decode blocks never call the VAE: no previews", field="preview")

    def _fit(self, fields: dict[str, Any], latents: torch.Tensor) -> torch.Tensor:
        """(REACH² · channels + 1, 3 · SCALE²) in fp32, or (channels + 1, …) without the neighbours: RGB in 0…1 from
        latents, the last row the bias."""
        like = self._vae_input(fields, torch.zeros_like(latents))
        blank = torch.zeros(1, like.shape[1], *((1,) if like.ndim == 5 else ()), SIDE, SIDE).to(like)
        side = self._vae().decode(blank, return_dict=False)[0].shape[-1]
        count = SAMPLES if side <= WIDE else AT_ONCE
        sample, rgb = self._encoded(blank, side, count) or self._decoded(fields, latents, count)
        reach = REACH if count * SIDE**2 > ENOUGH * REACH**2 * sample.shape[1] else 1
        columns = _neighbourhoods(sample, reach).flatten(0, 2)
        columns = torch.cat([columns, torch.ones_like(columns[:, :1])], 1).double()
        target = F.pixel_unshuffle(F.adaptive_avg_pool2d(rgb, SCALE * SIDE), SCALE)
        target = target.permute(0, 2, 3, 1).flatten(0, 2).double()
        ridge = RIDGE * len(columns) * torch.eye(columns.shape[1], dtype=torch.float64, device=columns.device)
        weights = torch.linalg.solve(columns.T @ columns + ridge, columns.T @ target).float()
        if not weights.isfinite().all():
            raise Unsupported("this model's VAE makes no numbers of plain latents: no previews", field="preview")
        return weights

    def _encoded(self, blank: torch.Tensor, side: int, count: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Pictures, (count, 3, side, side) in 0…1, after their latents, (count, channels, SIDE, SIDE); None if the VAE
        cannot encode, or not to latents like `blank`."""
        vae = self._vae()
        rgb = _plain_pictures(count, side, torch.Generator().manual_seed(0))
        given = (2 * rgb - 1).to(blank).reshape(count, 3, *blank.shape[2:-2], side, side)
        try:
            found = torch.cat([middle_of(vae.encode(part)) for part in given.split(AT_ONCE)]).float()
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a VAE of one direction only does
            return None
        if found.shape != (count, *blank.shape[1:]) or not found.isfinite().all():
            return None
        return found.reshape(count, -1, SIDE, SIDE), rgb.to(found.device)

    def _decoded(self, fields: dict[str, Any], latents: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same by decoding: smooth random latents, and what becomes of them (of a clip the first frame)."""
        # What stands before the VAE is affine per channel: zeros and ones tell it, whatever the request's size.
        low, high = (self._vae_input(fields, torch.full_like(latents, value)).float() for value in (0.0, 1.0))
        channels = low.shape[1]
        mean = low.transpose(0, 1).reshape(channels, -1)[:, 0]
        std = high.transpose(0, 1).reshape(channels, -1)[:, 0] - mean
        generator = torch.Generator().manual_seed(0)
        sample = _smooth_noise(count, channels, generator).to(low.device) * std[:, None, None] + mean[:, None, None]
        given = (sample.unsqueeze(2) if low.ndim == 5 else sample).to(latents.dtype)
        made = torch.cat([self._vae().decode(part, return_dict=False)[0].float() for part in given.split(AT_ONCE)])
        rgb = made.reshape(count, 3, -1, *made.shape[-2:])[:, :, 0] / 2 + 0.5
        return sample, rgb.clamp(0, 1)


def _neighbourhoods(latents: torch.Tensor, reach: int) -> torch.Tensor:
    """(batch, height, width, reach² · channels): every latent pixel with those around it."""
    batch, _, height, width = latents.shape
    padded = F.pad(latents, [reach // 2] * 4, mode="replicate")
    return F.unfold(padded, reach).transpose(1, 2).reshape(batch, height, width, -1)


class _Husks(Components):
    """Components without weights that say that they are where, and of the dtype that, loaded ones would be.
    `buffers` are the few numbers of a VAE that are read before it decodes."""

    def __init__(self, source: Source, trust: Trust, buffers: Mapping[str, torch.Tensor]) -> None:
        super().__init__(source, trust)
        self._buffers = buffers

    def get(self, spec: ComponentInfo, placement: Placement) -> Any:
        """The component's husk."""
        module = meta_component(self.source, spec, self.trust)
        if not isinstance(module, torch.nn.Module):
            return module
        anchor = torch.nn.Parameter(torch.empty(0, device=placement.device, dtype=placement.dtype), False)
        vars(module)["_parameters"] = {"anchor": anchor, **module._parameters}
        for name, buffer in dict(module.named_buffers()).items():
            if name in self._buffers and self._buffers[name].shape == buffer.shape:
                owner, _, attribute = name.rpartition(".")
                module.get_submodule(owner)._buffers[attribute] = self._buffers[name].to(placement.device)
        return module


def _loaded(topology: Topology, components: Components, placement: Placement) -> StageProgram:
    decode = program(topology, "decode")
    decode.load(components, placement)
    return decode


def learn_preview(decode: StageProgram, trust: Trust) -> LatentPreview:
    """Previews fitted before any task came: the latents' shape is learned by running the denoise blocks without
    weights, or guessed. Raises Unsupported where the fit fails."""
    topology, preview = decode.topology, LatentPreview(decode)
    vae = preview._vae()
    sides = {name: getattr(topology.defaults, name) for name in ("width", "height", "num_frames")}
    declared = {item.name for item in topology.stage("denoise").request_inputs}
    fields = {name: value for name, value in sides.items() if name in declared and value is not None}
    reason: Exception | None = None
    for shape in _latent_shapes(topology, trust):
        try:
            preview.learn(fields, torch.zeros(shape, dtype=vae.dtype, device=vae.device))
        except Exception as error:  # whatever a family's code makes of latents of another shape
            reason = reason or error
        else:
            return preview
    raise Unsupported(f"no map from latents to colours could be fitted ({reason})", field="preview")


def _latent_shapes(topology: Topology, trust: Trust) -> Iterator[tuple[int, ...]]:
    """What the latents that cross may be shaped like, the likeliest first."""
    found = (item.shape for item in boundary(topology, trust=trust).get("denoise", ()) if item.name == "latents")
    yield from (shape for shape in found if shape is not None)
    channels = topology.latent_channels
    time = (1,) if topology.makes == "video" else ()
    yield (1, channels, *time, SIDE, SIDE)
    yield (1, 4 * channels, *time, SIDE // 2, SIDE // 2)  # in patches of 2 × 2


def _smooth_noise(samples: int, channels: int, generator: torch.Generator) -> torch.Tensor:
    """(samples, channels, SIDE, SIDE): noise of several coarsenesses, since pictures are flat for the most part."""
    parts = []
    for index in range(samples):
        side = (1, 2, 4, 8)[index % 4]
        coarse = torch.randn(1, channels, side, side, generator=generator)
        parts.append(F.interpolate(coarse, size=(SIDE, SIDE), mode="nearest"))
    return torch.cat(parts)


def _plain_pictures(count: int, side: int, generator: torch.Generator) -> torch.Tensor:
    """(count, 3, side, side) in 0…1: rectangles and ellipses on a ground that changes slowly; every other one blurred,
    as a picture is that is not finished."""
    line = torch.linspace(-1, 1, side)
    y, x = line[:, None], line[None, :]

    def numbers(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    made = []
    for index in range(count):
        down, across = numbers(2) - 0.5
        picture = numbers(3, 1, 1) + (numbers(3, 1, 1) - 0.5) * (down * y + across * x)
        for shape in range(SHAPES):
            left, top = 2 * numbers(2) - 1
            wide, high = 0.5 * numbers(2) + 0.08
            aside, above = ((x - left) / wide).abs(), ((y - top) / high).abs()
            inside = aside**2 + above**2 < 1 if shape % 2 else torch.maximum(aside, above) < 1
            picture = torch.where(inside, numbers(3, 1, 1), picture)
        reach = side // SIDE
        if index % 2 and reach:
            padded = F.pad(picture[None], [reach] * 4, mode="replicate")
            picture = F.avg_pool2d(padded, 2 * reach + 1, stride=1)[0]
        made.append(picture.clamp(0, 1))
    return torch.stack(made)


def load_preview_vae(folder: str, placement: Placement, trust: Trust) -> Any:
    """The tiny VAE of a folder that holds its config.json and weights. Raises LoadError."""
    config = Path(folder) / "config.json"
    try:
        class_name = str(json.loads(config.read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        raise LoadError(f"{config} is no VAE's configuration", field="preview_vae") from None
    info = ComponentInfo("preview_vae", "diffusers", class_name, "")
    return load_component(Source(folder, folder, "folder"), info, placement, trust)


def _task(fields: dict[str, Any], latents: torch.Tensor) -> TaskInputs:
    return TaskInputs(dict(fields), None, torch.Generator().manual_seed(0), values={"latents": latents})


def _with_decode(vae: Any, decode: Callable[..., Any]) -> Any:
    double = copy.copy(vae)
    object.__setattr__(double, "decode", decode)
    return double

"""Previews: a linear map from the VAE's latents to RGB, fitted to the VAE itself.

Fitted once: a few decodes of smooth random latents of the model's own scale, then least squares per latent pixel (the
idea of diffusion UIs' hand-made "latent RGB factors", measured instead). A process without the VAE is given the map as
bytes, and runs the decode blocks up to where the VAE would be called on a VAE without weights.
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
from triptych.transfer import Payload, payload_of, payload_parts

MAX_BUFFER = 1 << 16
"""Elements of a VAE's buffer that goes along with the map: statistics of latents have a few per channel."""

SIDE = 16
"""Latent pixels along each side of the samples that are decoded for the fit."""
SAMPLES = 6


class _Reached(Exception):
    """The decode blocks have come to the VAE, with these latents."""

    def __init__(self, latents: torch.Tensor) -> None:
        super().__init__("reached the VAE")
        self.latents = latents


class LatentPreview:
    """Makes a picture of one latent pixel per pixel from latents as they cross to decode.

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
        rgb = torch.einsum("bchw,cd->hwd", z.float(), self._weights[:-1]) + self._weights[-1]
        return (rgb.clamp(0, 1) * 255).round().to(torch.uint8).cpu()

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
        """(channels + 1, 3) in fp32: RGB in 0…1 from latents, the last row the bias."""
        # What stands before the VAE is affine per channel: zeros and ones tell it, whatever the request's size.
        low, high = (self._vae_input(fields, torch.full_like(latents, value)).float() for value in (0.0, 1.0))
        channels = low.shape[1]
        mean = low.transpose(0, 1).reshape(channels, -1)[:, 0]
        std = high.transpose(0, 1).reshape(channels, -1)[:, 0] - mean
        generator = torch.Generator().manual_seed(0)
        sample = _smooth_noise(SAMPLES, channels, generator).to(low.device) * std[:, None, None] + mean[:, None, None]
        given = (sample.unsqueeze(2) if low.ndim == 5 else sample).to(latents.dtype)
        decoded = self._vae().decode(given, return_dict=False)[0].float()
        rgb = decoded.reshape(SAMPLES, 3, -1, *decoded.shape[-2:])[:, :, 0] / 2 + 0.5
        rgb = F.adaptive_avg_pool2d(rgb.clamp(0, 1), SIDE)
        columns = sample.movedim(1, -1).reshape(-1, channels)
        columns = torch.cat([columns, torch.ones_like(columns[:, :1])], 1).double()
        target = rgb.movedim(1, -1).reshape(-1, 3).double()
        ridge = 1e-3 * len(columns) * torch.eye(channels + 1, dtype=torch.float64, device=columns.device)
        return torch.linalg.solve(columns.T @ columns + ridge, columns.T @ target).float()


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

"""A stage's VAE called by itself, for a task without a request. What differs between families is asked of the VAE: its
configuration, its statistics of latents, the rank of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from triptych.errors import Unsupported, WrongPayload
from triptych.model import TaskOutputs, Topology, VaeOptions
from triptych.stage.arrivals import check_head
from triptych.stage.protocol import StageTask
from triptych.transfer import Header, Payload

TENSOR = "tensor"
"""The name of what goes in, and of what comes out where that is neither pictures nor clips."""
PATCH = 2
STATISTICS = ("latents_mean", "latents_std", "scaling_factor", "shift_factor")


def check_input(payload: Payload | None) -> None:
    """Raises WrongPayload unless it is the one tensor that a VAE is called on."""
    if payload is None or payload.values.keys() != {TENSOR} or not isinstance(payload.values[TENSOR], torch.Tensor):
        raise WrongPayload("a VAE is called on one tensor", field=TENSOR)


def check_input_head(header: Header) -> None:
    """The same of a header, before its body is fetched."""
    check_head(header, (TENSOR,), "a VAE's call")


def run_vae(task: StageTask, topology: Topology, parts: Mapping[str, Any], device: torch.device) -> TaskOutputs:
    """Calls the VAE among `parts` as the task asks. Raises Unsupported where it cannot."""
    vae, options = parts.get("vae"), VaeOptions(**task.fields)
    method = "decode" if task.bare == "vae.decode" else "encode"
    if not callable(getattr(vae, method, None)) or getattr(vae, f"{method}r", vae) is None:
        raise Unsupported(f"this stage holds no VAE that can {method}")
    assert vae is not None and task.payload is not None
    given = task.payload.values[TENSOR].to(device, copy=True)  # what came in belongs to whoever keeps it
    if method == "encode":
        return TaskOutputs({TENSOR: _encoded(vae, given, options)})
    return TaskOutputs(_shaped(_decoded(vae, given, options, topology.latent_scale), options.output))


def _decoded(vae: Any, given: torch.Tensor, options: VaeOptions, latent_scale: int) -> torch.Tensor:
    """Pixels about −1…1, of the latents' rank; packed latents make pictures."""
    latents = given.float()
    if latents.ndim == 3:
        assert options.height and options.width, "checked at the door"
        latents = _unpacked(latents, options.height // latent_scale, options.width // latent_scale)
    mean, scale = _statistics(vae, options, latents)
    latents = latents / scale + mean
    return _in_rank(vae, lambda one: vae.decode(one, return_dict=False)[0], latents)


def _encoded(vae: Any, given: torch.Tensor, options: VaeOptions) -> torch.Tensor:
    """The middle of what the VAE makes of the pixels, scaled, in its dtype."""
    # As diffusers brings pictures to tensors, to the last bit.
    pixels = 2.0 * (given.movedim(-1, 1).float() / 255.0) - 1.0 if given.dtype == torch.uint8 else given
    latents = _in_rank(vae, lambda one: middle_of(vae.encode(one)), pixels)
    mean, scale = _statistics(vae, options, latents)
    return ((latents.float() - mean) * scale).to(latents.dtype)


def middle_of(encoded: Any) -> torch.Tensor:
    """The latents of what a VAE's `encode` returns: of a distribution its mode."""
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    return encoded[0]


def _in_rank(vae: Any, call: Callable[[torch.Tensor], torch.Tensor], given: torch.Tensor) -> torch.Tensor:
    """The call's result in the rank of what was given: clips frame by frame through a VAE of pictures, pictures as
    clips of one frame through one of clips."""
    rank = next((weight.ndim for weight in vae.parameters() if weight.ndim >= 4), 4)
    given = given.to(vae.dtype)
    if given.ndim < rank:
        return call(given.unsqueeze(2)).squeeze(2)
    if given.ndim > rank:
        return call(given.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(given), -1)).transpose(1, 2)
    return call(given)


def _unpacked(latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(batch, channels, height, width) of latents in patches of 2 × 2, as the pipelines pack them."""
    batch, _, channels = latents.shape
    patches = latents.view(batch, height // PATCH, width // PATCH, channels // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, height, width)


def _statistics(vae: Any, options: VaeOptions, latents: torch.Tensor) -> tuple[Any, Any]:
    """What is taken from latents, and what they are multiplied by then: the VAE's own numbers with `do_scaling`, but
    for what is given."""
    own: dict[str, Any] = {}
    if options.do_scaling:
        declared = {**dict(vae.named_buffers(recurse=False)), **{n: v for n, v in vae.config.items() if v is not None}}
        own = {name: declared[name] for name in STATISTICS if name in declared}
        if not own:
            raise Unsupported(
                f"{type(vae).__name__} declares no scaling of its own: scale the latents yourself, and leave "
                "do_scaling out",
                field="do_scaling",
            )
    mean, std = (_per_channel(own.get(f"latents_{name}"), latents) for name in ("mean", "std"))
    scale, shift = (
        own.get(name) if getattr(options, name) is None else getattr(options, name)
        for name in ("scaling_factor", "shift_factor")
    )
    return (mean if mean is not None else 0.0) + (shift or 0.0), (scale or 1.0) / (std if std is not None else 1.0)


def _per_channel(values: Any, latents: torch.Tensor) -> torch.Tensor | None:
    if values is None:
        return None
    found = torch.as_tensor(values, dtype=torch.float32, device=latents.device).flatten()
    return found.view(1, -1, *[1] * (latents.ndim - 2))


def _shaped(made: torch.Tensor, output: str) -> dict[str, torch.Tensor]:
    """What was decoded, as `VaeOptions.output` says."""
    if output == "raw":
        return {TENSOR: made}
    unit = (made * 0.5 + 0.5).clamp(0, 1)
    frames = unit.transpose(1, 2) if unit.ndim == 5 else unit.unsqueeze(1)
    if output == "videos":
        return {"videos": frames}
    return {"images" if output == "images" else TENSOR: frames.flatten(0, 1)}

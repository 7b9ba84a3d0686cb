"""Qwen-Image's video autoencoder on stills: the same modules and weights, run in two dimensions.

A still uses the last of three time taps of every causal convolution and nothing else, so training needs a
third of the arithmetic. `stills(autoencoder)` gives the model's own modules a flat forward while it is open.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders import autoencoder_kl_qwenimage as qwen
from torch import Tensor, nn

CHANNELS = 8
DOWNSAMPLING = 4
PATCH = 2


def build_autoencoder(
    mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> AutoencoderKLQwenImage:
    """The emoji autoencoder: 4 x smaller each way, 8 channels."""
    return AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1],
        num_res_blocks=0,
        temperal_downsample=[False, False],
        latents_mean=list(mean or [0.0] * CHANNELS),
        latents_std=list(std or [1.0] * CHANNELS),
    )


@torch.no_grad()
def initialise(autoencoder: AutoencoderKLQwenImage) -> None:
    """Start for stills: the default counts three time taps in the fan-in where stills use one."""
    for module in autoencoder.modules():
        if isinstance(module, nn.Conv3d | nn.Conv2d):
            weight = module.weight
            spread = math.sqrt(1 / (weight.shape[1] * weight.shape[-1] * weight.shape[-2]))
            weight.zero_()
            used = weight[:, :, -1] if weight.ndim == 5 else weight
            used.normal_(0, spread)
            if module.bias is not None:
                module.bias.zero_()
    for module in autoencoder.modules():
        if isinstance(module, qwen.QwenImageResidualBlock):
            module.conv2.weight.mul_(0.1)
        elif isinstance(module, qwen.QwenImageAttentionBlock):
            module.proj.weight.mul_(0.1)


@torch.no_grad()
def clear_unused_taps(autoencoder: AutoencoderKLQwenImage) -> None:
    """Zero the time taps that stills never read, so that they cost nothing compressed."""
    for parameter in autoencoder.parameters():
        if parameter.ndim == 5 and parameter.shape[2] == 3:
            parameter[:, :, :2] = 0


def _flat_convolution(module: nn.Conv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """Channels last: a quarter faster on CPU."""
    padding = (module.kernel_size[1] // 2, module.kernel_size[2] // 2)
    picture = x.squeeze(2).contiguous(memory_format=torch.channels_last)
    weight = module.weight[:, :, -1].contiguous(memory_format=torch.channels_last)
    return F.conv2d(picture, weight, module.bias, padding=padding).unsqueeze(2)


def _flat_norm(module: qwen.QwenImageRMS_norm, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).sum(1, keepdim=True) + 1e-12) * (module.scale * module.gamma)


@contextmanager
def stills(autoencoder: AutoencoderKLQwenImage) -> Iterator[None]:
    """Run this one model's convolutions and norms flat; the class and other instances stay as they are."""
    flat: list[nn.Module] = []
    for module in autoencoder.modules():
        if isinstance(module, qwen.QwenImageCausalConv3d):
            module.forward = partial(_flat_convolution, module)
            flat.append(module)
        elif isinstance(module, qwen.QwenImageRMS_norm):
            module.forward = partial(_flat_norm, module)
            flat.append(module)
    try:
        yield
    finally:
        for module in flat:
            del module.forward


def encode_stills(autoencoder: AutoencoderKLQwenImage, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance, each (pictures, 8, 16, 16); inside `stills` only."""
    hidden = autoencoder.quant_conv(autoencoder.encoder(pictures.unsqueeze(2)))
    mean, log_variance = hidden.squeeze(2).chunk(2, 1)
    return mean, log_variance


def decode_stills(autoencoder: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    """Pictures from unnormalised latents; inside `stills` only."""
    return autoencoder.decoder(autoencoder.post_quant_conv(latents.unsqueeze(2))).squeeze(2)


def pack(latents: Tensor) -> Tensor:
    """(n, c, h, w) as the transformer's tokens (n, h·w/4, 4c), as the pipeline packs them."""
    n, c, h, w = latents.shape
    tiles = latents.view(n, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return tiles.reshape(n, h * w // PATCH**2, c * PATCH**2)


def unpack(tokens: Tensor) -> Tensor:
    """The inverse of `pack` for square pictures."""
    n, count, width = tokens.shape
    side, c = math.isqrt(count), width // PATCH**2
    tiles = tokens.view(n, side, side, c, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return tiles.reshape(n, c, side * PATCH, side * PATCH)


def latent_statistics(autoencoder: AutoencoderKLQwenImage) -> tuple[Tensor, Tensor]:
    """Per-channel mean and spread, (1, 8, 1, 1) each, from the model's own configuration."""
    config = autoencoder.config
    device = next(autoencoder.parameters()).device
    mean = torch.tensor(config["latents_mean"], device=device).view(1, -1, 1, 1)
    std = torch.tensor(config["latents_std"], device=device).view(1, -1, 1, 1)
    return mean, std

"""Previews: nearer to the picture with every step, by a map fitted to the VAE or by a tiny VAE that is given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from tests.families import folder
from triptych import Engine, LoadError, Progress, Request, Result


def psnr(preview: Image.Image, picture: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB, the preview enlarged to the picture's size."""
    enlarged = np.asarray(preview.resize(picture.size, Image.Resampling.BILINEAR), dtype=np.float64)
    error = np.mean((enlarged - np.asarray(picture, dtype=np.float64)) ** 2)
    return float(10 * np.log10(255**2 / error))


def watch(engine: Engine, request: Request) -> tuple[list[Image.Image], Image.Image]:
    events = list(engine.stream(request, preview=True))
    assert isinstance(events[-1], Result)
    previews = [event.preview for event in events if isinstance(event, Progress) and event.preview is not None]
    return previews, events[-1].images[0]


def test_previews_come_nearer_to_the_picture() -> None:
    # Prompts that leave open where and on what: there the picture is decided on the way.
    prompts = ("a cat", "a rocket left of a fox", "a small penguin, pink background")
    curves = []
    with Engine.open("emoji", device="cpu") as engine:
        for seed, prompt in enumerate(prompts * 2):
            previews, picture = watch(engine, Request.parse(prompt=prompt, seed=seed))
            curves.append([psnr(preview, picture) for preview in previews])
    curve = np.mean(curves, axis=0)
    assert len(curve) == 8
    halves = [float(np.mean(part)) for part in np.array_split(curve, 4)]
    assert halves == sorted(halves), curve
    assert curve[-1] >= 17 and curve[-1] - curve[0] >= 1, curve


def test_a_tiny_vae_decodes_previews_at_full_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8), latent_channels=4
    )
    tiny.save_pretrained(tmp_path / "tiny")
    request = Request.parse(prompt="a cat", width=64, height=64, num_inference_steps=2, max_sequence_length=32, seed=1)
    with Engine.open(
        str(folder("flux")), workflow="text2image", device="cpu", preview_vae=str(tmp_path / "tiny")
    ) as engine:
        previews, picture = watch(engine, request)
    assert [preview.size for preview in previews] == [picture.size] * 2


def test_a_folder_without_a_vae_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="preview_vae"):
        Engine.open(str(folder("flux")), device="cpu", preview_vae=str(tmp_path))

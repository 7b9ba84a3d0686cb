"""Previews: nearer to the picture with every step, by a map fitted to the VAE or by a tiny VAE that is given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from tests.families import folder
from triptych import Engine, LoadError, Progress, Request, Result, Trust, Unsupported, WrongPayload
from triptych.decode import LatentPreview, learn_preview
from triptych.model import Components, Placement, describe, open_model, program
from triptych.transfer import Payload, payload_parts


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
    assert all(len(curve) == 8 and curve[-1] >= 18 for curve in curves), curves
    for curve in curves:
        shown = [curve[step] for step in (2, 4, 7)]
        assert shown == sorted(shown), curve
    mean = np.mean(curves, axis=0).tolist()
    assert mean == sorted(mean) and mean[-1] - mean[0] >= 2, mean


@torch.no_grad()
def test_a_vae_that_cannot_encode_has_previews_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(_: torch.Tensor) -> None:
        raise NotImplementedError

    topology = describe(open_model("emoji"))
    decode = program(topology, "decode")
    decode.load(Components(topology.source), Placement(torch.device("cpu"), torch.float32))
    latents = torch.randn(SHAPES["emoji"], generator=torch.Generator().manual_seed(1))
    shown = LatentPreview(decode)({}, latents)
    monkeypatch.setattr(decode.components["vae"], "encode", encode)
    alone = LatentPreview(decode)({}, latents)
    assert alone.shape == shown.shape == (32, 32, 3) and alone.dtype == torch.uint8
    error = (alone.double() - shown.double()).square().mean()
    assert 0 < error < 255**2 / 10, "another map, to much the same colours"


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


@torch.no_grad()
@pytest.mark.parametrize("family", ["emoji", "flux", "flux2-klein", "qwen-image", "wan-t2v", "ltx", "stable-diffusion"])
def test_the_map_crosses_to_a_process_without_the_vae(family: str) -> None:
    model = family if family == "emoji" else str(folder(family))
    topology = describe(open_model(model))
    placement = Placement(torch.device("cpu"), torch.float32)
    decode = program(topology, "decode")
    decode.load(Components(topology.source), placement)
    learned = learn_preview(decode, Trust())
    far = LatentPreview.from_bytes(learned.to_bytes(), topology, placement, Trust())
    latents = torch.randn(SHAPES.get(family, (1, 4, 8, 8)), generator=torch.Generator().manual_seed(1))
    assert torch.equal(far({}, latents), LatentPreview(decode)({}, latents))
    parts = [part for part in far._program.components.values() if isinstance(part, torch.nn.Module)]
    weights = [item for part in parts for item in part.parameters() if not item.is_meta]
    assert sum(item.numel() for item in weights) == 0


SHAPES = {
    "emoji": (1, 8, 1, 16, 16),
    "flux2-klein": (1, 16, 8, 8),
    "qwen-image": (1, 16, 1, 8, 8),
    "wan-t2v": (1, 16, 2, 8, 8),
    "ltx": (1, 8, 2, 8, 8),
}


@torch.no_grad()
def test_a_map_that_was_not_fitted_or_is_none_is_refused() -> None:
    topology = describe(open_model(str(folder("flux"))))
    placement = Placement(torch.device("cpu"), torch.float32)
    decode = program(topology, "decode")
    decode.load(Components(topology.source), placement)
    with pytest.raises(Unsupported, match="fitted"):
        LatentPreview(decode).to_bytes()
    for weights in (1, torch.zeros(5, 3)):  # the latter of one colour for each latent pixel
        other = b"".join(payload_parts(Payload({"weights": weights, "dtype": "float32"})))
        with pytest.raises(WrongPayload, match="no map"):
            LatentPreview.from_bytes(other, topology, placement, Trust())


def test_a_folder_without_a_vae_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="preview_vae"):
        Engine.open(str(folder("flux")), device="cpu", preview_vae=str(tmp_path))

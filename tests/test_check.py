"""`check_model` says that a sound split is equal, and where a broken one is not."""

from __future__ import annotations

import pytest
import torch

from tests.families import FAMILIES, folder
from triptych import Request, Unsupported
from triptych.check import _difference, check_model


def test_a_sound_split_is_bit_equal() -> None:
    request = Request.parse(prompt="a cat", width=64, height=64, num_inference_steps=2, max_sequence_length=32, seed=3)
    report = check_model(str(folder("flux")), request, workflow="text2image")
    assert report.equal and report.first is None
    assert torch.equal(report.split, report.whole)
    assert report.loads == {
        "encode": ("text_encoder", "text_encoder_2"),
        "denoise": ("transformer",),
        "decode": ("vae",),
    }
    names = [(item.stage, item.name) for item in report.differences]
    assert ("encode", "prompt_embeds") in names and ("denoise", "latents") in names and ("decode", "images") in names


def test_a_difference_is_told_with_its_size() -> None:
    want = torch.tensor([1.0, -4.0])
    (found,) = _difference("denoise", "latents", want + torch.tensor([0.0, 1.0]), want)
    assert (found.equal, found.error, found.relative) == (False, 1.0, 0.25)
    (found,) = _difference("denoise", "latents", torch.zeros(3), want)
    assert not found.equal and found.error == float("inf")


def test_a_model_that_runs_fused_has_nothing_to_check() -> None:
    fused = next(name for name in FAMILIES if "fused" in name or "ddpm" in name)
    with pytest.raises(Unsupported, match="not split"):
        check_model(str(folder(fused)), Request.parse(prompt="x", seed=1))

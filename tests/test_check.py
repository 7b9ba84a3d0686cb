"""`check_model` says that a sound split is equal, and where a broken one is not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.families import FAMILIES, folder
from triptych import Request, Unsupported
from triptych.check import _difference, check_model
from triptych.request import StageName
from triptych.worker import StageProcess


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[StageName, StageProcess]]:
    with StageProcess() as encode, StageProcess() as denoise, StageProcess() as decode:
        yield {"encode": encode, "denoise": denoise, "decode": decode}


def ask(name: str) -> Request:
    """A small run of a family, as a request."""
    family = FAMILIES[name]
    fields = {key: value for key, value in family.fields.items() if key in Request.model_fields}
    if "image" in family.fields:
        images = family.fields["image"]
        fields["images"] = tuple(images) if isinstance(images, list) else (images,)
    return Request.parse(**fields, guidance_scale=family.guidance_scale, seed=3)


# Qwen's blocks write over the values that crossed; Wan 2.2 TI2V runs through its standard pipeline.
@pytest.mark.parametrize("name", ["flux", "qwen-image", "wan-i2v", "sd3", "wan2.2-ti2v"])
def test_a_sound_split_is_bit_equal(name: str, processes: dict[StageName, StageProcess]) -> None:
    report = check_model(str(folder(name)), ask(name), processes=processes)
    assert report.first is None and report.equal
    assert torch.equal(report.split, report.whole)
    assert {item.stage for item in report.differences} >= ({"decode"} if "ti2v" in name else set(report.loads))


def test_each_process_holds_its_own_weights(processes: dict[StageName, StageProcess]) -> None:
    report = check_model(str(folder("flux")), ask("flux"), workflow="text2image", processes=processes)
    assert report.loads == {
        "encode": ("text_encoder", "text_encoder_2"),
        "denoise": ("transformer",),
        "decode": ("vae",),
    }


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

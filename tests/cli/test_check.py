"""`triptych check`: what it asks, what it says of the answer, and its exit code."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.families import folder
from triptych import check as check_module
from triptych.check import CheckReport, Difference
from triptych.cli import main
from triptych.device import DEVICES, accelerator
from triptych.model import StageName, describe, open_model, resolve
from triptych.request import Request


def report(model: str, request: Request, **errors: float) -> CheckReport:
    """A report on a model whose values `latents` and `images` are off by so much."""

    def difference(stage: StageName, name: str, shape: tuple[int, ...]) -> Difference:
        error = errors.get(name, 0.0)
        return Difference(stage, name, shape, "float32", error == 0, error, error)

    differences = (difference("denoise", "latents", (1, 4, 2, 2)), difference("decode", "images", (1, 3, 16, 16)))
    pixels = torch.zeros(1)
    loads = {"encode": ("text_encoder",), "denoise": ("transformer",), "decode": ()}
    return CheckReport(describe(open_model(model)), request, loads, differences, {}, pixels, pixels)  # type: ignore


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Answers in place of three processes, which tests/test_check.py starts; holds what was asked and what to find."""
    found: dict[str, Any] = {"errors": {}}

    def check_model(model: str, request: Request, **options: Any) -> CheckReport:
        options["on_stage"]("encode")
        found.update(request=request, options=options)
        return report(model, request, **found["errors"])

    monkeypatch.setattr(check_module, "check_model", check_model)
    return found


def test_equal(asked: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(folder("flux"))]) == 0
    printed = capsys.readouterr()
    assert printed.err == "running encode\n"
    lines = printed.out.splitlines()
    assert lines[0].endswith("text2image, flux: split over three processes")
    assert "  denoise held transformer" in lines and "  decode held no weights" in lines
    assert ["denoise", "latents", "1×4×2×2", "float32", "bit", "for", "bit"] in [line.split() for line in lines]
    assert lines[-1] == "equal bit for bit"
    request = asked["request"]
    assert (request.num_inference_steps, request.width, request.height) == (2, 128, 128)


def test_different(asked: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    asked["errors"] = {"latents": 1e-3, "images": 2e-2}
    assert main(["check", str(folder("flux")), "-q"]) == 1
    printed = capsys.readouterr()
    assert not printed.err
    assert printed.out.endswith("not equal; first at latents out of denoise: off by 1.00e-03, 1.00e-03 relative\n")
    assert "off by 2.00e-02" in printed.out


def test_different_on_the_way_only(asked: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    asked["errors"] = {"latents": 1e-3}
    assert main(["check", str(folder("flux")), "-q"]) == 1
    assert "the output is equal, but a value on the way differs; first at latents" in capsys.readouterr().out


def test_json(asked: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    asked["errors"] = {"images": 0.5}
    assert main(["check", str(folder("flux")), "-q", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] is False
    assert (found["first_difference"]["name"], found["first_difference"]["error"]) == ("images", 0.5)
    assert [value["equal"] for value in found["values"]] == [True, False]


@pytest.mark.parametrize(
    ("model", "workflow", "images", "frames"),
    [
        ("flux", "image2image", 1, None),
        ("stable-diffusion-img2img", None, 1, None),
        ("qwen-image-edit-plus", None, 1, None),
        ("wan-t2v", None, 0, 5),
    ],
)
def test_asks_what_the_model_can_serve(
    model: str, workflow: str | None, images: int, frames: int | None, asked: dict[str, Any]
) -> None:
    options = ["--workflow", workflow] if workflow else []
    assert main(["check", str(folder(model)), "-q", *options]) == 0
    request = asked["request"]
    assert len(request.images) == images
    resolve(describe(open_model(str(folder(model))), workflow), request)  # refuses what the model does not take
    sided = "img2img" not in model
    assert (request.width is not None, request.height is not None) == (sided, sided)
    assert not sided or all(image.size == (request.width, request.height) for image in request.images)
    assert request.num_frames == frames
    assert asked["options"]["workflow"] == workflow


def test_in_three_processes(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing stands in for anything here. The model takes no width and height: its picture has them."""
    assert main(["check", str(folder("stable-diffusion-img2img")), "--steps", "2", "-q"]) == 0
    printed = capsys.readouterr()
    assert printed.out.endswith("equal bit for bit\n")
    assert "denoise held unet\n" in printed.out
    assert not printed.err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["no-such-model"], "error: model: "),
        (["DDPM"], "error: model: "),
        (["FLUX", "--steps", "0"], "error: num_inference_steps (--steps): given 0; allowed: "),
        (["FLUX", "--workflow", "dance"], "error: workflow: "),
        (["FLUX", "--dtype", "float3"], "error: dtype: "),
        (["IMG2IMG", "--width", "64"], "error: width: given 64; allowed: nothing "),
    ],
)
def test_check_refuses(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    folders = {"DDPM": "ddpm", "FLUX": "flux", "IMG2IMG": "stable-diffusion-img2img"}
    words = [str(folder(folders[word])) if word in folders else word for word in arguments]
    assert main(["check", "-q", *words]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(line) and printed.err.count("\n") == 1


def test_a_device_that_is_not_there_starts_no_process(
    asked: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    here = accelerator()
    absent = next(kind for kind in DEVICES if kind not in ("auto", "cpu") and (here is None or kind != here.type))
    assert main(["check", str(folder("flux")), "--device", absent]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: device: given '{absent}'; this machine has: cpu") and printed.count("\n") == 1
    assert "request" not in asked

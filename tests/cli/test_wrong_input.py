"""Wrong input: one line that names the field, what was given and what is allowed; exit 2; nothing written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import triptych
from tests.families import folder
from triptych.cli import main
from triptych.device import DEVICES, accelerator

SMALL = ["--steps", "2", "--width", "32", "--height", "32", "--device", "cpu"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an input folder beside it, so that whatever appears in it was written."""
    (tmp_path / "in").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `generate` with these arguments, which must be refused, and returns the line that says why."""

    def run(*arguments: str, model: str | Path = "flux") -> str:
        path = model if isinstance(model, Path) or "/" in model or "no-such" in model else folder(model)
        code = main(["generate", "a cat", "-q", "-m", str(path), *SMALL, *arguments])
        printed = capsys.readouterr()
        assert code == 2, printed.err
        assert not printed.out
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
        assert list(here.iterdir()) == []
        return printed.err.removeprefix("error: ").rstrip("\n")

    return run


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A copy of a model's folder, to be damaged."""
    return Path(shutil.copytree(folder("flux"), tmp_path / "in" / "model"))


def weights(model: Path) -> Path:
    return next((model / "transformer").glob("*.safetensors"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--width", "33"], "width"),
        (["--device", "tpu"], "device"),
        (["--dtype", "float3"], "dtype"),
        (["-m", "no-such-model"], "model"),
        (["-m", ""], "model"),
        (["-o", "a.mp4"], "output"),
    ],
)
def test_nothing_is_said_before_an_error(arguments: list[str], field: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a cat", "-m", str(folder("flux")), *SMALL, *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {field}: ") and printed.count("\n") == 1


def test_missing_weights_are_told_before_any_are_loaded(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    next((damaged / "vae").glob("*.safetensors")).unlink()
    assert main(["generate", "a cat", "-m", str(damaged), *SMALL]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: model: component 'vae': no weights in ") and printed.count("\n") == 1


def test_unknown_model(refused: Callable[..., str]) -> None:
    assert refused(model="no-such-model").startswith("model: ")


def test_folder_without_an_index(refused: Callable[..., str], tmp_path: Path) -> None:
    line = refused(model=tmp_path / "in")
    assert line.startswith("model: ") and "model_index.json" in line


def test_missing_weights(refused: Callable[..., str], damaged: Path) -> None:
    weights(damaged).unlink()
    assert "transformer" in refused(model=damaged)


def test_truncated_weights(refused: Callable[..., str], damaged: Path) -> None:
    path = weights(damaged)
    path.write_bytes(path.read_bytes()[:-1000])
    line = refused(model=damaged)
    assert "transformer" in line and path.name in line


def test_weights_that_are_not_numbers(refused: Callable[..., str], damaged: Path) -> None:
    tensors = load_file(weights(damaged))
    name = next(name for name, tensor in tensors.items() if "proj_out" in name or tensor.ndim == 2)
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, weights(damaged))
    line = refused(model=damaged)
    assert "transformer" in line and name in line, "after the first step, by name"


def test_pickled_weights(refused: Callable[..., str], damaged: Path) -> None:
    path = weights(damaged)
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    line = refused(model=damaged)
    assert "transformer" in line and "pickle" in line


def test_remote_code(refused: Callable[..., str], damaged: Path) -> None:
    (damaged / "pipeline.py").write_text("raise SystemExit('ran')\n")
    edit(damaged / "model_index.json", _class_name=["pipeline", "Pipeline"])
    assert "code" in refused(model=damaged)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--width", "33"], "width: given 33; allowed: multiples of "),
        (["--width", "16384", "--height", "16384"], "width, height: "),
        (["--width", "1000000"], "width: given 1000000; allowed: "),
        (["--height", "-1"], "height: given -1; allowed: "),
        (["--aspect-ratio", "wide"], "aspect_ratio: given 'wide'; allowed: "),
        (["--steps", "0"], "num_inference_steps (--steps): given 0; allowed: "),
        (["-n", "0"], "num_outputs (-n): given 0; allowed: "),
        (["--seed", "-1"], "seed: given -1; allowed: "),
        (["--guidance-scale", "nan"], "guidance_scale: given nan; allowed: "),
        (["--strength", "2"], "strength: given 2.0; allowed: "),
        (["--negative-prompt", "x"], "negative_prompt: given 'x'; allowed: nothing"),
        (["--num-frames", "5"], "num_frames: given 5; allowed: nothing"),
        (["--sigmas", "1,two"], "sigmas: given '1,two'; allowed: "),
        (["--sigmas", "1,nan"], "sigmas: given '1,nan'; allowed: "),
        (["--extra", "nothing"], "extra: given 'nothing'; allowed: KEY=JSON"),
        (["--extra", "a=b"], "extra: given 'a=b'; allowed: KEY=JSON"),
        (["--extra", "unknown=1"], "extra: given 'unknown'; allowed: "),
        (["--workflow", "dance"], "workflow: "),
        (["--dtype", "float3"], "dtype: given 'float3'; allowed: "),
        (["--device", "tpu"], "device: given 'tpu'; allowed: auto, cpu, "),
        (["-o", "missing/a.png"], "output: given 'missing/a.png': the folder 'missing' does not exist; allowed: "),
        (["-o", "a.tiff"], "output: given 'a.tiff'; allowed: a file name ending in .png, "),
        (["-o", "a"], "output: given 'a'; allowed: "),
        (["-o", "a.mp4"], "output: given 'a.mp4'; allowed: .png, .webp, .jpg, .jpeg "),
        (["--preview", "missing/p.png"], "preview: given "),
        (["--preview", "p.mp4"], "preview: given 'p.mp4'; allowed: a file name ending in .png, .webp, .jpg, .jpeg"),
        (["--preview-vae", "missing"], "preview_vae: given 'missing'; allowed: with --preview, a folder with "),
        (["--preview-vae", ".", "--preview", "p.png"], "preview_vae: given '.'; allowed: with --preview, a folder "),
        (["--fps", "0.00001"], "fps: given 1e-05; allowed: 0.0001 to "),
        (["--like", "missing.png"], "like: given 'missing.png', no such file; allowed: "),
    ],
)
def test_wrong_values(arguments: list[str], field: str, refused: Callable[..., str]) -> None:
    line = refused(*arguments)
    assert line.startswith(field), line


def test_a_picture_suffix_for_a_clip(refused: Callable[..., str]) -> None:
    assert refused("-o", "a.png", model="wan-t2v").startswith("output: given 'a.png'; allowed: .mp4 ")


def test_frames_that_do_not_fit(refused: Callable[..., str]) -> None:
    assert refused("--num-frames", "6", model="wan-t2v").startswith("num_frames: given 6; allowed: 4 × k + 1")


def test_an_output_that_is_a_folder(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "in" / "a.png").mkdir()
    assert "it is a folder" in refused("-o", str(tmp_path / "in" / "a.png"))


def test_an_output_folder_that_is_not_writable(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root, who may run this, may write everywhere
    assert "the folder '.' is not writable" in refused("-o", "a.png")


def test_a_device_that_is_not_there(refused: Callable[..., str]) -> None:
    here = accelerator()
    absent = next(kind for kind in DEVICES if kind not in ("auto", "cpu") and (here is None or kind != here.type))
    assert refused("--device", absent).startswith(f"device: given '{absent}'; this machine has: cpu")


@pytest.mark.parametrize("option", ["--image", "--mask"])
@pytest.mark.parametrize(("content", "problem"), [(b"", "0 bytes"), (b"GIF89a", "damaged"), (b"hi", "not a picture")])
def test_pictures_that_cannot_be_read(
    option: str, content: bytes, problem: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "in" / "a.png"
    path.write_bytes(content)
    line = refused(option, str(path))
    field = {"--image": "images (--image)", "--mask": "mask"}[option]
    assert line.startswith(f"{field}: given ") and problem in line and "allowed: " in line


def test_a_picture_that_is_a_bomb(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "in" / "a.png"
    Image.new("1", (20_000, 20_000)).save(path)
    assert path.stat().st_size < 100_000
    assert refused("--image", str(path)).startswith("images (--image): given ")


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "in" / "ok.png"
    Image.new("RGB", (32, 32), "red").save(path)
    return str(path)


def test_a_picture_for_a_model_that_takes_none(refused: Callable[..., str], picture: str) -> None:
    assert refused("--image", picture, model="wan-t2v").startswith("images (--image): given ")


def test_no_picture_for_a_model_that_needs_one(refused: Callable[..., str]) -> None:
    assert refused(model="qwen-image-edit-plus").startswith("images (--image): given 'none'; allowed: at least one")


def test_a_mask_without_a_picture(refused: Callable[..., str], picture: str) -> None:
    line = refused("--mask", picture)
    assert line.startswith("mask: ") and "image" in line


def test_another_picture_than_the_settings_and_an_error(picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["generate", "-m", str(folder("flux")), *SMALL, "--workflow", "image2image", "--image", picture]
    target = str(Path(picture).with_name("made.png"))
    assert main([*given, "a cat", "-o", target, "-q"]) == 0
    Image.new("RGB", (32, 32), "green").save(picture)
    assert main([*given, "--like", target, "--width", "33"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: width: given 33") and printed.count("\n") == 1


def test_no_prompt(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-m", str(folder("flux"))]) == 2
    assert capsys.readouterr().err.startswith("error: prompt: given None; allowed: a text, or --like FILE")


def test_what_needs_no_model_costs_no_torch(here: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "empty.png").touch()
    wrong = [["-o", "missing/a.png"], ["--image", str(tmp_path / "in" / "empty.png")], ["--steps", "0"]]
    code = (
        "import sys; from triptych.cli import main\n"
        f"for words in {wrong!r}:\n"
        "    assert main(['generate', 'x', *words]) == 2\n"
        "sys.exit(3 if 'torch' in sys.modules else 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(triptych.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    fields = [line.split(":")[1].strip() for line in done.stderr.splitlines()]
    assert fields == ["output", "images (--image)", "num_inference_steps (--steps)"]


def test_in_a_process_of_its_own(here: Path, damaged: Path) -> None:
    weights(damaged).write_bytes(b"")
    command = [sys.executable, "-m", "triptych", "generate", "a cat", "-m", str(damaged), *SMALL]
    environment = {**os.environ, "PYTHONPATH": str(Path(triptych.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "transformer" in line
    assert list(here.iterdir()) == []

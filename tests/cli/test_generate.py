"""`triptych generate` on tiny models: what it writes, prints and repeats."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import triptych
import triptych.model
from tests.families import folder
from triptych.cli import main
from triptych.cli.generation import Opening
from triptych.decode import Settings, read_settings

FAST = ["--steps", "2", "--width", "32", "--height", "32", "--max-sequence-length", "32", "--device", "cpu"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def generate(*arguments: str, model: str = "flux", fast: bool = True) -> int:
    return main(["generate", *arguments, "-m", str(folder(model)), *(FAST if fast else [])])


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_prints_the_path_and_tells_the_progress(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("a cat", "-o", "cat.png", "--seed", "1") == 0
    printed = capsys.readouterr()
    assert printed.out == "cat.png\n"
    for line in ("encode 1/1, ", "denoise 1/2, ", "denoise 2/2, ", "decode 1/1, ", "peak memory"):
        assert line in printed.err
    assert pixels("cat.png").shape == (32, 32, 3)
    assert [path.name for path in here.iterdir()] == ["cat.png"]


def test_the_embedded_model_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a cat left of a zorgle", "--seed", "1", "-o", "a.png", "--device", "cpu", "-q"]) == 0
    assert capsys.readouterr().err.startswith("warning: this model does not know the word 'zorgle'")
    assert read_settings("a.png").source == "embedded"
    assert main(["generate", "--like", "a.png", "-o", "b.png", "--device", "cpu", "-q"]) == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert pixels("a.png").std() > 10, "a picture of something"


def test_quiet_prints_the_path_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("a cat", "-o", "cat.png", "-q") == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("cat.png\n", "")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("a cat", "--seed", "5", "-n", "2", "--json", "-q") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["outputs"] == ["triptych-5-0.png", "triptych-5-1.png"]
    assert (made["seed"], made["workflow"], made["warnings"]) == (5, "text2image", [])
    assert [item["stage"] for item in made["times"]] == ["encode", "denoise", "decode"]
    assert made["request"]["num_inference_steps"] == 2


def test_a_name_of_our_own_never_falls_on_a_file(here: Path) -> None:
    for _ in range(2):
        assert generate("a cat", "--seed", "5", "-q") == 0
    assert sorted(path.name for path in here.iterdir()) == ["triptych-5.png", "triptych-5_2.png"]


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_like_repeats_the_pixels(suffix: str) -> None:
    first, again = f"first{suffix}", f"again{suffix}"
    assert generate("a cat", "-o", first, "--guidance-scale", "2.3", "-q") == 0
    settings = read_settings(first)
    assert (settings.source, settings.model, settings.workflow) == ("folder", "flux", "text2image")
    assert generate("--like", first, "-o", again, "-q", "--device", "cpu", fast=False) == 0
    assert np.array_equal(pixels(first), pixels(again))
    assert read_settings(again) == settings


def test_like_repeats_the_one_output_of_several(here: Path) -> None:
    assert generate("a cat", "-n", "3", "-o", "a.png", "-q") == 0
    assert generate("--like", "a-1.png", "-o", "b.png", "-q", fast=False) == 0
    assert np.array_equal(pixels("a-1.png"), pixels("b.png"))
    assert not np.array_equal(pixels("a-0.png"), pixels("b.png"))
    assert generate("--like", "a-1.png", "-n", "2", "-o", "c.png", "-q", fast=False) == 0
    assert {path.name for path in here.glob("c*")} == {"c-0.png", "c-1.png"}


def test_flags_override_like() -> None:
    assert generate("a cat", "--seed", "5", "-o", "a.png", "-q") == 0
    assert generate("a dog", "--like", "a.png", "--steps", "3", "-o", "b.png", "-q", fast=False) == 0
    request = read_settings("b.png").request
    assert (request["prompt"], request["seed"], request["num_inference_steps"]) == ("a dog", 5, 3)
    assert request["width"] == 32


def test_like_does_not_take_a_folder_from_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("a cat", "-o", "a.png", "-q") == 0
    os.symlink(folder("flux"), "flux")  # a folder of the name in the file is no better
    assert main(["generate", "--like", "a.png"]) == 2
    assert capsys.readouterr().err.startswith("error: model: given 'flux'; allowed: ")


def settings_naming(model: str, source: str) -> Settings:
    fields = {"triptych": "1", "workflow": "text2image", "output": 0, "request": {"prompt": "x"}, "revision": "abc"}
    return Settings.model_validate({**fields, "model": model, "source": source})


NOTHING_SAID = Opening(None, None, "auto", None, None, False, False, False)


def test_like_names_hub_models_and_embedded_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triptych.model, "embedded_models", lambda: ["emoji"], raising=False)
    opening = NOTHING_SAID.completed(settings_naming("owner/name-1.0", "hub"))
    assert (opening.model, opening.revision, opening.workflow) == ("owner/name-1.0", "abc", "text2image")
    assert not opening.allow_pickle and not opening.allow_remote_code
    assert NOTHING_SAID.completed(settings_naming("emoji", "embedded")).model == "emoji"
    said = replace(NOTHING_SAID, model="mine").completed(settings_naming("owner/name", "hub"))
    assert (said.model, said.revision) == ("mine", None)


@pytest.mark.parametrize(
    ("model", "source"),
    [
        ("here/model", "hub"),
        ("../model", "hub"),
        ("owner/..", "hub"),
        ("/etc/model", "hub"),
        ("~/model", "hub"),
        ("a/b/c", "hub"),
        ("model", "hub"),
        ("emoji", "folder"),
        ("here/model", "embedded"),
        ("../embedded/emoji", "embedded"),
    ],
)
def test_like_names_no_path(model: str, source: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triptych.model, "embedded_models", lambda: ["emoji"], raising=False)
    (here / "here" / "model").mkdir(parents=True)
    with pytest.raises(triptych.InvalidRequest, match=r"^model: .*naming it with -m"):
        NOTHING_SAID.completed(settings_naming(model, source))


def test_no_metadata(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("a secret", "-o", "a.png", "-q", "--no-metadata") == 0
    assert b"secret" not in Path("a.png").read_bytes()
    assert generate("--like", "a.png", "-q") == 2
    assert "without Triptych's settings" in capsys.readouterr().err


def test_pictures_are_digests_in_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    Image.linear_gradient("L").resize((32, 32)).save("in.png")
    Image.new("RGB", (32, 32), "green").save("other.png")
    picture = ["--workflow", "image2image", "--strength", "0.9"]
    assert generate("a cat", "--image", "in.png", *picture, "-o", "a.png", "-q") == 0
    assert generate("--like", "a.png", "-q", fast=False) == 2
    assert capsys.readouterr().err.startswith("error: images (--image): given 'none'; allowed: the 1 that --like")
    assert generate("--like", "a.png", "--image", "in.png", "-o", "b.png", "-q", fast=False) == 0
    assert not capsys.readouterr().err
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert generate("--like", "a.png", "--image", "other.png", "-o", "c.png", "-q", fast=False) == 0
    assert capsys.readouterr().err.startswith("warning: images: not what --like was made with")


def test_preview_is_refreshed() -> None:
    assert generate("a cat", "-o", "a.png", "--preview", "p.png", "-q") == 0
    assert pixels("p.png").shape[0] < 32, "one pixel per latent"


def test_a_vae_of_its_own_makes_previews(here: Path) -> None:
    vae = str(folder("flux") / "vae")
    assert generate("a cat", "-o", "a.png", "--preview", "p.png", "--preview-vae", vae, "-q") == 0
    assert pixels("p.png").shape == pixels("a.png").shape


def test_sigmas_and_extra(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--sigmas", "1,0.5,0.25", "--extra", 'prompt_2="a dog"', "--seed", "1", "--json", "-q"]
    assert generate("a cat", *arguments, *FAST[2:], fast=False) == 0
    request = json.loads(capsys.readouterr().out)["request"]
    assert request["sigmas"] == [1, 0.5, 0.25]
    assert request["extra"] == {"prompt_2": "a dog"}


def test_a_clip(capsys: pytest.CaptureFixture[str]) -> None:
    clip = ["--num-frames", "5", "--fps", "8", "--seed", "3", "-q"]
    assert generate("a cat", *clip, model="wan-t2v") == 0
    assert capsys.readouterr().out == "triptych-3.mp4\n"
    with av.open("triptych-3.mp4") as container:
        assert sum(1 for _ in container.decode(video=0)) == 5
        assert container.streams.video[0].average_rate == 8
    assert generate("--like", "triptych-3.mp4", "-o", "again.mp4", "-q", model="wan-t2v", fast=False) == 0
    assert Path("again.mp4").read_bytes() == Path("triptych-3.mp4").read_bytes()


def test_show_says_when_it_cannot(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("a cat", "-o", "a.png", "--show", "-q") == 0
    printed = capsys.readouterr()
    assert printed.out == "a.png\n"
    assert printed.err == "cannot draw the picture here: standard output is not a terminal\n"


def test_ctrl_c_cancels_and_writes_nothing(here: Path) -> None:
    command = [sys.executable, "-m", "triptych", "generate", "a cat", "-m", str(folder("flux")), *FAST]
    command[command.index("--steps") + 1] = "1000"
    environment = {**os.environ, "PYTHONPATH": str(Path(triptych.__file__).parents[1])}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as run:
        assert run.stderr is not None
        line = ""
        while not line.startswith("denoise"):
            line = run.stderr.readline()
            assert line, "it ended by itself"
        sent = time.monotonic()
        run.send_signal(signal.SIGINT)
        out, rest = run.communicate(timeout=60)
        took = time.monotonic() - sent
    assert run.returncode == 130
    assert rest.splitlines()[-1] == "cancelled"
    assert "Traceback" not in rest
    assert not out
    assert took < 20
    assert list(here.iterdir()) == []

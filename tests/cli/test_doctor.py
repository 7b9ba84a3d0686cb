"""`triptych doctor`."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest
import torch

from triptych.cli import main
from triptych.cli.doctor import examine

# Not an import: as a name of the room, `doctor` is the command.
doctor_module = sys.modules["triptych.cli.doctor"]


def test_doctor_tells_what_is_here() -> None:
    found = json.loads(json.dumps(examine()))
    assert found["libraries"]["torch"] == torch.__version__
    assert found["devices"]["found"]["cpu"]["threads"] == torch.get_num_threads()
    assert found["devices"]["found"]["cpu"]["memory_bytes"] > 2**20
    assert found["media"]["codecs"]["libx264"] is True
    assert found["devices"]["used"].split(":")[0] in {name.split(":")[0] for name in found["devices"]["found"]}


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_doctor_fails_on_what_is_missing(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.metadata.version

    def without_greenlet(name: str) -> str:
        if name == "greenlet":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", without_greenlet)
    monkeypatch.setattr(doctor_module, "_models", lambda missing: {"embedded": ["emoji"]})
    assert main(["doctor", *arguments]) == 1
    out = capsys.readouterr().out
    assert "library greenlet is not installed" in out
    if arguments:
        assert json.loads(out)["missing"] == ["library greenlet is not installed"]


def test_doctor_goes_on_past_what_it_cannot_examine(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(missing: list[str]) -> dict[str, object]:
        raise OSError("libav.so: not found")

    monkeypatch.setattr(doctor_module, "_media", broken)
    found = examine()
    assert "media cannot be examined: OSError: libav.so: not found" in found["missing"]
    assert found["devices"] and found["media"] is None


def test_doctor_is_content(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor_module, "_models", lambda missing: {"embedded": ["emoji"]})
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("nothing is missing\n") and "used: " in out


@pytest.mark.parametrize("name", ["sentencepiece", "ftfy", "protobuf"])
def test_what_tokenizers_need_is_required(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def without(library: str) -> str:
        if library == name:
            raise importlib.metadata.PackageNotFoundError(library)
        return real(library)

    monkeypatch.setattr(importlib.metadata, "version", without)
    assert f"library {name} is not installed" in examine()["missing"]


def test_the_cpu_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: A Fine CPU @ 3.00GHz\nmodel name\t: Another\n")
    monkeypatch.setattr(doctor_module, "_CPU_INFO", info)
    assert examine()["devices"]["found"]["cpu"]["name"] == "A Fine CPU @ 3.00GHz"
    monkeypatch.setattr(doctor_module, "_CPU_INFO", tmp_path / "none")
    assert examine()["devices"]["found"]["cpu"]["name"]

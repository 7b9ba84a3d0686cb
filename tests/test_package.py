"""The package as it is shipped: what is in the wheel, and that pins and ranges agree."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import triptych

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built offline with the installed backend."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    assert built.name.startswith(f"triptych-{triptych.__version__}-")
    return zipfile.ZipFile(built)


def test_wheel_holds_the_whole_package(wheel: zipfile.ZipFile) -> None:
    package = ROOT / "src" / "triptych"
    wanted = {
        path.relative_to(package.parent).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert any(name.endswith("embedded/emoji/model_index.json") for name in wanted)
    assert any(name.endswith(".safetensors") for name in wanted)
    shipped = set(wheel.namelist())
    assert wanted <= shipped, wanted - shipped
    assert not [name for name in shipped if name.split("/")[0] in {"tests", "training", "benchmarks"}]


def test_wheel_carries_licence_and_command(wheel: zipfile.ZipFile) -> None:
    names = {name.rsplit("/", 1)[-1] for name in wheel.namelist()}
    assert {"LICENSE", "NOTICE"} <= names
    (points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "triptych = triptych.cli:main" in wheel.read(points).decode()


def test_pins_lie_in_the_ranges() -> None:
    pins = dict(line.split("==") for line in constraints())
    pins = {normal(name): pinned for name, pinned in pins.items()}
    extras = PROJECT["optional-dependencies"].values()
    for text in [*PROJECT["dependencies"], *(one for extra in extras for one in extra)]:
        wanted = Requirement(text)
        assert wanted.specifier, f"{text} has no range"
        assert pins[normal(wanted.name)] in wanted.specifier, text


def test_pins_are_exact_and_of_no_machine() -> None:
    for line in constraints():
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", line), line


def constraints() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()

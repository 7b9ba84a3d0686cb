"""Runs what the documents tell a reader to run, and follows their links.

A command is a line of a ```sh block that begins with `$ `; the lines under it are its output, of which each must
appear (`…` stands for anything). ```sh exit=2 names the exit code. Python blocks of a document run as one script.
Commands find `photo.png`, `mask.png` and tiny stand-ins of the models they name in their folder. A command that
prints a traceback, or what a library says for itself, fails.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

EXCEPTIONS = {
    "make demo": "sets up an environment of its own; .ci/run and a fresh clone prove it",
    "make test": "would run this test again",
}
"""Documented commands that are not run here, three at most, with the reason; the test summary prints them."""

STAND_INS = {"FLUX.1-schnell": "flux", "Qwen-Image": "qwen-image", "Wan2.1-T2V-1.3B-Diffusers": "wan-t2v"}
"""Folders that the documents name, and the tiny family that stands in for each."""

BLOCK = re.compile(r"^```(\w*) *([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOISE = re.compile(r"^\[transformers\].*|^Traceback \(most recent call last\)|\S*Warning: .*", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


@dataclass
class Command:
    """A documented command line with the exit code and the output lines that the document shows."""

    text: str
    code: int
    output: list[str] = field(default_factory=list)


def commands(document: Path) -> list[Command]:
    """The commands of a document, in order. Fails for a shell block that holds none."""
    found: list[Command] = []
    for language, info, body in BLOCK.findall(document.read_text(encoding="utf-8")):
        assert language not in {"bash", "shell", "console"}, f"{document.name}: use ```sh, so that it is run"
        if language != "sh":
            continue
        assert body.startswith("$ "), f"{document.name}: a sh block without a command: {body[:60]!r}"
        expected = re.search(r"exit=(\d+)", info)
        for line in body.replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                found.append(Command(" ".join(line[2:].split()), int(expected[1]) if expected else 0))
            elif line.strip():
                found[-1].output.append(line.strip())
    return found


def python_of(document: Path) -> str:
    """The Python blocks of a document as one script."""
    return "\n".join(
        body for language, _, body in BLOCK.findall(document.read_text(encoding="utf-8")) if language == "python"
    )


@pytest.fixture
def reader(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A reader's working folder and environment: `triptych` on the PATH, no hub."""
    # Not at the top: the test summary imports this module, and is no reason to pay for diffusers.
    from tests.families import folder

    here, bin_folder = tmp_path / "here", tmp_path / "bin"
    here.mkdir()
    bin_folder.mkdir()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(here / "photo.png")
    Image.linear_gradient("L").resize((64, 64)).point([0] * 128 + [255] * 128).save(here / "mask.png")
    for name, family in STAND_INS.items():
        (here / name).symlink_to(folder(family), target_is_directory=True)
    shim = bin_folder / "triptych"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m triptych "$@"\n')
    shim.chmod(0o755)
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([str(bin_folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment["PYTHONPATH"] = str(ROOT / "src")
    environment["HF_HUB_OFFLINE"] = "1"
    environment["COLUMNS"] = "110"
    return here, environment


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documented_commands(document: Path, reader: tuple[Path, dict[str, str]]) -> None:
    here, environment = reader
    for command in commands(document):
        if command.text not in EXCEPTIONS:
            run = ["bash", "-euo", "pipefail", "-c", command.text]
            expect(run, command, here, environment)
    script = python_of(document)
    if script:
        expect([sys.executable, "-c", script], Command("the Python blocks", 0), here, environment)


def expect(run: list[str], command: Command, here: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        run, cwd=here, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    said = done.stdout + done.stderr
    assert done.returncode == command.code, f"{command.text} ended with {done.returncode}:\n{said[-3000:]}"
    noise = NOISE.search(said)
    assert noise is None, f"{command.text} prints {noise[0]!r}:\n{said[-3000:]}"
    flat = " ".join(said.split())
    for line in command.output:
        parts = [re.escape(" ".join(part.split())) for part in line.split("…")]
        assert re.search(".*?".join(parts), flat), f"{command.text} does not print {line!r} but:\n{said[-3000:]}"


@pytest.mark.parametrize(
    "line",
    [
        "[transformers] `CLIPImageProcessor` requires torchvision",
        "Traceback (most recent call last):",
        "/lib/a.py:3: FutureWarning: soon gone",
    ],
)
def test_a_library_that_speaks_for_itself_fails(line: str, tmp_path: Path) -> None:
    say = [sys.executable, "-c", f"import sys; print('a.png'); print({line!r}, file=sys.stderr)"]
    with pytest.raises(AssertionError, match="prints"):
        expect(say, Command("triptych", 0, ["a.png"]), tmp_path, dict(os.environ))


def test_exceptions_are_few_and_needed() -> None:
    documented = {command.text for document in DOCUMENTS for command in commands(document)}
    assert len(EXCEPTIONS) <= 3
    assert set(EXCEPTIONS) <= documented


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = LINK.findall(document.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (document.parent / target).exists()]
    assert not missing, missing


def test_documented_targets_exist() -> None:
    texts = [document.read_text(encoding="utf-8") for document in DOCUMENTS]
    named = {name for text in texts for name in re.findall(r"(?:`|^\$ )make ([a-z]+)", text, re.MULTILINE)}
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert named
    assert named <= targets, named - targets

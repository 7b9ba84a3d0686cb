"""Pictures in a terminal: a pseudo-terminal plays the terminals that people have."""

from __future__ import annotations

import base64
import io
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import triptych
from triptych.cli.show import half_blocks, iterm2, kitty, probe, show

pty = pytest.importorskip("pty", reason="pseudo-terminals are Unix'")

ATTRIBUTES = b"\x1b[?62;22c"
TERMINALS = {
    "kitty": (b"\x1b_Gi=31;OK\x1b\\\x1bP>|kitty(0.40.0)\x1b\\" + ATTRIBUTES, "kitty"),
    "ghostty": (b"\x1b_Gi=31;OK\x1b\\" + ATTRIBUTES, "kitty"),
    "iTerm2": (b"\x1bP>|iTerm2 3.5.0\x1b\\" + ATTRIBUTES, "iterm2"),
    "xterm": (b"\x1bP>|XTerm(390)\x1b\\" + ATTRIBUTES, None),
    "vt100": (ATTRIBUTES, None),
    "no graphics": (b"\x1b_Gi=31;ENOTSUP\x1b\\" + ATTRIBUTES, None),
    "garbage": (b"\xff" * 5000, None),
}


@contextmanager
def terminal(answer: bytes) -> Iterator[int]:
    """A terminal that gives an answer once it has been asked; its side of the program."""
    ours, theirs = pty.openpty()

    def reply() -> None:
        asked = b""
        while b"\x1b[c" not in asked:
            ready, _, _ = select.select([ours], [], [], 5)
            if not ready:
                return
            asked += os.read(ours, 1024)
        os.write(ours, answer)

    thread = threading.Thread(target=reply)
    thread.start()
    try:
        yield theirs
    finally:
        thread.join()
        os.close(theirs)
        os.close(ours)


@pytest.mark.parametrize("name", TERMINALS)
def test_probe(name: str) -> None:
    import termios

    answer, protocol = TERMINALS[name]
    with terminal(answer) as descriptor:
        before = termios.tcgetattr(descriptor)
        assert probe(descriptor, descriptor, seconds=2.0) == protocol
        assert termios.tcgetattr(descriptor) == before, "the terminal is as it was"


def test_probe_does_not_wait_for_a_silent_terminal() -> None:
    began = time.monotonic()
    with terminal(b"") as descriptor:
        assert probe(descriptor, descriptor, seconds=0.1) is None
    assert time.monotonic() - began < 3


def test_probe_of_a_pipe_is_none() -> None:
    source, sink = os.pipe()
    try:
        assert probe(source, sink) is None
    finally:
        os.close(source)
        os.close(sink)


def noise(width: int, height: int) -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def decoded(data: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
        return np.asarray(image)


def test_kitty_carries_the_picture() -> None:
    picture = noise(300, 200)
    parts = re.findall("\x1b_G([^;]*);([^\x1b]*)\x1b\\\\", kitty(picture))
    assert parts[0][0] == "a=T,f=100,q=2,m=1" and parts[-1][0] == "m=0"
    assert all(head == "m=1" for head, _ in parts[1:-1])
    assert all(len(data) <= 4096 for _, data in parts)
    assert np.array_equal(decoded("".join(data for _, data in parts)), np.asarray(picture))


def test_iterm2_carries_the_picture_and_enlarges_small_ones() -> None:
    found = re.fullmatch("\x1b]1337;File=inline=1;size=([0-9]+);preserveAspectRatio=1:(.*)\x07", iterm2(noise(64, 32)))
    assert found
    assert int(found[1]) == len(base64.b64decode(found[2]))
    assert np.array_equal(decoded(found[2])[::4, ::4], np.asarray(noise(64, 32)))


def console(**options: object) -> Console:
    known = {"force_terminal": True, "color_system": "truecolor", "width": 80, "height": 24, "legacy_windows": False}
    return Console(file=io.StringIO(), **{**known, **options})  # type: ignore[arg-type]


def test_half_blocks_show_two_pixels_a_character() -> None:
    picture = Image.new("RGB", (2, 2))
    picture.putdata([(1, 2, 3), (4, 5, 6), (7, 8, 9), (10, 11, 12)])
    where = console()
    where.print(half_blocks(picture, where), end="")
    assert where.file.getvalue() == (  # type: ignore[attr-defined]
        "\x1b[38;2;1;2;3;48;2;7;8;9m▀\x1b[0m\x1b[38;2;4;5;6;48;2;10;11;12m▀\x1b[0m\n"
    )


@pytest.mark.parametrize("size", [(64, 64), (1000, 300), (300, 1000), (1, 1), (5000, 1)])
def test_half_blocks_fit(size: tuple[int, int]) -> None:
    where = console()
    assert show(noise(*size), where) is None
    lines = where.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert 1 <= len(lines) <= 22
    assert all(1 <= line.count("▀") <= 80 for line in lines)


def test_says_why_not() -> None:
    assert show(noise(4, 4), console(force_terminal=False)) == "standard output is not a terminal"
    assert "256 colours" in str(show(noise(4, 4), console(color_system="standard")))


def test_in_a_real_process() -> None:
    """The whole way: standard input and output are a terminal that knows kitty's protocol."""
    code = (
        "from PIL import Image; from rich.console import Console; from triptych.cli.show import show\n"
        "print(show(Image.new('RGB', (8, 8), 'red'), Console()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(triptych.__file__).parents[1]), "TERM": "xterm-256color"}
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=theirs, env=environment) as process:
        os.close(theirs)
        seen = b""
        while b"\x1b[c" not in seen:
            seen += os.read(ours, 1024)
        os.write(ours, TERMINALS["kitty"][0])
        while b"None" not in seen:
            seen += os.read(ours, 4096)
        assert process.wait(30) == 0
    os.close(ours)
    assert b"\x1b_Ga=T,f=100,q=2,m=0;" in seen

"""Drawing a picture in the terminal: with a graphics protocol where the terminal says it has one, else in
half blocks, two pixels a character."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import select
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console

__all__ = ["Protocol", "half_blocks", "iterm2", "kitty", "probe", "show"]

Protocol = Literal["kitty", "iterm2"]

_SMALLEST = 256
"""Pixels: pictures are enlarged to at least this width for the graphics protocols."""
_CHUNK = 4096
# A kitty graphics query (a 1×1 picture, not shown), the terminal's name and version, and last what every
# terminal answers (its device attributes), so that an answer without the first two is known to be complete.
_QUESTION = b"\x1b_Gi=31,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\\x1b[>q\x1b[c"
_DEVICE_ATTRIBUTES = re.compile(rb"\x1b\[\?[\d;]*c")


def show(picture: Image.Image, console: Console) -> str | None:
    """Draws a picture on the console. Returns None, or why it cannot be drawn there."""
    if not console.is_terminal:
        return "standard output is not a terminal"
    protocol = _ask() if console.file is sys.stdout else None
    if protocol is None:
        if console.color_system not in ("truecolor", "256"):
            return "this terminal has neither a graphics protocol nor 256 colours"
        console.print(half_blocks(picture, console), end="")
        return None
    console.file.write(kitty(picture) if protocol == "kitty" else iterm2(picture))
    console.file.write("\n")
    console.file.flush()
    return None


def _ask() -> Protocol | None:
    """Asks the terminal on standard input and output, if both are one."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return None
    sys.stdout.flush()
    return probe(sys.stdin.fileno(), sys.stdout.fileno())


def probe(source: int, sink: int, seconds: float = 0.5) -> Protocol | None:
    """Asks a terminal (read at descriptor `source`, written at `sink`) for its graphics protocol; None if it
    has none or stays silent for so many seconds."""
    with _raw(source) as able:
        if not able:
            return None
        os.write(sink, _QUESTION)
        answer = b""
        end = time.monotonic() + seconds
        while not _DEVICE_ATTRIBUTES.search(answer) and len(answer) < 4096:
            ready, _, _ = select.select([source], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                break
            answer += os.read(source, 1024)
    if b"\x1b_Gi=31;OK" in answer:
        return "kitty"
    return "iterm2" if re.search(rb"\x1bP>\|(iTerm2|WezTerm|mintty)", answer) else None


@contextlib.contextmanager
def _raw(descriptor: int) -> Iterator[bool]:
    """Lets answers be read as they come, unseen, and restores the terminal. False where that cannot be
    done."""
    try:
        import termios
        import tty
    except ImportError:  # Windows
        yield False
        return
    try:
        before = termios.tcgetattr(descriptor)
    except termios.error:
        yield False
        return
    try:
        tty.setcbreak(descriptor, termios.TCSANOW)
        yield True
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)


def kitty(picture: Image.Image) -> str:
    """The kitty graphics protocol's text that transmits and shows a picture."""
    data = _base64_png(picture)
    chunks = [data[at : at + _CHUNK] for at in range(0, len(data), _CHUNK)]
    parts = []
    for index, chunk in enumerate(chunks):
        first = "a=T,f=100,q=2," if index == 0 else ""
        parts.append(f"\x1b_G{first}m={int(index + 1 < len(chunks))};{chunk}\x1b\\")
    return "".join(parts)


def iterm2(picture: Image.Image) -> str:
    """iTerm2's text for an inline picture."""
    data = _base64_png(picture)
    size = len(data) // 4 * 3 - data[-2:].count("=")
    return f"\x1b]1337;File=inline=1;size={size};preserveAspectRatio=1:{data}\x07"


def _base64_png(picture: Image.Image) -> str:
    factor = -(-_SMALLEST // picture.width)
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), 0)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def half_blocks(picture: Image.Image, console: Console) -> object:
    """A picture as something rich prints: `▀`, its upper pixel as colour, the lower one as background."""
    from rich.segment import Segment, Segments
    from rich.style import Style

    small = _fit(picture.convert("RGB"), console.width, 2 * max(1, console.height - 2))
    pixels = small.load()
    assert pixels is not None
    segments = []
    for y in range(0, small.height, 2):
        for x in range(small.width):
            upper, lower = _rgb(pixels[x, y]), _rgb(pixels[x, y + 1])
            segments.append(Segment("▀", Style(color=upper, bgcolor=lower)))
        segments.append(Segment.line())
    return Segments(segments)


def _rgb(pixel: object) -> str:
    assert isinstance(pixel, tuple)
    return "#{:02x}{:02x}{:02x}".format(*pixel)


def _fit(picture: Image.Image, columns: int, rows: int) -> Image.Image:
    """Scaled down to fit so many columns and half rows, never up; the height made even."""
    scale = min(1.0, columns / picture.width, rows / picture.height)
    width = max(1, round(picture.width * scale))
    height = max(2, round(picture.height * scale / 2) * 2)
    return picture if (width, height) == picture.size else picture.resize((width, height))

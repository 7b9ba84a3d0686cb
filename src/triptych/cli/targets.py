"""Where a command's outputs go: checked before a model is opened, written when all is made."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from triptych.errors import InvalidRequest, MediaError

if TYPE_CHECKING:
    from PIL import Image

    from triptych.request import Clip

__all__ = ["FORMATS", "Target", "check_writable", "write"]

FORMATS = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg", ".mp4": "mp4"}
"""The output formats by suffix."""
_SUFFIXES = {"png": ".png", "webp": ".webp", "jpeg": ".jpg", "mp4": ".mp4"}


@dataclass(frozen=True)
class Target:
    """The path a person named (None: one is made from the seed, in the working folder) and the format it asks
    for (None: the model decides)."""

    path: Path | None
    format: str | None

    @classmethod
    def of(cls, path: Path | None, format: str | None = None) -> Target:
        """Checks a path as far as that goes without a model. `format` counts where there is no path.

        Raises InvalidRequest for an unsupported suffix, MediaError for a folder that is missing or not
        writable.
        """
        if path is None:
            check_writable(Path("triptych.png"))
            return cls(None, format)
        found = FORMATS.get(path.suffix.lower())
        if found is None:
            raise InvalidRequest.of("output", str(path), f"a file name ending in {', '.join(FORMATS)}")
        check_writable(path)
        return cls(path, found)

    def check_makes(self, makes: str) -> None:
        """Raises InvalidRequest if the path's suffix is not for what the model `makes` (image or video)."""
        if self.format is not None and (self.format == "mp4") != (makes == "video"):
            allowed = [suffix for suffix, format in FORMATS.items() if (format == "mp4") == (makes == "video")]
            given = str(self.path) if self.path else self.format
            raise InvalidRequest.of("output", given, f"{', '.join(allowed)} (this model makes {makes}s)")

    def paths(self, count: int, makes: str, seed: int) -> list[Path]:
        """The paths of so many outputs: the named one, or name-0, name-1… A name of our own making never
        falls on a file that exists."""
        if self.path is not None:
            return _numbered(self.path, count)
        suffix = _SUFFIXES[self.format or ("mp4" if makes == "video" else "png")]
        again = 1
        while True:
            stem = f"triptych-{seed}" if again == 1 else f"triptych-{seed}_{again}"
            paths = _numbered(Path(stem + suffix), count)
            if not any(os.path.lexists(path) for path in paths):
                return paths
            again += 1


def _numbered(path: Path, count: int) -> list[Path]:
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{index}") for index in range(count)]


def check_writable(path: Path, field: str = "output") -> None:
    """Raises MediaError if a file of that name could not be written."""
    folder = path.parent
    problem = None
    if not folder.exists():
        problem = f"the folder {str(folder)!r} does not exist"
    elif not folder.is_dir():
        problem = f"{str(folder)!r} is not a folder"
    elif path.is_dir():
        problem = "it is a folder"
    elif not os.access(folder, os.W_OK | os.X_OK):
        problem = f"the folder {str(folder)!r} is not writable"
    if problem:
        raise MediaError(f"given {str(path)!r}: {problem}; allowed: a file in a writable folder", field=field)


def write(outputs: Sequence[Image.Image | Clip], paths: Sequence[Path], texts: Sequence[str | None]) -> None:
    """Writes each output (a picture or a clip) to its path, with its metadata. Raises MediaError."""
    from triptych.decode import write_clip, write_image
    from triptych.request import Clip

    for output, path, text in zip(outputs, paths, texts, strict=True):
        if isinstance(output, Clip):
            write_clip(output, path, text)
        else:
            write_image(output, path, metadata=text)

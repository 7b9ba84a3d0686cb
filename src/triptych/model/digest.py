"""Whether two hosts hold the same model: a digest of its files, without reading weights whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import xxhash

from triptych.model.topology import Source

__all__ = ["model_digest"]

WHOLE = 1 << 20
"""Bytes up to which a file is read whole."""
SAMPLES = 16
SAMPLE = 4096
MAX_HEADER = 1 << 25
"""Bytes of a safetensors header that are read: names, dtypes and shapes of all tensors."""


def model_digest(source: Source, workflow: str) -> str:
    """The XXH3-128 of a model and one of its workflows, as hexadecimal digits: equal for equal files, wherever they
    lie. A hub's model is its commit; of a folder every file counts with its name and size, small ones with all they
    hold, weights with their header and samples from all over. Guards against mistakes, not attackers."""
    total = xxhash.xxh3_128(f"{workflow}\n".encode())
    if source.kind == "hub":
        total.update(f"hub {source.name} {source.revision}".encode())
        return total.hexdigest()
    root = Path(source.folder)
    for name in sorted(_files(root)):
        path = root / name
        size = path.stat().st_size
        total.update(f"{name}\n{size}\n".encode())
        for piece in _pieces(path, size):
            total.update(piece)
    return total.hexdigest()


def _files(root: Path) -> Iterator[str]:
    """The model's files, relative and with forward slashes; hidden ones and caches are not the model's."""
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if not name.startswith((".", "__"))]
        inside = Path(folder).relative_to(root)
        yield from ((inside / name).as_posix() for name in files if not name.startswith("."))


def _pieces(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        if size <= WHOLE:
            yield file.read()
            return
        begin = file.read(8)
        if path.suffix == ".safetensors":
            begin += file.read(min(int.from_bytes(begin, "little"), MAX_HEADER))
        yield begin
        first = len(begin)
        for index in range(SAMPLES):
            file.seek(max(first, (size - SAMPLE) * (index + 1) // SAMPLES))
            yield file.read(SAMPLE)

"""A model's weight files, wherever they are: in its folder, or still on the hub."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from triptych.model import hub
from triptych.model.checkpoint import DTYPES, WeightFiles, read_shards, weight_files
from triptych.model.topology import ComponentInfo, Source

__all__ = ["ITEMSIZE", "fetch_weights", "file_sizes", "prevailing", "weights_of"]

ITEMSIZE = dict(DTYPES.values())
"""Bytes of one element, by dtype name."""


def weights_of(source: Source, subfolder: str) -> WeightFiles | None:
    """A component's weight files by name, wherever they are; None if it has none."""
    folder = Path(source.folder) / subfolder
    names = file_sizes(source, subfolder)
    shards = {
        name: tuple(read_shards(folder / name))
        for name in names
        if ".safetensors.index." in name and (folder / name).is_file()
    }
    return weight_files(names, shards)


def file_sizes(source: Source, subfolder: str) -> dict[str, int]:
    """Bytes of each file directly in a component's folder, those that are still on the hub included."""
    prefix = f"{subfolder}/"
    sizes = {}
    if source.kind == "hub":
        remote = hub.remote_sizes(source)
        sizes = {path.removeprefix(prefix): size for path, size in remote.items() if path.startswith(prefix)}
    folder = Path(source.folder) / subfolder
    if folder.is_dir():
        sizes.update({path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()})
    return {name: size for name, size in sizes.items() if "/" not in name}


def fetch_weights(source: Source, spec: ComponentInfo) -> None:
    """Brings one component's weights, and no other's, to `source.folder`. Does nothing unless the source is on a hub.
    Raises LoadError naming the files that cannot be had."""
    if source.kind != "hub":
        return
    weights = weights_of(source, spec.subfolder)
    if weights is not None:
        hub.fetch(source, [f"{spec.subfolder}/{file}" for file in weights.files])


def prevailing(elements: Counter[str]) -> str | None:
    """The dtype of most bytes; None of none."""
    return max(elements, key=lambda dtype: elements[dtype] * ITEMSIZE.get(dtype, 1)) if elements else None

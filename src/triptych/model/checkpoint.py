"""Weights on disk, as far as names and headers tell: no tensor is read here, and torch is not needed."""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triptych.errors import LoadError

BASES = ("diffusion_pytorch_model", "model")
"""What diffusers and transformers name a component's weights."""

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

MAX_HEADER_BYTES = 100_000_000
"""What the safetensors format itself allows."""

DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
"""The header's names: torch's name and bytes per element. Newer formats count as unknown, by their byte ranges."""


@dataclass(frozen=True)
class Header:
    """A safetensors file's header: tensor names, elements per dtype (torch's names), and the bytes of all tensors."""

    tensors: tuple[str, ...]
    elements: Counter[str]
    bytes: int


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold one component's weights, relative to its folder. `index` names the shards' index, if any;
    `variant` is diffusers' (fp16 in model.fp16.safetensors); `pickle` says that they are not safetensors."""

    files: tuple[str, ...]
    index: str | None = None
    variant: str | None = None
    pickle: bool = False


def read_header(path: Path) -> Header:
    """The header of a safetensors file, checked against the file's size. Raises LoadError naming the file and bytes."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            text = file.read(length) if 2 <= length <= MAX_HEADER_BYTES else b""
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror or error}", field="model") from None
    if len(start) < 8 or not 2 <= length <= MAX_HEADER_BYTES:
        raise LoadError(f"{path} ({size} bytes) is not a safetensors file: it has no header", field="model")
    if len(text) < length:
        raise _truncated(path, size, 8 + length)
    header, end = _parse(path, text)
    if size < 8 + length + end:
        raise _truncated(path, size, 8 + length + end)
    if size > 8 + length + end:
        raise LoadError(f"{path} has {size} bytes, {size - 8 - length - end} more than its header says", field="model")
    return header


def _truncated(path: Path, size: int, needed: int) -> LoadError:
    return LoadError(f"{path} is truncated: {size} bytes of at least {needed}", field="model")


def _parse(path: Path, text: bytes) -> tuple[Header, int]:
    """The header's content and where the last tensor ends. The text comes from outside: nothing in it is trusted."""
    elements: Counter[str] = Counter()
    names, end, total = [], 0, 0
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            begin, stop = (int(offset) for offset in entry["data_offsets"])
            if not 0 <= begin <= stop:
                raise ValueError(f"offsets of {name}")
            dtype, itemsize = DTYPES.get(entry["dtype"], (str(entry["dtype"]).lower(), 1))
            elements[dtype] += (stop - begin) // itemsize
            names.append(name)
            end, total = max(end, stop), total + stop - begin
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise LoadError(
            f"{path} has a damaged safetensors header ({type(error).__name__}: {error})", field="model"
        ) from None
    return Header(tuple(names), elements, total), end


def weight_files(names: Iterable[str], shards_of: dict[str, tuple[str, ...]] | None = None) -> WeightFiles | None:
    """Which of a component folder's files hold its weights: plain safetensors first, then a variant, then pickles.

    `shards_of` maps an index file's name to the shards that it lists, for indices that could be read; where it is
    missing the shards are taken from the names. None if nothing there looks like weights.
    """
    present = sorted(set(names))
    for base in BASES:
        found = _safetensors(base, present, shards_of or {})
        if found:
            return found
    for base in ("diffusion_pytorch_model", "pytorch_model", "model"):
        pickles = tuple(n for n in present if n.startswith(base) and n.endswith(PICKLE_SUFFIXES))
        if pickles:
            return WeightFiles(pickles, pickle=True)
    others = tuple(n for n in present if n.endswith(PICKLE_SUFFIXES))
    return WeightFiles(others, pickle=True) if others else None


def _safetensors(base: str, present: list[str], shards_of: dict[str, tuple[str, ...]]) -> WeightFiles | None:
    """The safetensors files of that base: each candidate (plain before variants) is one file or an index."""
    stem = re.escape(base)
    single = re.compile(rf"{stem}(?:\.(?P<variant>[\w-]+))?\.safetensors")
    index = re.compile(rf"{stem}(?:\.(?P<v1>[\w-]+))?\.safetensors\.index(?:\.(?P<v2>[\w-]+))?\.json")
    candidates: list[tuple[str, bool, str]] = []
    for name in present:
        if match := single.fullmatch(name):
            candidates.append((match["variant"] or "", False, name))
        elif match := index.fullmatch(name):
            candidates.append((match["v1"] or match["v2"] or "", True, name))
    if not candidates:
        return None
    variant, sharded, name = min(candidates)
    if not sharded:
        return WeightFiles((name,), variant=variant or None)
    shards = shards_of.get(name) or _shards(base, variant, present)
    return WeightFiles(shards, index=name, variant=variant or None)


def _shards(base: str, variant: str, present: list[str]) -> tuple[str, ...]:
    """Shards by their names alone, in either of the two places where writers have put the variant."""
    stem, tag = re.escape(base), rf"\.{re.escape(variant)}" if variant else ""
    number = r"-\d{5}-of-\d{5}"
    shard = re.compile(rf"{stem}(?:{tag}{number}|{number}{tag})\.safetensors")
    return tuple(name for name in present if shard.fullmatch(name))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model's folder. Raises LoadError if it is missing, unreadable or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror or error}", field="model") from None
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path} is not valid JSON ({error})", field="model") from None
    if not isinstance(content, dict):
        raise LoadError(f"{path} should hold a JSON object, not a {type(content).__name__}", field="model")
    return content


def read_shards(path: Path) -> dict[str, tuple[str, ...]]:
    """An index file's shards: each file's name with the tensors it should hold. Raises LoadError, also for a shard
    that lies outside the index's own folder."""
    mapping = read_json(path).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise LoadError(f"{path} has no weight_map", field="model")
    shards: dict[str, list[str]] = {}
    for tensor, file in mapping.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise LoadError(f"{path} names a shard outside its folder: {file!r}", field="model")
        shards.setdefault(file, []).append(tensor)
    return {file: tuple(tensors) for file, tensors in sorted(shards.items())}

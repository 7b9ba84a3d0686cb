"""Reading a YAML file as plain data, with the line of each key; anything beyond plain data is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from triptych.errors import InvalidRequest

__all__ = ["Lines", "read_yaml"]

MAX_BYTES = 2**20
MAX_DEPTH = 20
MAX_VALUES = 20_000

Lines = dict[tuple[Any, ...], int]
"""The line, counted from 1, of each value by its path of keys and indexes."""


def read_yaml(path: str | os.PathLike[str]) -> tuple[Any, Lines]:
    """The file's one document and its lines. Raises InvalidRequest for a file that cannot be read, is no YAML, names
    a key twice, uses anchors, or nests too deeply."""
    file = Path(path)
    try:
        if not file.is_file():
            raise InvalidRequest.of("layout", str(path), "fused, split, or the path of a YAML file")
        with file.open("rb") as opened:
            text = opened.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise InvalidRequest.of("layout", str(path), f"a file that can be read ({error})") from None
    if len(text) > MAX_BYTES:
        raise InvalidRequest.of("layout", f"{file.name}, of more than {MAX_BYTES} bytes", f"at most {MAX_BYTES} bytes")
    loader: yaml.SafeLoader | None = None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        lines: Lines = {(): 1}
        return (None if root is None else _plain(loader, root, (), lines, file.name)), lines
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest.of("layout", file.name, f"YAML ({_told(error)})") from None
    finally:
        if loader is not None:
            loader.dispose()


def _told(error: Exception) -> str:
    """Where a file stops being YAML, and why, as one line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error) or type(error).__name__
    text = " ".join(str(problem).split())
    return f"line {mark.line + 1}: {text}" if mark is not None else text


def _plain(loader: yaml.SafeLoader, node: yaml.Node, path: tuple[Any, ...], lines: Lines, file: str) -> Any:
    if len(path) > MAX_DEPTH or len(lines) > MAX_VALUES:
        raise InvalidRequest.of("layout", file, f"at most {MAX_DEPTH} levels and {MAX_VALUES} values")
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, item, (*path, index), lines, file) for index, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return _scalar(loader, node, file)
    found: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = _scalar(loader, key_node, file) if isinstance(key_node, yaml.ScalarNode) else None
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise InvalidRequest.of("layout", key_node.value, f"keys that are words ({file}, line {line})")
        if key in found:
            raise InvalidRequest.of(key, "the key twice", f"once ({file}, line {line})")
        lines[(*path, key)] = line
        found[key] = _plain(loader, value_node, (*path, key), lines, file)
    return found


def _scalar(loader: yaml.SafeLoader, node: yaml.Node, file: str) -> Any:
    try:
        return loader.construct_object(node)
    except ValueError as error:  # PyYAML lets the thirteenth month and the like through
        line = node.start_mark.line + 1
        raise InvalidRequest.of("layout", node.value, f"a value ({error}; {file}, line {line})") from None

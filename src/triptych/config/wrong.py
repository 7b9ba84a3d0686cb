"""pydantic's errors as ours: the key's path, what was given, what is allowed, and where it stands in its file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, get_args

from pydantic import BaseModel

from triptych.errors import InvalidRequest

__all__ = ["follows", "line_of", "problem"]


def problem(
    kind: type[BaseModel], error: Any, *, below: str = "", file: str = "",
    lines: Mapping[tuple[Any, ...], int] = MappingProxyType({}),
) -> InvalidRequest:  # fmt: skip
    """One of pydantic's errors about a model, which itself stands `below` a key, or is a file's whole content."""
    path: tuple[Any, ...] = error["loc"]
    given, allowed = error.get("input"), _allowed(error["msg"])
    if error["type"] == "extra_forbidden":
        given, path, allowed = path[-1], path[:-1], "the keys " + ", ".join(_keys(kind, path[:-1]))
    elif error["type"] == "missing":
        given, allowed = "nothing", "a value, it cannot be left out"
    wrong = InvalidRequest.of(_spelled((below, *path) if below else path) or "layout", given, allowed)
    if file:
        wrong = InvalidRequest(f"{wrong.message} ({file}, line {line_of(error['loc'], lines)})", field=wrong.field)
    return wrong


def line_of(path: tuple[Any, ...], lines: Mapping[tuple[Any, ...], int]) -> int:
    """The line of a value, or of the nearest one above it that is there."""
    while path not in lines and path:
        path = path[:-1]
    return lines.get(path, 1)


def follows(error: Any, others: Sequence[Any]) -> bool:
    """Whether an error is only that a list has too few items left, after another about one of them."""
    path = error["loc"]
    return error["type"] == "too_short" and any(
        other["loc"][: len(path)] == path and other is not error and other["type"] != "too_short" for other in others
    )


def _allowed(message: str) -> str:
    """What pydantic allows, in the words of a file."""
    message = message.removeprefix("Value error, ").removeprefix("Input should be ")
    message = re.sub(r"^a valid tuple$", "a list", message)
    message = re.sub(
        r"^String should match pattern '\^tcp:.*", "tcp://HOST:PORT, with * or 0 for any free port", message
    )
    message = re.sub(r"^Tuple should have at least (\d+) item.*", r"a list of at least \1", message)
    return re.sub(r"^a valid dictionary or instance of \w+$", "keys with values", message)


def _spelled(path: tuple[Any, ...]) -> str:
    """A key's path as people write it: workers[0].devices."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _keys(kind: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """The keys that are allowed at a path below a model."""
    for part in path:
        if isinstance(part, str):
            kind = next(_models(kind.model_fields[part].annotation))
    return list(kind.model_fields)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)

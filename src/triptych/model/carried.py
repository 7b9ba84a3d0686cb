"""What an object carries through a loop: found by comparing it with how it was, kept as plain data, and put back into
an object that has gone the same way with other numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from triptych.errors import WrongPayload

__all__ = ["Unkeepable", "kept", "marks", "put_back"]

MAX_DEPTH = 4
"""Objects within objects that are looked into; deeper ones count as unchanged while they are the same."""

MAX_PLAIN_DEPTH = 12
"""Values within values that are kept; objects may refer to themselves."""

_PLAIN = (bool, int, float, str)
_NAMED = (torch.dtype, torch.device)


class Unkeepable(Exception):
    """A value has changed that plain data cannot say."""


def marks(thing: Any) -> dict[str, Any]:
    """How an object's attributes are now, for `kept`. Copies no tensor."""
    return _marks(thing, MAX_DEPTH)


def _marks(thing: Any, depth: int) -> dict[str, Any]:
    return {name: _mark(value, depth) for name, value in vars(thing).items()}


def kept(before: dict[str, Any], thing: Any, known_only: bool = False) -> dict[str, Any]:
    """The attributes that have changed since `before`, as plain data that nothing later writes into (tensors are
    copied where they are). `known_only`: without those that came since. Raises Unkeepable, naming the attribute."""
    found: dict[str, Any] = {}
    for name, value in _changed(before, thing, known_only):
        within = _marks_of(before.get(name), value)
        if within is None:
            found[name] = _plain(name, value, MAX_PLAIN_DEPTH)
        else:
            found[name] = {"object": type(value).__name__, "has": kept(within, value)}
    return found


def put_back(before: dict[str, Any], thing: Any, values: Any, path: str, known_only: bool = False) -> None:
    """Gives an object the attributes that `kept` kept of one like it, which had the same marks `before`.

    Raises WrongPayload, naming path and attribute, where they do not fit the attributes that it has.
    """
    if not isinstance(values, dict):
        raise WrongPayload("given no values; allowed: attributes by name", field=path)
    for name, value in _changed(before, thing, known_only):
        if name not in values and _holds_tensors(value):
            raise WrongPayload("missing", field=f"{path}.{name}")
    for name, value in values.items():
        if name not in vars(thing):
            raise WrongPayload("nothing of that name changes here", field=f"{path}.{name}")
        live = vars(thing)[name]
        within = _marks_of(before.get(name), live)
        if within is not None and isinstance(value, dict) and value.get("object") == type(live).__name__:
            put_back(within, live, value.get("has"), f"{path}.{name}")
        else:
            vars(thing)[name] = _fitted(value, live, f"{path}.{name}")


def _marks_of(mark: Any, value: Any) -> dict[str, Any] | None:
    """The marks of an object that is still the one that was marked."""
    marked = _has_state(value) and type(mark) is tuple and mark[0] is value
    return mark[1] if marked else None


def _mark(value: Any, depth: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value, value._version
    if isinstance(value, np.ndarray):
        return value, value.copy()
    if type(value) in (list, tuple):
        return [_mark(item, depth) for item in value]
    if type(value) is dict:
        return {key: _mark(item, depth) for key, item in value.items()}
    if depth and _has_state(value):
        return value, _marks(value, depth - 1)
    return value


def _same(mark: Any, value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return type(mark) is tuple and mark[0] is value and mark[1] == value._version
    if isinstance(value, np.ndarray):
        return type(mark) is tuple and mark[0] is value and np.array_equal(mark[1], value)
    if type(value) in (list, tuple):
        return type(mark) is list and len(mark) == len(value) and all(map(_same, mark, value))
    if type(value) is dict:
        return type(mark) is dict and mark.keys() == value.keys() and all(_same(mark[k], value[k]) for k in value)
    within = _marks_of(mark, value)
    if within is not None:
        return not _changed(within, value, False)
    if isinstance(value, _PLAIN):
        return type(mark) is type(value) and mark == value
    return mark is value


def _changed(before: dict[str, Any], thing: Any, known_only: bool) -> list[tuple[str, Any]]:
    return [
        (name, value)
        for name, value in vars(thing).items()
        if (not _same(before[name], value) if name in before else not known_only)
    ]


def _has_state(value: Any) -> bool:
    """Whether an object is looked into: one with attributes that is neither code nor a model. Diffusers' objects with
    a configuration (schedulers, guiders) are; what is callable is somebody's function with its memory."""
    if isinstance(value, type | torch.nn.Module) or not hasattr(value, "__dict__"):
        return False
    return hasattr(value, "config") or not callable(value)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_holds_tensors(item) for item in value)
    return isinstance(value, torch.Tensor | np.ndarray)


def _plain(path: str, value: Any, depth: int) -> Any:
    if not depth:
        raise Unkeepable(f"{path} is nested deeper than {MAX_PLAIN_DEPTH}")
    if value is None or type(value) in _PLAIN:
        return value
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray | np.generic):
        kind = "array" if isinstance(value, np.ndarray) else "number"
        return {kind: _from_numpy(path, np.array(value))}
    if type(value) in (list, tuple):
        return type(value)([_plain(f"{path}[{index}]", item, depth - 1) for index, item in enumerate(value)])
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: _plain(f"{path}.{key}", item, depth - 1) for key, item in value.items()}}
    if isinstance(value, _NAMED):
        return {"name": str(value)}
    if _has_state(value):
        has = {name: _plain(f"{path}.{name}", item, depth - 1) for name, item in vars(value).items()}
        return {"object": type(value).__name__, "has": has}
    raise Unkeepable(f"{path} is a {type(value).__name__}")


def _from_numpy(path: str, value: np.ndarray) -> torch.Tensor:
    try:
        return torch.from_numpy(value)
    except TypeError:
        raise Unkeepable(f"{path} is an array of {value.dtype}") from None


def _fitted(value: Any, live: Any, path: str) -> Any:
    """The kept value in the form of the one that is there. Raises WrongPayload if it has another."""
    match value, live:
        case torch.Tensor(), torch.Tensor():
            return _tensor(value, live, path)
        case {"array": torch.Tensor() as array}, np.ndarray():
            return _tensor(array, _from_numpy(path, live), path).numpy()
        case {"number": torch.Tensor() as number}, np.generic():
            return number.numpy()[()]
        case {"name": str(name)}, _ if isinstance(live, _NAMED) and str(live) == name:
            return live
        case {"dict": dict(items)}, dict() if items.keys() == live.keys():
            return {key: _fitted(items[key], live[key], f"{path}.{key}") for key in items}
        case {"object": str(kind), "has": dict(items)}, _ if type(live).__name__ == kind:
            return _object(items, live, path)
        case list() | tuple(), list() | tuple() if type(value) is type(live) and len(value) == len(live):
            return type(live)([_fitted(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(value, live, strict=True))])
    if type(value) is type(live) and (value is None or type(value) in _PLAIN):
        return value
    raise WrongPayload(f"given {_shown(value)}; allowed: {_shown(live)}", field=path)


def _object(items: dict[str, Any], live: Any, path: str) -> Any:
    here = vars(live)
    if items.keys() != here.keys():
        strange = sorted(items.keys() ^ here.keys())
        raise WrongPayload(f"{', '.join(strange)} on one side only", field=path)
    here.update({name: _fitted(items[name], here[name], f"{path}.{name}") for name in items})
    return live


def _tensor(value: torch.Tensor, live: torch.Tensor, path: str) -> torch.Tensor:
    if value.shape != live.shape or value.dtype != live.dtype:
        raise WrongPayload(f"given {_shown(value)}; allowed: {_shown(live)}", field=path)
    # A copy in any case: what arrived belongs to others, and may lie where kernels round otherwise.
    return value.to(live.device, copy=True)


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return f"{len(value)} values" if isinstance(value, list | tuple) else type(value).__name__

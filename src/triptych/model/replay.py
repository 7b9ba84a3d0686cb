"""Recording what a pipeline's methods return in one stage, and answering with it in the next.

Recorded values cross as plain data: tensors, numbers, strings, lists, tuples, and dicts with one of the keys below for
what these cannot say (a model's output, a latent distribution, a picture). Their skeleton
is the same with every tensor replaced by its shape and dtype: plain values alone, from which `blank` makes zeros.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_oobleck import OobleckDiagonalGaussianDistribution
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution, IdentityDistribution
from PIL import Image

from triptych.errors import Unsupported, WrongPayload

DISTRIBUTIONS: dict[str, Callable[..., Any]] = {
    "DiagonalGaussianDistribution": DiagonalGaussianDistribution,
    "OobleckDiagonalGaussianDistribution": OobleckDiagonalGaussianDistribution,
    "IdentityDistribution": lambda parameters, deterministic: IdentityDistribution(parameters),
}
"""What a VAE's encoder returns, by class name: all are functions of their parameters."""

UNWANTED = ("past_key_values",)
"""Fields of a model's output that no later stage reads and that are no data."""


class Record(dict[str, Any]):
    """A model's output as it comes out on the other side: fields by name, by attribute and by position."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


def pack(value: Any) -> Any:
    """A pipeline's value as plain data. Raises Unsupported for an object that cannot cross."""
    if value is None or isinstance(value, bool | int | float | str | torch.Tensor):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return _each(value, pack)
    if isinstance(value, Mapping):
        return {"record": {str(key): pack(item) for key, item in value.items() if key not in UNWANTED}}
    if isinstance(value, Image.Image):
        return {"picture": torch.from_numpy(np.array(_plain(value)))}
    if isinstance(value, np.ndarray):
        return {"array": torch.from_numpy(np.ascontiguousarray(value))}
    kind = type(value).__name__
    if kind in DISTRIBUTIONS:
        return {
            "distribution": kind,
            "parameters": pack(value.parameters),
            "deterministic": getattr(value, "deterministic", False),
        }
    raise Unsupported(f"a {type(value).__module__}.{kind} cannot cross between stages")


def _each(items: list[Any] | tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """The changed items, in a list if they were in one, else in a plain tuple."""
    changed = [change(item) for item in items]
    return changed if isinstance(items, list) else tuple(changed)


def _plain(picture: Image.Image) -> Image.Image:
    """The picture in a mode that its pixels alone tell: L, RGB or RGBA."""
    if picture.mode in ("L", "RGB", "RGBA"):
        return picture
    return picture.convert({"1": "L", "LA": "RGBA", "PA": "RGBA"}.get(picture.mode, "RGB"))


def unpack(value: Any) -> Any:
    """What `pack` was given, model outputs as Records. Raises WrongPayload for what `pack` cannot have made."""
    if isinstance(value, list | tuple):
        return _each(value, unpack)
    if not isinstance(value, dict):
        return value
    match value:
        case {"record": dict(items)}:
            return Record({key: unpack(item) for key, item in items.items()})
        case {"picture": torch.Tensor() as pixels}:
            return Image.fromarray(pixels.cpu().numpy())
        case {"array": torch.Tensor() as array}:
            return array.cpu().numpy()
        case {"distribution": str(kind), "parameters": parameters, "deterministic": bool(flag)}:
            if kind in DISTRIBUTIONS:
                return DISTRIBUTIONS[kind](unpack(parameters), deterministic=flag)
    raise WrongPayload(f"a recorded value has the unknown form {sorted(map(str, value))}")


def change_tensors(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """Packed data with every tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return _each(value, lambda item: change_tensors(item, change))
    if isinstance(value, dict):
        return {key: change_tensors(item, change) for key, item in value.items()}
    return value


def skeleton(value: Any) -> Any:
    """Packed data with every tensor replaced by its shape and dtype."""
    return change_tensors(
        value, lambda tensor: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    )


def blank(value: Any, device: torch.device) -> Any:
    """Packed data of a skeleton's shapes: zeros, and ones where they are integers or truth values, so that a mask
    leaves everything in. Raises WrongPayload for an unknown dtype."""
    if isinstance(value, list | tuple):
        return _each(value, lambda item: blank(item, device))
    if not isinstance(value, dict):
        return value
    if set(value) != {"shape", "dtype"}:
        return {key: blank(item, device) for key, item in value.items()}
    dtype = getattr(torch, str(value["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise WrongPayload(f"a recorded tensor has the unknown dtype {value['dtype']!r}")
    fill = 0 if dtype.is_floating_point or dtype.is_complex else 1
    return torch.full(value["shape"], fill, dtype=dtype, device=device)


class Recorder:
    """Lets calls through and keeps what they return, by name, in order. A call inside another recorded call is part
    of that one and not kept."""

    def __init__(self) -> None:
        self.calls: dict[str, list[Any]] = {}
        self._inside = False

    def around(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """`real`, recorded under `name`."""

        @functools.wraps(real)
        def record(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return real(*args, **kwargs)
            self._inside = True
            try:
                result = real(*args, **kwargs)
            finally:
                self._inside = False
            # A copy, since pipelines may go on to write into what they got.
            self.calls.setdefault(name, []).append(change_tensors(pack(result), torch.clone))
            return result

        return record


class Shapes:
    """Lets calls through and keeps the skeletons of what they return, by name: runs of equal ones as [times, skeleton],
    since a denoiser returns the same shape at every step."""

    def __init__(self) -> None:
        self.runs: dict[str, list[list[Any]]] = {}
        self._last: dict[str, Any] = {}

    def around(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """`real`, its shapes noted under `name`."""

        @functools.wraps(real)
        def note(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            self.add(name, result)
            return result

        return note

    def add(self, name: str, result: Any) -> None:
        """Notes one more result under `name`. Raises Unsupported for one that is no data."""
        runs, plain = self.runs.setdefault(name, []), _plain_shape(result)
        if plain is not None and plain == self._last.get(name):
            runs[-1][0] += 1
            return
        self._last[name], shape = plain, skeleton(pack(result))
        if runs and runs[-1][1] == shape:
            runs[-1][0] += 1
        else:
            runs.append([1, shape])


def _plain_shape(result: Any) -> Any:
    """What tells two results of the most usual kind apart, a tensor or a tuple of one, at next to no cost: a denoiser
    is called often. None for any other."""
    only = result[0] if type(result) is tuple and len(result) == 1 else result
    return (type(result), only.shape, only.dtype) if type(only) is torch.Tensor else None


class Player:
    """Answers calls in place of the real thing, in the order in which they were recorded."""

    def __init__(self, calls: Mapping[str, Sequence[Any]]) -> None:
        self._calls = {name: list(reversed(answers)) for name, answers in calls.items()}

    def around(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """The stand-in for `real`. Called more often than recorded, it raises WrongPayload."""

        @functools.wraps(real)
        def answer(*_: Any, **__: Any) -> Any:
            if not self._calls.get(name):
                raise WrongPayload(f"{name} is called more often than the stage before recorded", field=name)
            return unpack(self._calls[name].pop())

        return answer


class Blanks:
    """Answers calls with zeros of the shapes that `Shapes` noted; the last shape serves for any further call."""

    def __init__(self, runs: Mapping[str, Sequence[Sequence[Any]]], device: torch.device) -> None:
        self._left = {name: [[int(times), shape] for times, shape in noted] for name, noted in runs.items()}
        self._device = device

    def around(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """The stand-in for `real`. Raises WrongPayload if no shape of it is known."""

        @functools.wraps(real)
        def answer(*_: Any, **__: Any) -> Any:
            runs = self._left.get(name)
            if not runs:
                raise WrongPayload(f"the shapes that {name} returns are missing", field=name)
            runs[0][0] -= 1
            shape = runs[0][1] if runs[0][0] > 0 or len(runs) == 1 else runs.pop(0)[1]
            return unpack(blank(shape, self._device))

        return answer


def overridden(module: Any, **methods: Callable[..., Any]) -> Any:
    """A shallow copy of a module with some methods replaced: class, config and weights stay the same objects, and so
    do the signatures, by which pipelines decide what to pass."""
    double = copy.copy(module)
    for name, method in methods.items():
        object.__setattr__(double, name, _in_place_of(getattr(module, name), method))
    return double


def _in_place_of(real: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(real)
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return call

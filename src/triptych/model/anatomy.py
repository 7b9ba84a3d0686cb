"""What a standard pipeline's code does, read from the code itself: nothing is run and no weight is read."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline

RECORDED = ("encode_prompt", "_encode_prompt", "encode_image")
"""Methods that hold a pipeline's encoding: what they return crosses, and what they use belongs to encode."""

_PLUMBING = ("diffusers.pipelines.pipeline_utils", "diffusers.configuration_utils")


@dataclass(frozen=True)
class Anatomy:
    """The functions that a call of a pipeline can reach, each with the names that it uses.

    `loop` is reached without entering a recorded method, `encoding` only through one. `recorded` are the recorded
    methods that are reached.
    """

    recorded: tuple[str, ...]
    loop: dict[str, frozenset[str]]
    encoding: dict[str, frozenset[str]] = field(default_factory=dict)

    def mentions(self, *names: str) -> bool:
        """Whether one function outside the recorded methods uses all of these names."""
        return any(used.issuperset(names) for used in self.loop.values())

    def beside(self, name: str) -> frozenset[str]:
        """Every name that a function outside the recorded methods uses together with this one."""
        return frozenset().union(*(used for used in self.loop.values() if name in used))

    def encodes(self, name: str) -> bool:
        """Whether a recorded method uses this name."""
        return any(name in used for used in self.encoding.values())


def anatomy(kind: type[DiffusionPipeline]) -> Anatomy:
    """Follows a pipeline class' code from its constructor and its call."""
    loop = _reach(kind, ("__init__", "__call__"), stop=RECORDED)
    used = frozenset().union(*loop.values())
    recorded = tuple(name for name in RECORDED if name in used and callable(getattr(kind, name, None)))
    return Anatomy(recorded, loop, _reach(kind, recorded, stop=()))


def _reach(kind: type, start: tuple[str, ...], stop: tuple[str, ...]) -> dict[str, frozenset[str]]:
    found: dict[str, frozenset[str]] = {}
    waiting = list(start)
    while waiting:
        name = waiting.pop()
        function = _function(kind, name)
        if name in found or function is None or function.__module__ in _PLUMBING:
            continue
        found[name] = frozenset(_names(function.__code__))
        waiting += [other for other in found[name] if other not in stop]
    return found


def _function(kind: type, name: str) -> types.FunctionType | None:
    """The function behind a method or property of a class, free of its decorators."""
    member = inspect.getattr_static(kind, name, None)
    if isinstance(member, property):
        member = member.fget
    if isinstance(member, staticmethod | classmethod):
        member = member.__func__
    member = inspect.unwrap(member) if callable(member) else member
    return member if isinstance(member, types.FunctionType) else None


def _names(code: types.CodeType) -> Iterator[str]:
    """The attributes, globals and string constants (for `getattr(self, "vae")`) of a function and those inside it."""
    yield from code.co_names
    yield from _strings(code.co_consts)


def _strings(constants: tuple[Any, ...]) -> Iterator[str]:
    for constant in constants:
        if isinstance(constant, str) and constant.isidentifier():
            yield constant
        elif isinstance(constant, types.CodeType):
            yield from _names(constant)

"""A task's own schedulers: shifted as it asks, drawing from its generator, free of any other task's state."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Iterable
from typing import Any

import torch

from triptych.errors import InvalidRequest

SHIFTS = ("shift", "flow_shift")
"""What schedulers call the shift of their noise levels in their configuration."""

FLOW_PREDICTIONS = ("flow_prediction", "flow")


def own_copies(
    schedulers: Iterable[Any], shift: float | None, generator: torch.Generator | None
) -> list[tuple[Any, Any]]:
    """Each scheduler with the task's own copy of it, whose steps draw from `generator` where the pipeline gives none.
    `shift` takes the place of the configured shift and of one that depends on the size.

    Raises InvalidRequest if `shift` is given and there are schedulers, none of which knows one.
    """
    pairs = [(old, shifted(old, shift)) for old in schedulers]
    if shift is not None and pairs and not any(_shift_name(old) for old, _ in pairs):
        kinds = ", ".join(type(old).__name__ for old, _ in pairs)
        raise InvalidRequest.of("shift", shift, f"nothing ({kinds} has no shift)")
    for _, scheduler in pairs:
        if generator is not None:
            scheduler.step = SeededStep(scheduler, generator)
    return pairs


def _shift_name(scheduler: Any) -> str | None:
    return next((name for name in SHIFTS if name in scheduler.config), None)


def shifted(scheduler: Any, shift: float | None) -> Any:
    """A copy of a scheduler that nothing has stepped, with that fixed shift if it has one."""
    name = _shift_name(scheduler)
    if shift is None or name is None:
        return copy.deepcopy(scheduler)
    config = scheduler.config
    fixed = {"use_dynamic_shifting": False} if "use_dynamic_shifting" in config else {}
    return type(scheduler).from_config(config, **{name: shift}, **fixed)


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler goes along straight lines, x = (1 - sigma)·x0 + sigma·noise."""
    config = scheduler.config
    named = type(scheduler).__name__.startswith("FlowMatch") or config.get("use_flow_sigmas")
    return bool(named or config.get("prediction_type") in FLOW_PREDICTIONS)


class SeededStep:
    """A scheduler's `step` that draws from the task's generator if its caller names none: else the noise would come
    from the process' own, and a seed would not give the same picture twice."""

    def __init__(self, scheduler: Any, generator: torch.Generator) -> None:
        self._scheduler, self._generator = scheduler, generator
        self._real = types.MethodType(type(scheduler).step, scheduler)
        names = list(inspect.signature(self._real).parameters)
        self._place = names.index("generator") if "generator" in names else None
        functools.update_wrapper(self, self._real, updated=())

    def __deepcopy__(self, memo: dict[int, Any]) -> SeededStep:
        # Some pipelines copy their scheduler for a second modality: the copy steps by itself, from the same generator.
        return SeededStep(memo.get(id(self._scheduler), self._scheduler), self._generator)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._place is not None and len(args) <= self._place and kwargs.get("generator") is None:
            kwargs["generator"] = self._generator
        return self._real(*args, **kwargs)

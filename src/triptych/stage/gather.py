"""Gather: park a task where its pipeline code calls a heavy component, group parked calls, run a group, resume.

Every task is a greenlet that runs its own pipeline code with its own scheduler, guider and generator. The heavy
components it sees are stand-ins: shallow copies of the loaded modules, of the same class and with the same weights,
whose entry points park the greenlet. Whoever drives the tasks (one thread) runs the parked calls in the order and
the groups it likes. No code knows a family.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import greenlet
import torch

ENTRY_POINTS = ("forward", "encode", "decode")
"""A module's methods at which tasks park. `forward` is every model's; the other two are the autoencoders'."""


@dataclass(frozen=True)
class Call:
    """A parked call of `method` on `component`, with the arguments as the pipeline gave them."""

    component: str
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Parked:
    """A task waits for this call."""

    call: Call


class Waiting:
    """A task waits for what only its driver can give it."""


class ModeChanged(AssertionError):
    """A task came back with torch in another mode than it went with: the next task would run wrong."""


def _modes() -> tuple[bool, bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")


class TaskGreenlet(greenlet.greenlet):
    """A greenlet whose component calls park; any other greenlet's run at once."""


class Gather:
    """The stand-ins for one stage's components, and the switching in and out of tasks.

    Torch's grad mode is per thread, not per greenlet: the thread must hold one outer `torch.no_grad()` for life, and
    every switch checks that the task left the modes as they were.
    """

    def __init__(self, components: Mapping[str, Any]) -> None:
        self._real: dict[tuple[str, str], Callable[..., Any]] = {}
        self.stand_ins: dict[str, Any] = {
            name: self._stand_in(name, module)
            for name, module in components.items()
            if isinstance(module, torch.nn.Module)
        }

    def _stand_in(self, name: str, module: torch.nn.Module) -> torch.nn.Module:
        double = copy.copy(module)
        for method in ENTRY_POINTS:
            real = getattr(module, method, None)
            if callable(real):
                self._real[name, method] = real
                object.__setattr__(double, method, self._park(name, method, real))
        return double

    @staticmethod
    def _park(name: str, method: str, real: Callable[..., Any]) -> Callable[..., Any]:
        # Several pipelines filter arguments by the signature of forward: wraps keeps it.
        @functools.wraps(real)
        def park(*args: Any, **kwargs: Any) -> Any:
            task = greenlet.getcurrent()
            if not isinstance(task, TaskGreenlet) or task.parent is None:
                return real(*args, **kwargs)
            return task.parent.switch(Parked(Call(name, method, args, kwargs)))

        cast(Any, park).__signature__ = inspect.signature(real)
        return park

    def start(self, run: Callable[[], Any]) -> TaskGreenlet:
        """A task that will run `run`, once it is begun."""
        return TaskGreenlet(run)

    @staticmethod
    def wait() -> None:
        """Called by a task: parks it (Waiting) until it is resumed."""
        task = greenlet.getcurrent()
        assert isinstance(task, TaskGreenlet) and task.parent is not None, "only a task can wait"
        task.parent.switch(Waiting())

    def begin(self, task: TaskGreenlet) -> Parked | Waiting | Any:
        """Runs a new task until it parks or ends (what it returned). Raises what it raised."""
        return self._switch(task, task.switch)

    def resume(self, task: TaskGreenlet, value: Any) -> Parked | Any:
        """Goes on with a parked task: its call returns `value`. Otherwise like `begin`."""
        return self._switch(task, lambda: task.switch(value))

    def fail(self, task: TaskGreenlet, error: BaseException) -> Parked | Any:
        """Like `resume`, but the parked call raises `error` inside the task."""
        return self._switch(task, lambda: task.throw(error))

    def _switch(self, task: TaskGreenlet, go: Callable[[], Any]) -> Any:
        task.parent = greenlet.getcurrent()
        before = _modes()
        try:
            return go()
        finally:
            after = _modes()
            if after != before:
                torch.set_grad_enabled(before[0])
                torch.set_autocast_enabled("cpu", before[2])
                raise ModeChanged(f"torch modes (grad, inference, autocast) went from {before} to {after}")

    def run(self, calls: list[Call]) -> list[Any]:
        """Runs a group of calls and gives each its result. Raises what the component raised."""
        return [self._real[call.component, call.method](*call.args, **call.kwargs) for call in calls]

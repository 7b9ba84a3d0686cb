"""One task's way through its denoising loop: what the loop carries is kept between steps, and put back where it was
kept.

To go on after step k the loop is replayed from its first step with the denoiser answering zeros of the shapes that it
had, which brings the pipeline's own code to where it was at the cost of its bookkeeping; there the numbers that came
of the zeros are replaced by the kept ones. Random draws need no replacing: the replay makes the same ones.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from triptych.errors import TriptychError, Unsupported, WrongPayload
from triptych.model.carried import Unkeepable, kept, marks, put_back
from triptych.model.contract import Pause, TaskInputs
from triptych.model.replay import Blanks, Shapes

__all__ = ["CHECKPOINT", "CHECKPOINT_VALUES", "Course", "check_checkpoint"]

_FORM = 1
CHECKPOINT = "checkpoint"
"""What the fields of errors about a task's checkpoint begin with."""

_KINDS: dict[str, type] = {
    "form": int,
    "pipeline": str,
    "step": int,
    "steps": int,
    "calls": dict,
    "parts": dict,
    "results": dict,
    "generator_state": torch.Tensor,
}
"""What a checkpoint holds: the steps done of all, the shapes of the denoiser's answers so far, what each part (the
loop's own state, schedulers, guiders) carries, the schedulers' last results, and the generator's state."""

CHECKPOINT_VALUES = frozenset(_KINDS)
"""The names of a checkpoint's values."""


def check_checkpoint(values: Mapping[str, Any], pipeline: str) -> None:
    """Raises WrongPayload, naming the field, for what no run of that pipeline can have kept."""
    for name, kind in _KINDS.items():
        if type(values.get(name)) is not kind:
            given = type(values[name]).__name__ if name in values else "nothing"
            raise WrongPayload(f"given {given}; allowed: {kind.__name__}", field=f"{CHECKPOINT}.{name}")
    strange = sorted(values.keys() - _KINDS.keys())
    if strange:
        raise WrongPayload("a checkpoint holds nothing of that name", field=f"{CHECKPOINT}.{strange[0]}")
    for name, allowed in (("form", _FORM), ("pipeline", pipeline)):
        if values[name] != allowed:
            raise WrongPayload(f"given {values[name]!r}; allowed: {allowed!r}", field=f"{CHECKPOINT}.{name}")
    for name in ("calls", "results"):
        for key, item in values[name].items():
            if not _well_formed(item if name == "calls" else [item]):
                raise WrongPayload("not in the form of a checkpoint", field=f"{CHECKPOINT}.{name}.{key}")
    if not 0 < values["step"] < values["steps"]:
        allowed = f"1 to {values['steps'] - 1}"
        raise WrongPayload(f"given {values['step']}; allowed: {allowed}", field=f"{CHECKPOINT}.step")


def _well_formed(pairs: Any) -> bool:
    """Whether it is a list of [count, anything]."""
    return isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int for pair in pairs
    )


class Course:
    """Notes the shapes of the denoiser's answers, and stands in for it while the loop is replayed."""

    def __init__(
        self,
        task: TaskInputs,
        pipeline: str,
        device: torch.device,
        resumable: bool = True,
        shapes_cross: bool = False,
    ) -> None:
        """Keeps nothing unless `resumable`. `shapes_cross`: later stages need `calls`.

        Raises WrongPayload if the task's checkpoint is none of that pipeline class's.
        """
        self._task, self._pipeline = task, pipeline
        self._point = task.checkpoint
        if self._point is not None:
            check_checkpoint(self._point, pipeline)
            if not resumable:
                raise WrongPayload(f"given one; allowed: none ({pipeline} keeps none)", field=CHECKPOINT)
        self._shapes, self._shapes_cross = Shapes(), shapes_cross
        self._blanks = Blanks(self._point["calls"] if self._point else {}, device)
        self._marks: dict[str, dict[str, Any]] | None = None
        self._keep = task.keep if resumable else None
        self.results: dict[str, list[Any]] = {}

    @property
    def replaying(self) -> bool:
        """Whether the loop has yet to come to where the checkpoint was taken."""
        return self._point is not None

    @property
    def wanted(self) -> bool:
        """Whether there is anything left to put back or to keep."""
        return self._point is not None or self._keep is not None

    @property
    def begun(self) -> bool:
        """Whether the loop has begun."""
        return self._marks is not None

    @property
    def calls(self) -> dict[str, list[list[Any]]]:
        """The shapes so far, in the form of `Shapes`."""
        return self._shapes.runs

    def note(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """`real`, its answers' shapes noted under `name`."""
        return self._shapes.around(name, real)

    def around(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """`real`, or what stands in for it, its answers' shapes noted under `name`. An answer that is no data ends the
        checkpoints; Unsupported is raised if its shape is to cross."""
        blank = real if self._point is None else self._blanks.around(name, real)

        @functools.wraps(real)
        def answer(*args: Any, **kwargs: Any) -> Any:
            if self._point is not None and name not in self._point["calls"]:
                raise WrongPayload("missing", field=f"{CHECKPOINT}.calls.{name}")
            result = (real if self._point is None else blank)(*args, **kwargs)
            try:
                self._shapes.add(name, result)
            except Unsupported:
                if self._shapes_cross:
                    raise
                self.refuse()
            return result

        return answer

    @contextlib.contextmanager
    def going(self) -> Iterator[None]:
        """Runs the pipeline's code in here. Raises WrongPayload if it ends without having come to where the checkpoint
        was taken, or fails on the way there: the answers' shapes, say, are another size's."""
        try:
            yield
        except (TriptychError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            if self._point is None:
                raise
            reason = f"going on from it failed with {type(error).__name__}: {error}"
            raise WrongPayload(reason, field=CHECKPOINT) from error
        self._arrived()

    def begin(self, parts: Mapping[str, Any]) -> None:
        """The loop begins; `parts` are the objects that carry anything, by name."""
        self._marks = {name: marks(part) for name, part in parts.items()}

    def between(self, done: int, total: int, parts: Mapping[str, Any], known_only: str | None = None) -> None:
        """`done` steps have ended and another begins. Puts the checkpoint back if it was taken here, otherwise lets
        one be taken. Of the part `known_only` only the attributes that it began with are carried.

        Raises WrongPayload for a checkpoint that does not fit.
        """
        if self._point is None:
            if self._keep is not None and done < total:
                self._keep(Pause(done, lambda: self._take(done, total, parts, known_only)))
        elif done == self._point["step"]:
            self._put_back(self._point, total, parts, known_only)
            self._point = None

    def refuse(self) -> None:
        """From here on the loop cannot be taken up again: no more checkpoints. Raises WrongPayload if it should be."""
        self._keep = None
        self._arrived()

    def result(self, name: str, count: int) -> Any:
        """What the scheduler of that name returned at its `count`th step, if that was its last before the checkpoint;
        None otherwise."""
        found = None if self._point is None else self._point["results"].get(name)
        return found[1] if found is not None and found[0] == count else None

    def _arrived(self) -> None:
        if self._point is not None:
            raise WrongPayload(f"the loop has ended before step {self._point['step']}", field=f"{CHECKPOINT}.step")

    def _take(self, done: int, total: int, parts: Mapping[str, Any], known_only: str | None) -> dict[str, Any] | None:
        assert self._marks is not None
        if parts.keys() != self._marks.keys():
            return None
        try:
            state = {name: kept(self._marks[name], part, name == known_only) for name, part in parts.items()}
        except Unkeepable:
            return None
        return {
            "form": _FORM,
            "pipeline": self._pipeline,
            "step": done,
            "steps": total,
            "calls": {name: [list(run) for run in runs] for name, runs in self.calls.items()},
            "parts": state,
            "results": {name: list(result) for name, result in self.results.items()},
            "generator_state": self._task.generator.get_state(),
        }

    def _put_back(self, point: dict[str, Any], total: int, parts: Mapping[str, Any], known_only: str | None) -> None:
        assert self._marks is not None
        self._check_place(point, total)
        for name in sorted(point["parts"].keys() ^ parts.keys()):
            raise WrongPayload("on one side only", field=f"{CHECKPOINT}.parts.{name}")
        for name, part in parts.items():
            put_back(self._marks[name], part, point["parts"][name], f"{CHECKPOINT}.parts.{name}", name == known_only)

    def _check_place(self, point: dict[str, Any], total: int) -> None:
        """Whether the replay has come the way that the checkpoint's run went."""
        if point["steps"] != total:
            raise WrongPayload(f"given {point['steps']}; allowed: {total}", field=f"{CHECKPOINT}.steps")
        if point["calls"] != self.calls:
            raise WrongPayload("other calls, or other shapes, than this task's", field=f"{CHECKPOINT}.calls")
        counts = {name: result[0] for name, result in self.results.items()}
        for name in sorted(point["results"].keys() | counts.keys()):
            if self.results.get(name, [0])[0] != point["results"].get(name, [0])[0]:
                raise WrongPayload("another number of steps than this task's", field=f"{CHECKPOINT}.results.{name}")
        if not torch.equal(point["generator_state"].cpu(), self._task.generator.get_state()):
            raise WrongPayload("of another seed, or other draws", field=f"{CHECKPOINT}.generator_state")

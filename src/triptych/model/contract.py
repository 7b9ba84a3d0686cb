"""The face that every way of running a pipeline's code shows to a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from triptych.model.load import Components, Placement
from triptych.model.topology import StageTopology, Topology


@dataclass(frozen=True)
class Step:
    """A denoising step has ended: `index` of `total`, 0-based. `latents` are the pipeline's own, in its own packing.
    `estimate` computes `denoised`, only for those who ask, and only while `on_step` lasts."""

    index: int
    total: int
    latents: torch.Tensor | None
    estimate: Callable[[], torch.Tensor | None] | None = None

    def denoised(self) -> torch.Tensor | None:
        """The final latents as this step foresees them; None where the scheduler allows no estimate."""
        return None if self.estimate is None else self.estimate()


@dataclass(frozen=True)
class Pause:
    """`step` denoising steps have ended, and another is about to begin. `take` gives what the loop carries
    into it, as plain data that belongs to the caller; None where the loop holds what plain data cannot say. Only while
    `TaskInputs.keep` lasts."""

    step: int
    take: Callable[[], dict[str, Any] | None]


@dataclass
class TaskInputs:
    """What one task of a stage works on. `fields` are the request's, in the pipeline's own names (prompt, height,
    num_inference_steps…); `values` came from earlier stages, `tags` are their kwargs_type names. `generator` is
    the task's own, already seeded or restored.

    `keep` is called between steps. `checkpoint` is what a `Pause` of the same task gave: its steps are not run again
    and not told of."""

    fields: dict[str, Any]
    guidance_scale: float | None
    generator: torch.Generator
    values: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, list[str]] = field(default_factory=dict)
    shift: float | None = None
    keep: Callable[[Pause], None] | None = None
    checkpoint: dict[str, Any] | None = None


class LateInputs(TaskInputs):
    """Those of a task that is begun before earlier stages' values have come. Who reads `values` or `tags` waits in
    `wait`, which returns once both were set."""

    def __init__(
        self,
        fields: dict[str, Any],
        guidance_scale: float | None,
        generator: torch.Generator,
        shift: float | None,
        wait: Callable[[], None],
    ) -> None:
        super().__init__(fields, guidance_scale, generator, shift=shift)
        del self.values, self.tags
        self._wait = wait

    def __getattr__(self, name: str) -> Any:
        """Called for what is not there."""
        if name not in ("values", "tags"):
            raise AttributeError(name)
        self._wait()
        return vars(self)[name]


@dataclass
class TaskOutputs:
    """What crosses to later stages: tensors, lists of them, JSON values. From decode: `images` (batch, channels,
    height, width) or `videos` (batch, frames, channels, height, width), float in 0…1."""

    values: dict[str, Any]
    tags: dict[str, list[str]] = field(default_factory=dict)


class StageProgram(Protocol):
    """One stage's share of a pipeline's code. Holds no state of any task; `run` may be entered by many greenlets of
    one thread, each with its own inputs and component stand-ins."""

    topology: Topology
    stage: StageTopology
    components: Mapping[str, Any]
    """The loaded components, weights included, by their pipeline names. Empty before `load`."""

    def load(self, components: Components, placement: Placement) -> None:
        """Loads only what `stage.loads` names (through `components`), and meta-device stand-ins for `stage.reads`.
        Raises LoadError with the reason."""
        ...

    def run(
        self,
        task: TaskInputs,
        stand_ins: Mapping[str, Any],
        on_step: Callable[[Step], None] | None = None,
    ) -> TaskOutputs:
        """Runs the pipeline's code for one task. `stand_ins` replace components of those names for this task only.
        `on_step` is called after each denoising step and may raise to end the task; what it raises comes out. Raises
        WrongPayload for a checkpoint that is not this task's."""
        ...

    def boundary_latents(self, task: TaskInputs, latents: torch.Tensor) -> torch.Tensor:
        """The step's latents in the form in which they cross to decode (unpacked), for previews."""
        ...

"""The contract between a stage and whoever drives it (one thread, nothing else touches the model)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from triptych.errors import TriptychError
from triptych.request import VaeTask
from triptych.stage.caches import Caches, Freed
from triptych.transfer import Payload

JobId = str


@dataclass(frozen=True)
class LoadProgress:
    """A component has been loaded: its name, its bytes, the seconds it took, `done` of `total` components."""

    component: str
    bytes: int
    seconds: float
    done: int
    total: int


@dataclass(frozen=True)
class StageInfo:
    """A loaded stage: its weights' bytes, and how many tasks it takes at once."""

    bytes: int
    capacity: int


@dataclass
class StageTask:
    """One stage's share of a job. `fields` in the pipeline's own names; `payload` from the stage before (None for the
    first). `seed` starts the generator unless the payload carries its state."""

    job: JobId
    fields: dict[str, Any]
    seed: int
    guidance_scale: float | None = None
    shift: float | None = None
    payload: Payload | None = None
    preview: bool = False
    raw: bool = False
    """From decode: float tensors in 0…1 as the pipeline made them, instead of uint8 pictures."""
    attempt: int = 0
    """How often this stage of the job was handed out before; goes into the payloads that it makes."""
    exact: bool = False
    """Never in a group with other tasks, so that they cannot change its last bits."""
    checkpoint: Payload | None = None
    """Where to go on: the payload of a `Checkpoint` of the same task. None: from the start."""
    checkpoint_seconds: float | None = None
    """Seconds of work after which the next pause between steps gives a `Checkpoint`; 0: each pause; None: none."""
    bare: VaeTask | None = None
    """No pipeline's code: a call of the stage's VAE on the payload's `tensor`, with `fields` as `VaeOptions`."""


@dataclass(frozen=True)
class Admitted:
    """The task is in."""


@dataclass(frozen=True)
class Full:
    """The stage holds as many tasks as it can; try again after an output."""


@dataclass(frozen=True)
class Refused:
    """The stage can never run this task; `error` says why."""

    error: TriptychError


@dataclass(frozen=True)
class StepDone:
    """A unit of a task is done (a denoising step, or the whole of a stage that has no steps)."""

    job: JobId
    step: int
    steps: int
    seconds: float
    preview: torch.Tensor | None = None
    """uint8 (height, width, 3)"""


@dataclass(frozen=True)
class Checkpoint:
    """`step` steps of a task are done, and from this payload it can go on, here or in another process. Never after
    the last step; none at all from a pipeline whose loop cannot be taken up in the middle."""

    job: JobId
    step: int
    payload: Payload


@dataclass(frozen=True)
class Output:
    """A task is done; `payload` is for the next stage (from decode: the pictures)."""

    job: JobId
    payload: Payload
    seconds: float
    steps: int
    peak_bytes: int
    resumed_at: int = 0
    """Steps of `steps` that were taken over from a checkpoint."""


@dataclass(frozen=True)
class Failed:
    """A task has failed alone; the others of its stage go on."""

    job: JobId
    error: TriptychError


StageEvent = StepDone | Checkpoint | Output | Failed


@dataclass(frozen=True)
class UsePreview:
    """From now on make previews with this: boundary latents and the task's fields in, uint8 (height, width, 3) out."""

    preview: Callable[[dict[str, Any], torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Flush:
    """Let go of what is kept only to be faster. Answered with Freed."""


Order = UsePreview | Flush
"""What a stage may be told between units; adapters and offloading will add theirs."""


class Stage(Protocol):
    """One panel of a model on one device or group of devices."""

    caches: Caches
    """What it keeps only to be faster."""

    def load(self, report: Callable[[LoadProgress], None]) -> StageInfo:
        """Loads only this stage's weights. Raises LoadError."""
        ...

    def expect(self, task: StageTask) -> None:
        """Prepares for a task that will come without a checkpoint, its payload not made yet, as far as that goes
        without; `cancel` undoes it. Only to be faster: raises nothing, and may do nothing."""
        ...

    def admit(self, task: StageTask) -> Admitted | Full | Refused:
        """Takes a task, never blocks."""
        ...

    def step(self) -> list[StageEvent]:
        """Runs one unit of one group of tasks; empty when there is nothing to do."""
        ...

    def cancel(self, job: JobId) -> None:
        """Drops a task before its next unit; unknown jobs are ignored."""
        ...

    def control(self, order: Order) -> Freed | None:
        """Carries out an order between units. Raises Unsupported for one that means nothing to this stage."""
        ...

    def close(self) -> None:
        """Drops all tasks and lets the weights go."""
        ...

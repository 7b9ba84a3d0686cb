"""A model whose stages are built anew for every run, as another process would build them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tests.families import folder
from tests.model.cases import CASES, CPU, SEED, Case
from triptych.model import ComponentInfo, Components, Placement, Topology, describe, open_model
from triptych.request import StageName
from triptych.stage import Admitted, Checkpoint, Failed, GatherStage, Output, Refused, StageEvent, StageTask, StepDone
from triptych.transfer import Payload, payload_of, payload_parts
from triptych.worker import build_stage

STEPS = 5
SLOW = ("hunyuan-video-1.5", "qwen-image-edit-plus")
"""Families of long texts and large pictures, which run fewer steps."""


class Counted(Components):
    """Components whose denoisers count their forwards."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.forwards: Counter[str] = Counter()

    def get(self, info: ComponentInfo, placement: Placement) -> Any:
        found = super().get(info, placement)
        if info.name.startswith(("transformer", "unet")) and "forward" not in vars(found):
            object.__setattr__(found, "forward", self._counted(info.name, found.forward))
        return found

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.forwards[name] += 1
            return real(*args, **kwargs)

        return forward


@dataclass
class Run:
    """What came of one task of a stage."""

    output: Output
    steps: list[int]
    checkpoints: dict[int, Payload] = field(default_factory=dict)
    forwards: Counter[str] = field(default_factory=Counter)


class Bench:
    """One case's model; each stage built anew for each run, from its files, as another process would."""

    def __init__(self, case: Case, where: Path | None = None, **changed: Any) -> None:
        self.topology: Topology = describe(open_model(str(where or folder(case.family))), case.workflow)
        self.case = case
        self.fields = {**case.fields, "num_inference_steps": _steps(case), **changed}
        self.encoded: Payload | None = None
        if len(self.topology.stages) > 1:
            self.encoded = self.run("encode", None).output.payload

    def task(self, name: StageName, payload: Payload | None, **more: Any) -> StageTask:
        declared = {item.name for item in self.topology.stage(name).request_inputs}
        fields = {key: value for key, value in self.fields.items() if key in declared}
        task = StageTask("job", deepcopy(fields), SEED, self.case.guidance_scale, None, arrived(payload), raw=True)
        task = replace(task, **more)
        return replace(task, checkpoint=arrived(task.checkpoint))

    def run(self, name: StageName, payload: Payload | None, **more: Any) -> Run:
        """Raises what the task failed with."""
        components = Counted(self.topology.source)
        stage = self.stage(name, components)
        return replace(driven(stage, self.task(name, payload, **more)), forwards=components.forwards)

    def stage(self, name: StageName = "denoise", components: Components | None = None) -> GatherStage:
        """A stage of that name, loaded anew."""
        stage = build_stage(self.topology, name, components or Components(self.topology.source), CPU)
        stage.load(lambda _: None)
        return stage

    def denoise(self, **more: Any) -> Run:
        return self.run("denoise", self.encoded, **more)

    def resume(self, checkpoint: Payload, **more: Any) -> Run:
        return self.denoise(checkpoint=checkpoint, **more)


def driven(stage: GatherStage, *tasks: StageTask) -> Run:
    """Runs tasks to their ends; what came of the last. Raises what one failed with."""
    for task in tasks:
        admitted = stage.admit(task)
        if isinstance(admitted, Refused):
            raise admitted.error
        assert admitted == Admitted()
    events: list[StageEvent] = []
    with torch.no_grad():
        while sum(isinstance(event, Output | Failed) for event in events) < len(tasks):
            events += stage.step()
    for event in events:
        if isinstance(event, Failed):
            raise event.error
    own = [event for event in events if event.job == tasks[-1].job]
    told = [event.step for event in own if isinstance(event, StepDone)]
    checkpoints = {event.step: event.payload for event in own if isinstance(event, Checkpoint)}
    return Run(next(event for event in own if isinstance(event, Output)), told, checkpoints)


def arrived(payload: Payload | None) -> Payload | None:
    """The payload as it comes out of another process."""
    return None if payload is None else payload_of(b"".join(payload_parts(payload)))


def _steps(case: Case) -> int:
    return 7 if "strength" in case.fields else STEPS - 2 * (case.family in SLOW)


def equal(one: Any, other: Any) -> bool:
    """Bit for bit, through lists and dicts."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def case_of(family: str) -> Case:
    """The family as it is."""
    return next(case for case in CASES if case.family == family)

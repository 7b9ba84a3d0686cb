"""A pipeline in one piece: what cannot be split still runs, in a single stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from triptych.errors import Unsupported
from triptych.model.contract import Step, TaskInputs, TaskOutputs
from triptych.model.course import Course
from triptych.model.declared import DENOISERS
from triptych.model.index import read_index
from triptych.model.load import Components, Placement
from triptych.model.pipeline import (
    Loop,
    arguments,
    assemble,
    own_guiders,
    own_schedulers,
    pictures,
    pipeline_class,
    steered,
    view,
)
from triptych.model.replay import overridden
from triptych.model.rounds import why_not_resumable
from triptych.model.topology import StageTopology, Topology

__all__ = ["FusedProgram"]


class FusedProgram:
    """A whole standard pipeline as one stage. Every component is loaded, whatever the stage names."""

    def __init__(self, topology: Topology, stage: StageTopology) -> None:
        self.topology = topology
        self.stage = stage
        self.components: Mapping[str, Any] = {}
        self._pipe: Any = None
        self._device = torch.device("cpu")
        self._carries = False

    def load(self, components: Components, placement: Placement) -> None:
        """Loads all components. Raises LoadError."""
        loaded = {name: components.get(info, placement) for name, info in self.topology.components.items()}
        kind = pipeline_class(self.topology.pipeline_class)
        self._pipe = assemble(read_index(self.topology.source).settings, kind, loaded)
        self.components = loaded
        self._device = placement.device
        self._carries = why_not_resumable(kind) is None

    def run(
        self,
        task: TaskInputs,
        stand_ins: Mapping[str, Any],
        on_step: Callable[[Step], None] | None = None,
    ) -> TaskOutputs:
        """Runs the pipeline for one task; gives `images` or `videos`. See StageProgram.run."""
        course = Course(task, self.topology.pipeline_class, self._device, self._carries)
        loop = Loop(on_step=on_step, course=course)
        own = self._own(task, {**self.components, **stand_ins}, loop, course)
        with course.going():
            made = pictures(own(**arguments(self.topology, self._pipe, task, task.fields)), self.topology.makes)
        return TaskOutputs({"videos" if self.topology.makes == "video" else "images": made})

    def _own(self, task: TaskInputs, seen: dict[str, Any], loop: Loop, course: Course) -> Any:
        """The pipeline as one task sees it, its denoiser's calls left to `course`."""
        if course.wanted:
            for name, part in seen.items():
                if name.startswith(DENOISERS) and isinstance(part, torch.nn.Module):
                    seen[name] = overridden(part, forward=steered(loop, course, name, part.forward))
        swaps = [(real, seen[name]) for name, real in self.components.items() if seen[name] is not real]
        swaps += own_schedulers(self._pipe, task.shift, loop, task.generator)
        loop.pipe = view(self._pipe, [*swaps, *own_guiders(self._pipe, loop)])
        return loop.pipe

    def boundary_latents(self, task: TaskInputs, latents: torch.Tensor) -> torch.Tensor:
        """A pipeline in one piece has no boundary. Raises Unsupported."""
        raise Unsupported(f"{self.topology.pipeline_class} runs in one piece: no previews", field="preview")

"""A pipeline in one piece: what cannot be split still runs, in a single stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from triptych.errors import Unsupported
from triptych.model.contract import Step, TaskInputs, TaskOutputs
from triptych.model.index import read_index
from triptych.model.load import Components, Placement
from triptych.model.pipeline import Loop, arguments, assemble, own_schedulers, pictures, pipeline_class, view
from triptych.model.topology import StageTopology, Topology

__all__ = ["FusedProgram"]


class FusedProgram:
    """A whole standard pipeline as one stage. Every component is loaded, whatever the stage names."""

    def __init__(self, topology: Topology, stage: StageTopology) -> None:
        self.topology = topology
        self.stage = stage
        self.components: Mapping[str, Any] = {}
        self._pipe: Any = None

    def load(self, components: Components, placement: Placement) -> None:
        """Loads all components. Raises LoadError."""
        loaded = {name: components.get(info, placement) for name, info in self.topology.components.items()}
        kind = pipeline_class(self.topology.pipeline_class)
        self._pipe = assemble(read_index(self.topology.source).settings, kind, loaded)
        self.components = loaded

    def run(
        self,
        task: TaskInputs,
        stand_ins: Mapping[str, Any],
        on_step: Callable[[Step], None] | None = None,
    ) -> TaskOutputs:
        """Runs the pipeline for one task; gives `images` or `videos`. See StageProgram.run."""
        loop = Loop(on_step=on_step)
        swaps = [(self.components[name], stand_in) for name, stand_in in stand_ins.items() if name in self.components]
        own = view(self._pipe, [*swaps, *own_schedulers(self._pipe, task.shift, loop, task.generator)])
        loop.pipe = own
        made = pictures(own(**arguments(self.topology, self._pipe, task, task.fields)), self.topology.makes)
        return TaskOutputs({"videos" if self.topology.makes == "video" else "images": made})

    def boundary_latents(self, task: TaskInputs, latents: torch.Tensor) -> torch.Tensor:
        """A pipeline in one piece has no boundary. Raises Unsupported."""
        raise Unsupported(f"{self.topology.pipeline_class} runs in one piece: no previews", field="preview")

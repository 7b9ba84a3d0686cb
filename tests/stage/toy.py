"""A pipeline small enough to know every number of: an encoder, a loop over a network, random draws of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from triptych.model import Components, Pause, Placement, Step, TaskInputs, TaskOutputs
from triptych.model.topology import (
    Defaults,
    InputInfo,
    Port,
    Source,
    StageTopology,
    Topology,
)

SOURCE = Source("toy", "nowhere", "folder")


class Network(torch.nn.Module):
    """One linear layer; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.calls = 0

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor | None = None) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        self.calls += 1
        return self.linear(hidden_states) if timestep is None else self.linear(hidden_states) * timestep


def topology() -> Topology:
    stage = StageTopology(
        name="denoise",
        blocks=("denoise",),
        loads=("transformer",),
        reads=(),
        request_inputs=(InputInfo("num_inference_steps", 3),),
        inputs=(Port("start", required=False),),
        outputs=(Port("latents"),),
    )
    return Topology(
        SOURCE, "text2image", ("text2image",), "toy", "Toy", "modular", (stage,), {}, Defaults(),
        1, 1, 4, None, "image", "none",
    )  # fmt: skip


class ToyProgram:
    """x ← x + network(x)·t + noise, for the asked number of steps; grad mode toggled as pipelines do."""

    def __init__(self, network: Network) -> None:
        self.topology = topology()
        self.stage = self.topology.stages[0]
        self.network = network
        self.begun: list[str] = []
        self.components: Mapping[str, Any] = {}

    def load(self, components: Components, placement: Placement) -> None:
        self.components = {"transformer": self.network}

    @torch.no_grad()
    def run(
        self, task: TaskInputs, stand_ins: Mapping[str, Any], on_step: Callable[[Step], None] | None = None
    ) -> TaskOutputs:
        network = stand_ins.get("transformer", self.network)
        self.begun.append(task.fields.get("name", ""))
        x = torch.randn(1, 4, generator=task.generator)
        assert isinstance(task.values.get("start", x), torch.Tensor)
        steps = task.fields["num_inference_steps"]
        if task.fields.get("explode"):
            raise ValueError("boom")
        for index in range(steps):
            if index:
                self._pause(task, index, x)
            x = x + network(hidden_states=x, timestep=torch.tensor((index + 1) / steps))
            x = x + 0.1 * torch.randn(1, 4, generator=task.generator)
            if on_step is not None:
                on_step(Step(index, steps, x))
        return TaskOutputs({"latents": x})

    @staticmethod
    def _pause(task: TaskInputs, done: int, x: torch.Tensor) -> None:
        if task.keep is not None:
            plain = not task.fields.get("opaque")
            task.keep(Pause(done, lambda: {"x": x.clone()} if plain else None))

    def boundary_latents(self, task: TaskInputs, latents: torch.Tensor) -> torch.Tensor:
        return latents

"""A task's own schedulers: its seed decides every draw, its shift every noise level."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from tests.model import tiny
from triptych.errors import InvalidRequest
from triptych.model import Components, Placement, TaskInputs, Topology, component_infos, describe, open_model
from triptych.model.modular import ModularProgram
from triptych.model.schedulers import own_copies, shifted
from triptych.model.standard import StandardProgram
from triptych.model.standard_topology import standard_topology

CPU = Placement(torch.device("cpu"))
FIELDS = {"prompt": "a cat", "width": 32, "height": 32, "num_inference_steps": 2, "max_sequence_length": 32}


@pytest.fixture(scope="module")
def stochastic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose scheduler draws at every step, for which its pipeline gives no generator."""
    made = tiny.write(tmp_path_factory.mktemp("stochastic"))
    tiny.edit_json(made / "scheduler" / "scheduler_config.json", stochastic_sampling=True)
    return made


def latents(found: Topology, kind: Any, seed: int) -> torch.Tensor:
    """What crosses to decode, for a seed, whatever the process' own generator."""
    components, values, tags = Components(found.source), {}, {}
    for name in ("encode", "denoise"):
        runner = kind(found, found.stage(name))
        runner.load(components, CPU)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            made = runner.run(TaskInputs(dict(FIELDS), 3.5, generator, dict(values), dict(tags)), {})
        values, tags = values | made.values, tags | made.tags
    return values["latents"]


@pytest.mark.parametrize("kind", [ModularProgram, StandardProgram])
def test_a_seed_gives_the_same_picture_when_the_scheduler_draws(stochastic: Path, kind: Any) -> None:
    source = open_model(str(stochastic))
    found = describe(source) if kind is ModularProgram else standard_topology(source, component_infos(source))
    torch.manual_seed(1)
    first = latents(found, kind, seed=5)
    torch.manual_seed(2)
    assert torch.equal(first, latents(found, kind, seed=5))
    assert not torch.equal(first, latents(found, kind, seed=6))


def drawing() -> Any:
    return FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_generator_that_the_pipeline_gives_is_used() -> None:
    sample = torch.ones(1, 1, 2, 2)

    def stepped(own: torch.Generator | None, given: torch.Generator | None) -> torch.Tensor:
        ((_, scheduler),) = own_copies([drawing()], None, own)
        scheduler.set_timesteps(3)
        return scheduler.step(sample, scheduler.timesteps[0], sample, generator=given, return_dict=False)[0]

    expected = stepped(None, generator(1))
    assert torch.equal(stepped(generator(2), generator(1)), expected)
    assert torch.equal(stepped(generator(1), None), expected)


def test_a_copy_of_a_tasks_scheduler_steps_by_itself_from_the_same_generator() -> None:
    ((_, scheduler),) = own_copies([drawing()], None, generator(1))
    second, sample = copy.deepcopy(scheduler), torch.ones(1, 1, 2, 2)
    for steps, each in ((3, scheduler), (7, second)):
        each.set_timesteps(steps)
    made = second.step(sample, second.timesteps[0], sample, return_dict=False)[0]
    plain: Any = drawing()
    plain.set_timesteps(7)
    assert torch.equal(
        made, plain.step(sample, plain.timesteps[0], sample, generator=generator(1), return_dict=False)[0]
    )
    assert second.step_index == 1 and scheduler.step_index is None


def test_shift_replaces_a_fixed_shift_and_one_that_depends_on_the_size() -> None:
    fixed: Any = FlowMatchEulerDiscreteScheduler(shift=6.0)
    for dynamic in (False, True):
        own = shifted(FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic), 6.0)
        for each in (own, fixed):
            each.set_timesteps(4)
        assert torch.equal(own.sigmas, fixed.sigmas)
    assert shifted(UniPCMultistepScheduler(flow_shift=3.0), 6.0).config.flow_shift == 6.0


def test_shift_where_no_scheduler_has_one() -> None:
    with pytest.raises(InvalidRequest, match=r"shift: given 2\.0; allowed: nothing \(DDIMScheduler has no shift\)"):
        own_copies([DDIMScheduler()], 2.0, None)

"""A stage's program: tasks keep apart, steps are told, wrong input is named."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from PIL import Image

from tests.families import FAMILIES, folder
from triptych.errors import InvalidRequest, Unsupported, WrongPayload
from triptych.model import Components, Placement, Step, TaskInputs, TaskOutputs, describe, open_model, program
from triptych.model.modular import ModularProgram, crossing
from triptych.request import StageName

CPU = Placement(torch.device("cpu"))


class Split:
    """One model's three programs."""

    def __init__(self, name: str) -> None:
        self.family = FAMILIES[name]
        self.topology = describe(open_model(str(folder(name))))
        components = Components(self.topology.source)
        self.programs: dict[StageName, ModularProgram] = {}
        for stage in self.topology.stages:
            made = program(self.topology, stage.name)
            assert isinstance(made, ModularProgram)
            made.load(components, CPU)
            self.programs[stage.name] = made

    def task(self, before: TaskOutputs | None = None, **changed: Any) -> TaskInputs:
        scale = changed.pop("guidance_scale", self.family.guidance_scale)
        shift = changed.pop("shift", None)
        fields = {**self.family.fields, **changed}
        generator = torch.Generator().manual_seed(3)
        if before is None:
            return TaskInputs(fields, scale, generator, shift=shift)
        return TaskInputs(fields, scale, generator, dict(before.values), dict(before.tags), shift)

    def encoded(self, **changed: Any) -> TaskOutputs:
        return self.programs["encode"].run(self.task(**changed), {})

    def latents(self, **changed: Any) -> torch.Tensor:
        task = self.task(self.encoded(**changed), **changed)
        return self.programs["denoise"].run(task, {}).values["latents"]


@pytest.fixture(scope="module")
def flux() -> Split:
    return Split("flux")


@pytest.fixture(scope="module")
def qwen() -> Split:
    return Split("qwen-image")


def test_steps_are_told_in_order_and_end_in_what_crosses(flux: Split) -> None:
    denoise = flux.programs["denoise"]
    task = flux.task(flux.encoded())
    seen: list[Step] = []
    shown: list[torch.Tensor] = []

    def on_step(step: Step) -> None:
        seen.append(step)
        assert step.latents is not None
        shown.append(denoise.boundary_latents(task, step.latents))

    latents = denoise.run(task, {}, on_step).values["latents"]
    assert [(step.index, step.total) for step in seen] == [(0, 3), (1, 3), (2, 3)]
    assert torch.equal(shown[-1], latents)
    assert all(picture.shape == latents.shape for picture in shown)
    assert not torch.equal(shown[0], latents)


def test_the_estimate_of_the_end_is_on_the_line_of_the_flow(flux: Split) -> None:
    """An estimate from two latents of a step equals latents - sigma × velocity, the velocity being the model's."""
    denoise = flux.programs["denoise"]
    task = flux.task(flux.encoded())
    seen: list[tuple[torch.Tensor | None, torch.Tensor | None]] = []
    denoise.run(task, {}, lambda step: seen.append((step.latents, step.denoised())))
    latents, foreseen = seen[-1]
    assert latents is not None and foreseen is not None
    # The last step ends at sigma 0: what it points at is where it is.
    torch.testing.assert_close(foreseen, latents)
    first = seen[0][1]
    assert first is not None and first.shape == latents.shape
    assert not torch.allclose(first, latents)


def test_what_on_step_raises_comes_out_and_nothing_is_logged(flux: Split, caplog: pytest.LogCaptureFixture) -> None:
    class Stop(Exception):
        pass

    def on_step(step: Step) -> None:
        raise Stop(step.index)

    task = flux.task(flux.encoded())
    with caplog.at_level(logging.DEBUG), pytest.raises(Stop) as caught:
        flux.programs["denoise"].run(task, {}, on_step)
    assert caught.value.args == (0,)
    assert not [record for record in caplog.records if record.name.startswith("diffusers")]


def test_diffusers_still_logs_for_others(flux: Split, caplog: pytest.LogCaptureFixture) -> None:
    flux.encoded()
    theirs = logging.getLogger("diffusers.modular_pipelines.modular_pipeline")
    theirs.propagate, before = True, theirs.propagate
    parent = logging.getLogger("diffusers")
    parent.propagate, above = True, parent.propagate
    try:
        theirs.error("of somebody else")
    finally:
        theirs.propagate, parent.propagate = before, above
    assert "of somebody else" in caplog.text


def test_a_task_leaves_nothing_for_the_next(flux: Split) -> None:
    alone = flux.latents()
    flux.latents(num_inference_steps=5, prompt="another", shift=7.0, guidance_scale=1.0)
    assert torch.equal(flux.latents(), alone)


def test_fields_are_left_as_given() -> None:
    split = Split("z-image")
    prompts = ["a photo of a cat", "make the sky red"]
    given = {"prompt": list(prompts), "negative_prompt": ["bad quality", "blurry"]}
    split.encoded(**given)
    assert given["prompt"] == prompts


def test_guidance_changes_the_result_and_off_means_off(qwen: Split) -> None:
    strong, weak, off = (qwen.latents(guidance_scale=scale) for scale in (4.0, 2.0, 1.0))
    assert not torch.equal(strong, weak) and not torch.equal(weak, off)
    assert "negative_prompt_embeds" not in qwen.encoded(guidance_scale=1.0).values
    assert torch.equal(off, qwen.latents(guidance_scale=1.0, negative_prompt="something else"))


def test_guidance_without_a_negative_prompt_uses_an_empty_one(qwen: Split) -> None:
    assert torch.equal(qwen.latents(negative_prompt=None), qwen.latents(negative_prompt=""))
    several = qwen.encoded(prompt=["a cat", "a dog"], negative_prompt=None)
    assert several.values["negative_prompt_embeds"].shape[0] == 2


def test_shift_changes_the_schedule(flux: Split) -> None:
    assert not torch.equal(flux.latents(shift=1.0), flux.latents(shift=6.0))


def test_shift_where_there_is_none_is_an_error() -> None:
    split = Split("sdxl")
    task = split.task(split.encoded(), shift=3.0)
    with pytest.raises(InvalidRequest, match="EulerDiscreteScheduler has no shift"):
        split.programs["denoise"].run(task, {})


def test_a_missing_value_is_named(flux: Split) -> None:
    encoded = flux.encoded()
    del encoded.values["pooled_prompt_embeds"]
    del encoded.values["prompt_embeds"]
    with pytest.raises(WrongPayload, match="prompt_embeds, which did not arrive"):
        flux.programs["denoise"].run(flux.task(TaskOutputs(encoded.values)), {})


def test_a_stage_that_is_not_loaded_says_so(flux: Split) -> None:
    with pytest.raises(RuntimeError, match="decode has not been loaded"):
        ModularProgram(flux.topology, flux.topology.stage("decode")).run(flux.task(), {})


def test_unknown_stage(flux: Split) -> None:
    with pytest.raises(Unsupported, match="allowed: encode, denoise, decode"):
        program(flux.topology, "upscale")  # type: ignore[arg-type]


def test_embeddings_are_cast_to_the_transformers_dtype() -> None:
    split = Split("flux")
    encoded = split.encoded()
    half = program(split.topology, "denoise")
    half.load(Components(split.topology.source), Placement(torch.device("cpu"), torch.bfloat16))
    latents = half.run(split.task(encoded), {}).values["latents"]
    assert latents.dtype == torch.bfloat16 and latents.isfinite().all()


def test_generator_state_crosses_where_encoding_draws(flux: Split) -> None:
    picture = Image.new("RGB", (64, 64), "red")
    encoded = flux.encoded(image=picture, strength=0.5)
    assert encoded.values["generator_state"].dtype == torch.uint8
    assert "generator_state" not in flux.encoded().values
    right = flux.programs["denoise"].run(flux.task(encoded, strength=0.5), {}).values["latents"]
    del encoded.values["generator_state"]
    wrong = flux.programs["denoise"].run(flux.task(encoded, strength=0.5), {}).values["latents"]
    assert not torch.equal(right, wrong)


def test_stand_ins_are_for_one_task(flux: Split) -> None:
    denoise = flux.programs["denoise"]
    calls: list[int] = []

    class Counting(torch.nn.Module):
        def __init__(self, real: Any) -> None:
            super().__init__()
            self.real, self.config, self.dtype = real, real.config, real.dtype

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return self.real(*args, **kwargs)

    stand_in = Counting(denoise.components["transformer"])
    first = denoise.run(flux.task(flux.encoded()), {"transformer": stand_in}).values["latents"]
    assert len(calls) == 3
    assert torch.equal(flux.latents(), first) and len(calls) == 3


def test_only_tensors_and_json_cross() -> None:
    assert crossing("x", ("a", [1, None, {"b": 2.0}])) == ["a", [1, None, {"b": 2.0}]]
    assert crossing("dtype", torch.float32) == "torch.float32"
    with pytest.raises(Unsupported, match="mask is a Image, which cannot cross"):
        crossing("mask", Image.new("RGB", (1, 1)))

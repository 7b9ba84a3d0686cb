"""At the door: what a model takes is filled in and passed on, what it cannot serve is refused by name."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.families import folder, picture
from tests.model import tiny
from triptych.errors import InvalidRequest, LoadError, NotEnoughMemory
from triptych.model import Components, Placement, TaskInputs, Topology, describe, open_model, program, resolve
from triptych.model.door import activation_bytes, extras_of
from triptych.request import Request

CPU = Placement(torch.device("cpu"))


def topology(name: str, workflow: str | None = None) -> Topology:
    return describe(open_model(str(folder(name))), workflow)


@pytest.fixture(scope="module")
def flux() -> Topology:
    return topology("flux")


def refused(found: Topology, **fields: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        resolve(found, Request.parse(**{"prompt": "a cat", **fields}))
    return str(caught.value)


# --- models that take no guidance


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Flux distilled to run without guidance."""
    made = tiny.write(tmp_path_factory.mktemp("schnell"))
    tiny.transformer(guidance_embeds=False).save_pretrained(made / "transformer")
    return made


def test_a_model_without_guidance_runs_on_its_defaults(schnell: Path) -> None:
    found = describe(open_model(str(schnell)))
    assert found.guidance == "none" and found.defaults.guidance_scale is None
    small = Request.parse(prompt="a cat", width=32, height=32, num_inference_steps=1, max_sequence_length=32, seed=1)
    resolved = resolve(found, small)
    assert resolved.guidance_scale is None and "guidance_scale" not in resolved.fields
    components, values, tags = Components(found.source), {}, {}
    for stage in found.stages:
        runner = program(found, stage.name)
        runner.load(components, CPU)
        given = TaskInputs(dict(resolved.fields), None, torch.Generator().manual_seed(1), dict(values), dict(tags))
        made = runner.run(given, {})
        values.update(made.values)
        tags.update(made.tags)
    assert values["images"].shape == (1, 3, 32, 32)
    for off in (0, 1):
        assert resolve(found, small.model_copy(update={"guidance_scale": off})).request.guidance_scale == off
    assert "guidance_scale: given 3.5; allowed: nothing" in refused(found, guidance_scale=3.5)


def test_a_folders_defaults_bring_no_guidance_to_such_a_model(schnell: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(schnell, tmp_path / "model"))
    (copy / "triptych.json").write_text('{"defaults": {"guidance_scale": 4, "num_inference_steps": 4}}')
    defaults = describe(open_model(str(copy))).defaults
    assert (defaults.guidance_scale, defaults.num_inference_steps) == (None, 4)


def test_only_what_the_model_takes_is_filled_in() -> None:
    found = topology("ddpm")
    assert found.defaults.width == 16
    resolved = resolve(found, Request.parse(prompt="", seed=1, num_inference_steps=2))
    assert resolved.fields == {"num_inference_steps": 2}
    runner = program(found, "denoise")
    runner.load(Components(found.source), CPU)
    task = TaskInputs(dict(resolved.fields), resolved.guidance_scale, torch.Generator().manual_seed(1))
    assert runner.run(task, {}).values["images"].shape == (1, 3, 16, 16)
    assert refused(found).startswith("prompt: given 'a cat'")
    assert refused(found, prompt="", width=16).startswith("width: given 16; allowed: nothing")
    assert refused(found, prompt="", aspect_ratio="1:1").startswith("aspect_ratio: given '1:1'; allowed: nothing")


# --- what would be dropped without a word


def test_a_negative_prompt_without_an_input_for_it_is_refused(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder("flux2-klein"), tmp_path / "model"))
    tiny.edit_json(copy / "model_index.json", is_distilled=False)
    found = describe(open_model(str(copy)), "text2image")
    assert found.guidance == "classifier_free"
    assert refused(found, negative_prompt="a dog").startswith("negative_prompt: given 'a dog'; allowed: nothing")


def test_strength_without_images_is_refused(flux: Topology) -> None:
    assert refused(flux, strength=0.5) == "strength: given 0.5; allowed: nothing without images"
    assert resolve(flux, Request.parse(prompt="", images=[picture(1)], strength=0.5)).fields["strength"] == 0.5


def test_more_pictures_than_the_workflow_takes_are_refused() -> None:
    two = [picture(1), picture(2)]
    assert refused(topology("z-image", "image2image"), images=two).startswith("images: given '2 images'; allowed: 1 ")
    resolved = resolve(topology("qwen-image-edit-plus"), Request.parse(prompt="a cat", images=two))
    assert len(resolved.fields["image"]) == 2


def test_frames_per_second_reach_a_model_that_is_told_of_them() -> None:
    found = topology("ltx", "text2video")
    assert "frame_rate" not in extras_of(found)
    assert resolve(found, Request.parse(prompt="", fps=12)).fields["frame_rate"] == 12
    assert resolve(found, Request.parse(prompt="", fps=12.5)).fields["frame_rate"] == 12.5
    by_default = resolve(found, Request.parse(prompt=""))
    assert by_default.fields["frame_rate"] == by_default.request.fps == 25
    assert "frame_rate" not in resolve(topology("wan-t2v"), Request.parse(prompt="", fps=12)).fields


# --- sizes


def test_a_ratio_leads_to_no_size_that_may_not_be_asked_for(flux: Topology) -> None:
    assert refused(flux, aspect_ratio="9999:1").startswith("aspect_ratio: given '9999:1'; allowed: ratios whose longer")
    wide = resolve(flux, Request.parse(prompt="", aspect_ratio="16:9")).request
    assert (wide.width, wide.height) == (1360, 768)


def test_memory_is_counted_for_a_picture_without_a_size(flux: Topology) -> None:
    given = {"prompt": "", "images": [Image.new("RGB", (2048, 1024))]}
    by_default = activation_bytes(flux, Request.parse(**given))
    assert by_default == activation_bytes(flux, Request.parse(**given, width=1024, height=1024)) > 0
    sized = replace(flux, defaults=replace(flux.defaults, width=None, height=None))
    assert activation_bytes(sized, Request.parse(**given)) == 2 * by_default
    fixed = topology("stable-diffusion-img2img")  # takes no size: makes what it is given
    assert activation_bytes(fixed, Request.parse(**given)) == 2 * by_default
    with pytest.raises(NotEnoughMemory, match="2048×1024 × 8 takes"):
        resolve(fixed, Request.parse(**given, num_outputs=8), memory=2**30)


# --- damaged files


@pytest.mark.parametrize(
    "text",
    ['{"defaults": [1]}', '{"width": "big"}', '{"width": true}', '{"width": 0}', '{"fps": NaN}', '{"width": 1.5}'],
)
def test_damaged_defaults_are_named(schnell: Path, tmp_path: Path, text: str) -> None:
    copy = Path(shutil.copytree(schnell, tmp_path / "model"))
    (copy / "triptych.json").write_text(text)
    with pytest.raises(LoadError, match=r"triptych\.json"):
        describe(open_model(str(copy)))


@pytest.mark.parametrize("text", ["{", "3", '{"words": 3}', "[1]", '{"other": []}'])
def test_a_damaged_vocabulary_is_named(schnell: Path, tmp_path: Path, text: str) -> None:
    copy = Path(shutil.copytree(schnell, tmp_path / "model"))
    (copy / "vocabulary.json").write_text(text)
    found = describe(open_model(str(copy)))
    with pytest.raises(LoadError, match=r"vocabulary\.json"):
        resolve(found, Request.parse(prompt="a cat"))


@pytest.mark.parametrize("extra", [{"joint_attention_kwargs": 5}, {"prompt_2": 5}, {"joint_attention_kwargs": [1]}])
def test_an_extra_of_the_wrong_type_is_named(flux: Topology, extra: dict[str, Any]) -> None:
    assert refused(flux, extra=extra).startswith(f"extra.{next(iter(extra))}: given ")

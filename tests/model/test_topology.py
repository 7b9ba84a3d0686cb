"""What a model's topology says, and that it says it without torch or weights where it need not have them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.families import folder
from tests.families.modular import MODULAR
from triptych.errors import LoadError, Unsupported
from triptych.model import STAGES, Source, Topology, describe, open_model

# family in our words, makes, guidance, pixels a latent, multiple of, frames a latent, latent channels, width, steps
FACTS = {
    "flux": ("flux", "image", "embedded", 8, 16, None, 4, 1024, 50),
    "flux2-klein": ("flux2-klein", "image", "none", 8, 16, None, 4, 1024, 50),
    "qwen-image": ("qwen-image", "image", "classifier_free", 8, 16, None, 16, 1024, 50),
    "qwen-image-edit-plus": ("qwen-image-edit-plus", "image", "classifier_free", 16, 32, None, 16, 2048, 50),
    "z-image": ("z-image", "image", "classifier_free", 8, 16, None, 16, 1024, 8),
    "sd3": ("sd3", "image", "classifier_free", 8, 16, None, 4, 64, 50),
    "sdxl": ("sdxl", "image", "classifier_free", 8, 8, None, 4, 256, 50),
    "wan-t2v": ("wan", "video", "classifier_free", 8, 16, 4, 16, 832, 50),
    "wan-i2v": ("wan-i2v", "video", "classifier_free", 8, 16, 4, 16, 832, 50),
    "wan2.2": ("wan2.2", "video", "classifier_free", 8, 16, 4, 16, 832, 50),
    "ltx": ("ltx", "video", "classifier_free", 32, 32, 8, 8, 704, 50),
    "hunyuan-video-1.5": ("hunyuan-video-1.5", "video", "classifier_free", 16, 16, 4, 4, None, 50),
}


def topology(name: str, workflow: str | None = None) -> Topology:
    return describe(open_model(str(folder(name))), workflow)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder("flux"), tmp_path / "model"))


def source_of(path: Path) -> Source:
    return Source(path.name, str(path), "folder")


@pytest.mark.parametrize("name", MODULAR)
def test_facts(name: str) -> None:
    found = topology(name)
    default = found.defaults
    facts = (found.family, found.makes, found.guidance, found.latent_scale, found.spatial_multiple)
    more = (found.temporal_scale, found.latent_channels, default.width, default.num_inference_steps)
    assert facts + more == FACTS[name]
    assert found.adapter == "modular"
    assert tuple(stage.name for stage in found.stages) == STAGES


@pytest.mark.parametrize("name", MODULAR)
def test_every_component_is_loaded_by_some_stage(name: str) -> None:
    found = topology(name)
    # Edit-Plus tokenizes with its processor; the tokenizer beside it is the processor's.
    spare = {"tokenizer"} if name == "qwen-image-edit-plus" else set()
    assert {item for stage in found.stages for item in stage.loads} == set(found.components) - spare


@pytest.mark.parametrize("name", MODULAR)
def test_what_a_stage_wants_of_others_they_give(name: str) -> None:
    found = topology(name)
    for before, after in zip(found.stages, found.stages[1:], strict=False):
        assert {port.name for port in after.inputs} == {port.name for port in before.outputs}
    assert [port.name for port in found.stage("encode").inputs] == []


def test_a_vae_is_only_read_where_it_does_not_run() -> None:
    denoise = topology("sdxl").stage("denoise")
    assert "vae" in denoise.reads and "vae" not in denoise.loads


def test_a_workflow_drops_what_it_does_not_use() -> None:
    union, text = topology("flux"), topology("flux", "text2image")
    assert union.workflows == text.workflows == ("text2image", "image2image")
    assert "vae" in union.stage("encode").loads
    assert "vae" not in text.stage("encode").loads
    names = {item.name for stage in text.stages for item in stage.request_inputs}
    assert "image" not in names and "strength" not in names


def test_workflows_have_our_names() -> None:
    assert topology("qwen-image").workflows == ("text2image", "image2image", "inpaint")
    assert topology("flux2-klein").workflows == ("text2image", "edit")
    assert topology("qwen-image-edit-plus").workflows == ("edit",)
    assert topology("wan-t2v").workflows == ("text2video",)
    assert "image2video" in topology("wan-i2v").workflows


def test_unknown_workflow_lists_the_known() -> None:
    with pytest.raises(Unsupported, match=r"workflow: given 'paint'; allowed: text2image, image2image"):
        topology("flux", "paint")


def test_workflow_without_its_components_says_which() -> None:
    assert any(note.startswith("inpaint") or "controlnet" in note for note in topology("qwen-image").notes)
    with pytest.raises(Unsupported, match=r"needs controlnet.*allowed: text2image"):
        topology("qwen-image", "controlnet_text2image")
    with pytest.raises(Unsupported, match="needs image_encoder"):
        topology("hunyuan-video-1.5", "image2video")


def test_inputs_of_unsupported_workflows_are_not_asked_for() -> None:
    names = {item.name for stage in topology("qwen-image").stages for item in stage.request_inputs}
    assert not {"control_image", "controlnet_conditioning_scale", "generator", "latents"} & names
    assert {"prompt", "image", "mask_image", "strength"} <= names


def test_the_second_expert_has_a_guidance_scale() -> None:
    declared = {item.name for item in topology("wan2.2").stage("denoise").request_inputs}
    assert "guidance_scale_2" in declared
    assert "guidance_scale_2" not in {item.name for item in topology("wan-t2v").stage("denoise").request_inputs}


def test_a_folder_has_its_own_defaults(copied: Path) -> None:
    own = {"defaults": {"width": 64, "height": 48, "num_inference_steps": 7, "guidance_scale": 2.0}}
    (copied / "triptych.json").write_text(json.dumps(own))
    found = describe(source_of(copied)).defaults
    assert (found.width, found.height, found.num_inference_steps, found.guidance_scale) == (64, 48, 7, 2.0)


@pytest.mark.parametrize("text", ["[]", "{", '"x"'])
def test_broken_defaults_are_named(copied: Path, text: str) -> None:
    (copied / "triptych.json").write_text(text)
    with pytest.raises(LoadError, match=r"triptych\.json"):
        describe(source_of(copied))


def test_needs_no_weights(copied: Path) -> None:
    before = describe(source_of(copied))
    for weights in copied.rglob("*.safetensors"):
        header = weights.read_bytes()
        size = 8 + int.from_bytes(header[:8], "little")
        with open(weights, "r+b") as file:
            file.seek(size)
            file.write(b"\xff" * (len(header) - size))
    assert describe(source_of(copied)) == before


def test_without_what_every_workflow_needs(copied: Path) -> None:
    index = json.loads((copied / "model_index.json").read_text())
    del index["text_encoder"]
    (copied / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(LoadError, match="lacks text_encoder, without which no workflow can run"):
        describe(source_of(copied))


def test_importing_the_room_costs_no_torch() -> None:
    code = "import sys, triptych.model, triptych.model.topology; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_submodules_do_not_shadow_functions() -> None:
    code = (
        "import triptych.model.description, triptych.model.contract\n"
        "from triptych.model import describe, program\n"
        "print(callable(describe), callable(program))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True True"

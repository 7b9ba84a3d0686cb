"""What enters through load_component, and everything it must refuse."""

from __future__ import annotations

import json
import logging
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import families
from tests.model import tiny
from triptych.errors import DeviceError, LoadError, Unsupported
from triptych.model.checkpoint import weight_files
from triptych.model.crossings import boundary
from triptych.model.description import describe
from triptych.model.infos import causal, component_infos
from triptych.model.load import Components, Placement, load_component, meta_component
from triptych.model.open import open_model
from triptych.model.programs import program
from triptych.model.topology import STAGES, ComponentInfo
from triptych.model.trust import NO_TRUST, Trust
from triptych.request import Request

CPU = Placement(torch.device("cpu"))
TRANSFORMER = Path("transformer/diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, not to be changed."""
    return tiny.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(made, tmp_path / "model"))


def load(folder: Path, name: str, placement: Placement = CPU, trust: Trust = NO_TRUST) -> Any:
    """The component of that name, through every check."""
    source = open_model(str(folder), trust=trust)
    return load_component(source, component_infos(source)[name], placement, trust)


def refusal(folder: Path, name: str = "transformer") -> str:
    """The message with which loading fails; it names the component or a file of its folder."""
    with pytest.raises(LoadError) as caught:
        load(folder, name)
    message = str(caught.value)
    assert caught.value.field == "model" and name in message and "\n" not in message
    return message


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two models have the same parameters, bit for bit."""
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_models_come_whole_frozen_and_in_eval_mode(made: Path) -> None:
    model = load(made, "transformer")
    torch.manual_seed(0)
    assert equal(model, tiny.transformer())
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert not load(made, "text_encoder").training


@pytest.mark.parametrize("name", sorted(tiny.COMPONENTS))
def test_every_kind_of_component_loads(made: Path, name: str) -> None:
    assert type(load(made, name)).__name__ == tiny.COMPONENTS[name][1]


@pytest.mark.parametrize("name", sorted(tiny.COMPONENTS))
def test_meta_components_read_no_weights(folder: Path, name: str) -> None:
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    source = open_model(str(folder))
    component = meta_component(source, component_infos(source)[name])
    assert type(component).__name__ == tiny.COMPONENTS[name][1]
    if isinstance(component, torch.nn.Module):
        assert all(parameter.is_meta for parameter in component.parameters())
        assert component.config is not None


@pytest.mark.parametrize("name", ["transformer", "text_encoder"])
def test_dtype_is_float32_on_a_cpu_unless_told(folder: Path, name: str) -> None:
    model = load(folder, name).to(torch.bfloat16)
    model.save_pretrained(folder / name)
    assert load(folder, name).dtype is torch.float32
    assert load(folder, name, Placement(torch.device("cpu"), torch.bfloat16)).dtype is torch.bfloat16
    assert load(folder, name, Placement(torch.device("meta"))).dtype is torch.bfloat16  # elsewhere: as on disk


def test_components_are_loaded_once_per_placement(made: Path) -> None:
    source = open_model(str(made))
    infos = component_infos(source)
    components = Components(source)
    whole = components.get(infos["vae"], CPU)
    half = components.get(infos["vae"], Placement(torch.device("cpu"), torch.float16))
    assert half.dtype is torch.float16 and whole.dtype is torch.float32
    assert components.get(infos["vae"], CPU) is whole


def test_loading_leaves_the_libraries_logs_as_they_were(made: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in (diffusers_log, transformers_log)]
    for name in ("text_encoder", "transformer"):
        load(made, name)
    assert before == [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in (diffusers_log, transformers_log)]
    assert capfd.readouterr() == ("", "")


# --- files


def test_missing_weights(folder: Path) -> None:
    (folder / TRANSFORMER).unlink()
    assert "no weights" in refusal(folder)


def test_missing_folder(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    assert "no folder" in refusal(folder, "tokenizer")


def test_missing_config(folder: Path) -> None:
    (folder / "transformer" / "config.json").unlink()
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize("size", [0, 5, 8, 100, -1, -1000])
def test_truncated_weights_are_named_with_their_bytes(folder: Path, size: int) -> None:
    data = (folder / TRANSFORMER).read_bytes()
    (folder / TRANSFORMER).write_bytes(data[:size])
    message = refusal(folder)
    assert str(folder / TRANSFORMER) in message and str(len(data[:size])) in message
    assert "truncated" in message or size < 8


def test_a_longer_file_than_its_header_says(folder: Path) -> None:
    with (folder / TRANSFORMER).open("ab") as file:
        file.write(b"0123456789")
    assert "10 more than its header says" in refusal(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{" * 5000,
        b"\xff\xff",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, Infinity]}}',
    ],
)
def test_damaged_headers(folder: Path, header: bytes) -> None:
    (folder / TRANSFORMER).write_bytes(struct.pack("<Q", len(header)) + header)
    assert "damaged" in refusal(folder)


def test_a_header_longer_than_any_is_not_read(folder: Path) -> None:
    (folder / TRANSFORMER).write_bytes(struct.pack("<Q", 2**62) + b"{}")
    assert "no header" in refusal(folder)


def shard(folder: Path) -> Path:
    """Saves the transformer in several shards; returns their index."""
    load(folder, "transformer").save_pretrained(folder / "transformer", max_shard_size="100KB")
    (folder / TRANSFORMER).unlink(missing_ok=True)
    return folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"


def test_shards_load_and_are_counted(folder: Path, made: Path) -> None:
    shard(folder)
    info = component_infos(open_model(str(folder)))["transformer"]
    whole = component_infos(open_model(str(made)))["transformer"]
    assert len(info.files) > 2 and (info.parameters, info.bytes) == (whole.parameters, whole.bytes)
    assert equal(load(folder, "transformer"), load(made, "transformer"))


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard(folder)
    gone = sorted((folder / "transformer").glob("*.safetensors"))[1]
    gone.unlink()
    assert f"{gone} is missing" in refusal(folder)


def test_a_shard_that_lacks_a_tensor_of_the_index(folder: Path) -> None:
    shard(folder)
    file = sorted((folder / "transformer").glob("*.safetensors"))[0]
    tensors = load_file(file)
    lost = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file, metadata={"format": "pt"})
    assert lost in refusal(folder)


def test_an_index_that_leaves_its_folder_is_refused(folder: Path) -> None:
    index = shard(folder)
    mapping = json.loads(index.read_text())["weight_map"]
    tiny.edit_json(index, weight_map=dict.fromkeys(mapping, "../../secret.safetensors"))
    assert "outside its folder" in refusal(folder)


@pytest.mark.parametrize("name", ["transformer", "text_encoder"])
def test_a_variant_is_used_when_the_plain_file_is_absent(folder: Path, name: str) -> None:
    model = load(folder, name)
    plain = next((folder / name).glob("*.safetensors"))
    changed = {key: torch.zeros_like(value) for key, value in load_file(plain).items()}
    save_file(changed, plain.with_name(plain.stem + ".fp16.safetensors"), metadata={"format": "pt"})
    assert equal(load(folder, name), model)
    plain.unlink()
    assert all(not tensor.any() for tensor in load(folder, name).parameters())


def test_weight_files_by_name() -> None:
    base, number = "diffusion_pytorch_model", "-00001-of-00001"
    cases = {
        (f"{base}.safetensors", f"{base}.fp16.safetensors", f"{base}.bin"): ((f"{base}.safetensors",), None),
        (f"{base}.fp16.safetensors", f"{base}.bin"): ((f"{base}.fp16.safetensors",), "fp16"),
        (f"{base}.safetensors.index.json", f"{base}{number}.safetensors", "other.safetensors"): (
            (f"{base}{number}.safetensors",),
            None,
        ),
        (f"{base}.safetensors.index.fp16.json", f"{base}{number}.fp16.safetensors"): (
            (f"{base}{number}.fp16.safetensors",),
            "fp16",
        ),
        (f"{base}.fp16.safetensors.index.json", f"{base}.fp16{number}.safetensors"): (
            (f"{base}.fp16{number}.safetensors",),
            "fp16",
        ),
    }
    for names, (files, variant) in cases.items():
        found = weight_files(names)
        assert found is not None and (found.files, found.variant, found.pickle) == (files, variant, False)
    assert weight_files(["config.json", "lora.safetensors", "notes.txt"]) is None
    pickled = weight_files(["config.json", "pytorch_model.bin"])
    assert pickled is not None and pickled.pickle


# --- what may run code


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt"])
def test_pickles_are_refused_unread(folder: Path, suffix: str) -> None:
    (folder / TRANSFORMER).unlink()
    torch.save({"x": Bomb(folder / "boom")}, folder / "transformer" / f"diffusion_pytorch_model.{suffix}")
    assert "--allow-pickle" in refusal(folder)
    assert not (folder / "boom").exists()


@pytest.mark.parametrize("name", ["transformer", "text_encoder"])
def test_pickles_load_when_trusted(folder: Path, name: str) -> None:
    model = load(folder, name)
    plain = next((folder / name).glob("*.safetensors"))
    torch.save(
        load_file(plain), plain.with_name("pytorch_model.bin" if name == "text_encoder" else f"{plain.stem}.bin")
    )
    plain.unlink()
    assert equal(load(folder, name, trust=Trust(pickle_weights=True)), model)


def test_safetensors_win_over_pickles_beside_them(folder: Path) -> None:
    torch.save({"x": Bomb(folder / "boom")}, folder / "transformer" / "diffusion_pytorch_model.bin")
    assert load(folder, "transformer") is not None
    assert not (folder / "boom").exists()


def test_a_models_own_class_runs_only_when_trusted(folder: Path) -> None:
    (folder / "scheduler" / "mine.py").write_text(
        "from pathlib import Path\n"
        "from diffusers import FlowMatchEulerDiscreteScheduler\n"
        f"Path({str(folder / 'ran')!r}).touch()\n"
        "class Mine(FlowMatchEulerDiscreteScheduler):\n    pass\n"
    )
    tiny.write_index(folder, scheduler=["mine", "Mine"])
    with pytest.raises(LoadError, match="--allow-remote-code"):
        load(folder, "scheduler")
    spec = ComponentInfo("scheduler", "mine", "Mine", "scheduler")
    with pytest.raises(LoadError, match="--allow-remote-code"):
        load_component(open_model(str(folder), trust=Trust(remote_code=True)), spec, CPU, Trust())
    assert not (folder / "ran").exists()
    assert type(load(folder, "scheduler", trust=Trust(remote_code=True))).__name__ == "Mine"
    assert (folder / "ran").exists()


OWN_TRANSFORMER = """
from diffusers import FluxTransformer2DModel

class Own(FluxTransformer2DModel):
    pass
"""


@pytest.mark.parametrize("pipeline", ["FluxPipeline", "FluxControlPipeline"])
def test_a_trusted_models_own_class_is_described_and_loaded(
    folder: Path, pipeline: str, caplog: pytest.LogCaptureFixture
) -> None:
    """From modular blocks and by replay."""
    (folder / "transformer" / "own.py").write_text(OWN_TRANSFORMER)
    tiny.edit_json(folder / "transformer" / "config.json", auto_map={"AutoModel": "own.Own"}, _class_name="Own")
    tiny.write_index(folder, _class_name=pipeline, transformer=["diffusers", "Own"])
    with pytest.raises(LoadError, match="--allow-remote-code"):
        open_model(str(folder))
    trust = Trust(remote_code=True)
    source = open_model(str(folder), trust=trust)
    with pytest.raises(LoadError, match="--allow-remote-code"):
        describe(source)
    found = describe(source, trust=trust)
    assert found.adapter == ("modular" if pipeline == "FluxPipeline" else "standard")
    assert "transformer" in found.stage("denoise").loads and "transformer" not in found.stage("encode").loads
    for name in STAGES:
        runner = program(found, name)
        runner.load(Components(source, trust), CPU)
        assert name != "denoise" or type(runner.components["transformer"]).__name__ == "Own"
    if found.adapter == "modular":
        small = Request.parse(prompt="a", width=32, height=32, max_sequence_length=32, num_inference_steps=1)
        with caplog.at_level(logging.INFO, "triptych.model.crossings"):
            boundary(found, request=small, trust=trust)
        assert "does not run without weights" not in caplog.text


def test_an_unknown_class_is_named_with_the_versions(folder: Path) -> None:
    tiny.write_index(folder, transformer=["diffusers", "Flux9Transformer"])
    message = refusal(folder)
    assert "Flux9Transformer" in message and "diffusers 0." in message


# --- tensors


@pytest.mark.parametrize("name", ["transformer", "text_encoder"])
def test_a_missing_tensor_is_never_random(folder: Path, name: str) -> None:
    plain = next((folder / name).glob("*.safetensors"))
    tensors = load_file(plain)
    lost = next(
        key
        for key in sorted(tensors)
        if key.endswith("norm1.weight") or key.endswith("to_q.weight") or "layers.1" in key
    )
    del tensors[lost]
    save_file(tensors, plain, metadata={"format": "pt"})
    assert lost.removeprefix("text_model.") in refusal(folder, name)


@pytest.mark.parametrize(
    ("name", "change"), [("transformer", {"in_channels": 32}), ("text_encoder", {"intermediate_size": 41})]
)
def test_a_tensor_of_another_shape_is_named(folder: Path, name: str, change: dict[str, int]) -> None:
    tiny.edit_json(folder / name / "config.json", **change)
    message = refusal(folder, name)
    assert ("x_embedder" in message) or ("mlp.fc1" in message)


@pytest.mark.parametrize(
    ("name", "change"), [("transformer", {"num_layers": 0}), ("text_encoder", {"num_hidden_layers": 1})]
)
def test_tensors_without_a_place_are_named(folder: Path, name: str, change: dict[str, int]) -> None:
    tiny.edit_json(folder / name / "config.json", **change)
    message = refusal(folder, name)
    assert "transformer_blocks.0" in message or "layers.1" in message


def test_a_head_that_the_class_does_not_have_is_left_out(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **settings)).save_pretrained(
        folder / "text_encoder"
    )
    tiny.write_index(folder, text_encoder=["transformers", "LlamaModel"])
    assert load(folder, "text_encoder").config.vocab_size == 40


def written_elsewhere() -> dict[str, tuple[Any, str]]:
    """Checkpoints as older versions or larger models left them: what was saved, and the class that the index names."""
    import transformers as t

    t5: dict[str, Any] = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 1, "num_heads": 2}
    qwen: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    qwen |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    tied = t.Qwen3Config(**qwen, tie_word_embeddings=True)
    return {
        "a whole T5": (t.T5ForConditionalGeneration(t.T5Config(**t5)), "T5EncoderModel"),
        "a whole UMT5": (t.UMT5ForConditionalGeneration(t.UMT5Config(**t5)), "UMT5EncoderModel"),
        "a tied head": (t.Qwen3ForCausalLM(tied), "Qwen3ForCausalLM"),
        "a body for a tied head": (t.Qwen3Model(tied), "Qwen3ForCausalLM"),
    }


def test_checkpoints_of_whole_models_serve_their_encoders(folder: Path) -> None:
    for made, class_name in written_elsewhere().values():
        made.save_pretrained(folder / "text_encoder")
        tiny.write_index(folder, text_encoder=["transformers", class_name])
        table = load(folder, "text_encoder").get_input_embeddings().weight
        assert torch.equal(table, made.get_input_embeddings().weight)


def test_clip_under_its_names_of_old(folder: Path) -> None:
    model = load(folder, "text_encoder")
    plain = folder / "text_encoder" / "model.safetensors"
    renamed = {f"text_model.{name}": tensor for name, tensor in load_file(plain).items()}
    renamed["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(renamed, plain, metadata={"format": "pt"})
    assert equal(load(folder, "text_encoder"), model)


def test_qwen_vl_survives_its_renaming(folder: Path) -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 37, "num_heads": 4, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(
        text_config={**text, "num_key_value_heads": 2, "rope_parameters": rope}, vision_config=vision, image_token_id=50
    )
    torch.manual_seed(3)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.save_pretrained(folder / "text_encoder")
    (folder / "text_encoder_2").rename(folder / "unused")
    tiny.write_index(folder, text_encoder=["transformers", "Qwen2_5_VLForConditionalGeneration"])
    loaded = load(folder, "text_encoder")
    assert equal(loaded, model)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert component_infos(open_model(str(folder)))["text_encoder"].causal is True


def test_a_vision_language_processor_loads_with_or_without_torchvision() -> None:
    processor = load(families.folder("qwen-image-edit-plus"), "processor")
    text = "<|vision_start|><|image_pad|><|vision_end|>red"
    made = processor(text=[text], images=[families.picture(0, 112, 56)], return_tensors="pt")
    image = made["input_ids"] == processor.image_token_id
    assert type(processor).__name__ == "Qwen2VLProcessor"
    assert image.sum() * 4 == len(made["pixel_values"]) == made["image_grid_thw"].prod() > 4
    assert torch.equal(made["mm_token_type_ids"].bool(), image)


# --- placements


def test_a_device_that_is_not_there(made: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(DeviceError) as caught:
        load(made, "vae", Placement(torch.device("cuda"), torch.float32))
    assert caught.value.field == "device"


def test_a_quantization_that_does_not_exist_yet(made: Path) -> None:
    with pytest.raises(Unsupported, match="int8"):
        load(made, "vae", Placement(torch.device("cpu"), quantization="int8"))


# --- causal or not


def text_models() -> dict[str, Any]:
    """One tiny model of each kind of text encoder."""
    import transformers as t

    small: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    t5: dict[str, Any] = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 2, "num_heads": 2}
    heads: dict[str, Any] = {"num_key_value_heads": 1, "head_dim": 8}
    return {
        "clip": t.CLIPTextModel(t.CLIPTextConfig(**small)),
        "clip with projection": t.CLIPTextModelWithProjection(t.CLIPTextConfig(**small, projection_dim=16)),
        "t5": t.T5EncoderModel(t.T5Config(**t5)),
        "umt5": t.UMT5EncoderModel(t.UMT5Config(**t5)),
        "bert": t.BertModel(t.BertConfig(**small)),
        "llama": t.LlamaModel(t.LlamaConfig(**small)),
        "qwen3": t.Qwen3Model(t.Qwen3Config(**small, **heads)),
        "mistral": t.MistralModel(t.MistralConfig(**small, **heads)),
        "gemma2": t.Gemma2Model(t.Gemma2Config(**small, **heads)),
        "gemma3 text": t.Gemma3TextModel(t.Gemma3TextConfig(**small, **heads)),
    }


def test_causal_is_what_a_changed_suffix_shows() -> None:
    ids = torch.tensor([[5, 9, 17, 30, 41, 2]])
    changed = torch.tensor([[5, 9, 17, 30, 12, 2]])
    for name, model in text_models().items():
        with torch.no_grad():
            one, other = (model.eval()(each).last_hidden_state[:, :4] for each in (ids, changed))
        measured = torch.equal(one, other)
        assert causal("transformers", type(model).__name__, model.config.to_dict()) is measured, name


def test_what_is_no_text_encoder_has_no_causality(made: Path) -> None:
    from transformers import CLIPVisionConfig

    assert causal("transformers", "CLIPVisionModel", CLIPVisionConfig().to_dict()) is None
    infos = component_infos(open_model(str(made)))
    assert [name for name, info in infos.items() if info.causal is not None] == ["text_encoder", "text_encoder_2"]

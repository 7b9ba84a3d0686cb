"""`triptych inspect` and what it says of a boundary, against what really crosses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import FAMILIES, folder
from tests.model import hub_server, tiny
from triptych.cli import main
from triptych.errors import InvalidRequest
from triptych.model import (
    Components,
    Placement,
    TaskInputs,
    Topology,
    component_infos,
    describe,
    meta_component,
    open_model,
    program,
)
from triptych.model.crossings import SAMPLE_PROMPT, boundary

SIZE = {"width": 64, "height": 64}
FAMILY_NAMES = ["flux", "qwen-image", "wan-t2v", "wan-i2v", "z-image", "sd3", "wan2.2-ti2v"]


def crossed(topology: Topology, fields: dict[str, Any], scale: float | None) -> dict[str, dict[str, Any]]:
    """What really crosses, by stage: shapes and dtypes by dotted name."""
    task = TaskInputs(dict(fields), scale, torch.Generator().manual_seed(0))
    components, found = Components(topology.source), {}
    for stage in topology.stages[:-1]:
        runner = program(topology, stage.name)
        runner.load(components, Placement(torch.device("cpu")))
        declared = {item.name for item in stage.request_inputs}
        part = {name: value for name, value in fields.items() if name in declared}
        made = runner.run(TaskInputs(part, scale, task.generator, task.values, task.tags), {})
        found[stage.name] = dict(leaves(made.values))
        task.values, task.tags = task.values | made.values, task.tags | made.tags
    return found


def leaves(value: Any, name: str = "") -> list[tuple[str, tuple[tuple[int, ...], str]]]:
    """Tensors by dotted name."""
    if isinstance(value, torch.Tensor):
        return [(name, (tuple(value.shape), str(value.dtype).removeprefix("torch.")))]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return [leaf for key, item in items for leaf in leaves(item, f"{name}.{key}" if name else str(key))]


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_the_boundary_told_is_the_boundary_met(name: str) -> None:
    from triptych.model.crossings import sample_request
    from triptych.model.door import resolve

    topology = describe(open_model(str(folder(name))))
    frames = 9 if topology.makes == "video" else None
    told = boundary(topology, 64, 64, frames)
    resolved = resolve(topology, sample_request(topology, 64, 64, frames))
    met = crossed(topology, resolved.fields, resolved.guidance_scale)
    assert {stage: {each.name: (each.shape, each.dtype) for each in parts} for stage, parts in told.items()} == met
    for each in (tensor for parts in told.values() for tensor in parts):
        assert each.shape is not None and each.dtype is not None
        assert each.bytes == torch.Size(each.shape).numel() * getattr(torch, each.dtype).itemsize


def test_the_boundary_reads_no_weights(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder("flux"), tmp_path / "flux"))
    told = boundary(describe(open_model(str(copy))), 64, 64)
    for weights in copy.rglob("*.safetensors"):
        weights.unlink()
    assert boundary(describe(open_model(str(copy))), 64, 64) == told != {}


def test_half_precision_on_disk_crosses_in_half_precision(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder("flux"), tmp_path / "flux"))
    source = open_model(str(copy))
    for name, info in component_infos(source).items():
        if info.parameters:
            Components(source).get(info, Placement(torch.device("cpu"), torch.bfloat16)).save_pretrained(copy / name)
    told = boundary(describe(open_model(str(copy))), 64, 64)
    assert {each.dtype for parts in told.values() for each in parts} == {"bfloat16"}


def test_real_sizes_need_neither_weights_nor_memory(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder("flux"), tmp_path / "flux"))
    for weights in copy.rglob("*.safetensors"):
        weights.unlink()
    attention = {"attention_head_dim": 128, "num_attention_heads": 24, "axes_dims_rope": [16, 56, 56]}
    size = {"num_layers": 19, "num_single_layers": 38, "joint_attention_dim": 4096, "in_channels": 64}
    tiny.edit_json(copy / "transformer" / "config.json", **attention, **size)
    tiny.edit_json(copy / "text_encoder_2" / "config.json", d_model=4096, d_ff=10240, num_layers=24, num_heads=64)
    tiny.edit_json(copy / "vae" / "config.json", latent_channels=16, block_out_channels=[128, 256, 512, 512])
    source = open_model(str(copy))
    transformer = meta_component(source, component_infos(source)["transformer"])
    assert sum(parameter.numel() for parameter in transformer.parameters()) > 11.8e9
    told = boundary(describe(source), 1024, 1024)
    shapes = {each.name: each.shape for parts in told.values() for each in parts}
    assert shapes["prompt_embeds"] == (1, 512, 4096) and shapes["latents"] == (1, 16, 128, 128)


def test_code_that_needs_weights_leaves_the_rest_unknown() -> None:
    told = boundary(describe(open_model(str(folder("flux2-klein")))), 64, 64)
    assert {each.shape for each in told["encode"]} == {None}  # its tiny encoder lacks the layers that are read
    assert told["denoise"][0].shape == (1, 4, 8, 8)


def test_a_size_that_the_model_cannot_make() -> None:
    with pytest.raises(InvalidRequest) as caught:
        boundary(describe(open_model(str(folder("flux")))), 65, 64)
    assert caught.value.field == "width"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """The command line in this process: exit code and what it printed."""
    code = main(["inspect", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_page_names_what_a_person_asks_for(capsys: pytest.CaptureFixture[str]) -> None:
    code, page, errors = run(capsys, str(folder("flux")), "--width", "64", "--height", "64")
    assert (code, errors) == (0, "")
    for text in (
        "text2image, image2image",
        "FluxTransformer2DModel",
        "bidirectional text encoder",
        "causal text encoder",
    ):
        assert text in page
    for text in (
        "encode",
        "denoise",
        "decode",
        "prompt_embeds",
        "1×512×32",
        "64 KiB",
        "latents",
        "1×4×8×8",
        "multiples of",
    ):
        assert text in page


def test_json_holds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    code, page, _ = run(capsys, str(folder("flux")), "--json", "--width", "64", "--height", "64")
    found = json.loads(page)
    infos = component_infos(open_model(str(folder("flux"))))
    assert code == 0 and found["workflows"] == ["text2image", "image2image"] and found["adapter"] == "modular"
    assert [stage["name"] for stage in found["stages"]] == ["encode", "denoise", "decode"]
    assert found["components"]["text_encoder"]["encoder"] == "causal"
    assert found["components"]["text_encoder_2"]["encoder"] == "bidirectional"
    assert found["components"]["transformer"]["parameters"] == infos["transformer"].parameters
    assert found["stages"][1]["bytes"] == infos["transformer"].bytes
    latents = {"name": "latents", "dtype": "float32", "shape": [1, 4, 8, 8], "bytes": 1024}
    assert found["boundary"]["tensors"]["denoise"] == [latents]
    assert found["boundary"]["prompt"] == SAMPLE_PROMPT


def test_a_workflow_restricts_what_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    pages = [
        run(capsys, str(folder("flux")), "--json", "--workflow", name)[1] for name in ("text2image", "image2image")
    ]
    loads = [set(json.loads(page)["stages"][0]["loads"]) for page in pages]
    assert "vae" not in loads[0] and "vae" in loads[1]


def test_what_cannot_be_split_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    fused = next(name for name in FAMILIES if len(describe(open_model(str(folder(name)))).stages) == 1)
    code, page, _ = run(capsys, str(folder(fused)))
    notes = describe(open_model(str(folder(fused)))).notes
    assert code == 0 and "runs in one piece" in page and notes and all(note[:40] in page for note in notes)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("no-such-model",), "model"),
        (("{flux}", "--workflow", "dance"), "workflow"),
        (("{flux}", "--width", "65"), "width"),
        (("{flux}", "--height", "0"), "height"),
        (("{flux}", "--num-frames", "9"), "num_frames"),
        (("{flux}", "--revision", "main"), "revision"),
    ],
)
def test_wrong_input_is_one_line(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], named: str) -> None:
    code, page, errors = run(capsys, *(word.replace("{flux}", str(folder("flux"))) for word in arguments))
    assert (code, page) == (2, "") and errors.count("\n") == 1 and errors.startswith(f"error: {named}")


def test_a_damaged_folder_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    made = tiny.write(tmp_path / "tiny")
    weights = made / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    code, page, errors = run(capsys, str(made))
    assert (code, page) == (2, "") and errors.count("\n") == 1 and f"{weights} is truncated" in errors


def test_a_hub_model_is_inspected_without_a_request_for_weights(tmp_path: Path) -> None:
    made = tiny.write(tmp_path / "tiny")
    with hub_server.serve(me__tiny={"main": made}) as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        done = subprocess.run(
            [sys.executable, "-m", "triptych", "inspect", "me/tiny", "--json", "--width", "64", "--height", "64"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert hub.requests and hub.weight_requests() == []
    found = json.loads(done.stdout)
    here = component_infos(open_model(str(made)))
    assert found["components"]["transformer"]["parameters"] == here["transformer"].parameters
    assert found["boundary"]["tensors"]["denoise"][0]["shape"] == [1, 4, 32, 32]

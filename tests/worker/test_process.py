"""A stage in a process of its own: what it loads, how its failures arrive, and that it can be used again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from PIL import Image

from tests.families import folder
from triptych.errors import InvalidRequest, ModelNotFound, StageFailed, TriptychError
from triptych.stage import StageTask
from triptych.transfer import Payload
from triptych.worker import StageProcess, StageSpec, wire


@pytest.fixture(scope="module")
def process() -> Iterator[StageProcess]:
    with StageProcess() as started:
        yield started


def spec() -> StageSpec:
    return StageSpec(str(folder("flux")), "encode", workflow="text2image", device="cpu", threads=1)


def task(**fields: object) -> StageTask:
    return StageTask("job", {"prompt": "a cat", "max_sequence_length": 32, **fields}, seed=1)


def test_a_stage_loads_its_own_weights_only(process: StageProcess) -> None:
    assert process.open(spec()) == ("text_encoder", "text_encoder_2")
    assert process.open(replace(spec(), stage="denoise")) == ("transformer",)
    assert process.open(replace(spec(), stage="decode")) == ("vae",)


def test_runs_a_task_and_gives_what_crosses(process: StageProcess) -> None:
    process.open(spec())
    payload = process.run(task()).payload
    assert payload.values["prompt_embeds"].shape == (1, 32, 32)
    assert all(isinstance(value, torch.Tensor) for value in payload.values.values())


def test_errors_arrive_as_themselves_and_the_process_goes_on(process: StageProcess) -> None:
    with pytest.raises(ModelNotFound):
        process.open(replace(spec(), model="no-such-model"))
    with pytest.raises(InvalidRequest) as caught:
        process.open(replace(spec(), device="abacus"))
    assert caught.value.field == "device"
    process.open(replace(spec(), stage="denoise"))
    with pytest.raises(TriptychError, match="prompt_embeds"):
        process.run(StageTask("job", {"num_inference_steps": 1}, seed=1, payload=Payload({})))
    process.open(spec())
    assert process.run(task()).payload.values


def test_a_dead_process_is_a_clear_error() -> None:
    with StageProcess() as process:
        process.open(spec())
        process._child.kill()
        process._child.wait()
        with pytest.raises(StageFailed, match="died"):
            process.run(task())
        with pytest.raises(StageFailed, match="died"):
            process.open(spec())


def test_a_process_without_a_stage_says_so() -> None:
    with StageProcess() as process, pytest.raises(TriptychError, match="no stage is open"):
        process.run(task())


def test_pictures_among_the_fields_cross_bit_for_bit() -> None:
    pictures = [Image.effect_noise((8, 6), 90).convert("RGB"), Image.effect_noise((4, 4), 90).convert("L")]
    packed = wire.pack_task({"image": pictures, "prompt": "x"}, Payload({"a": 1}, {"tag": ["a"]}))
    fields, before = wire.unpack_task(packed)
    assert [image.tobytes() for image in fields["image"]] == [image.tobytes() for image in pictures]
    assert [image.mode for image in fields["image"]] == ["RGB", "L"]
    assert fields["prompt"] == "x"
    assert before is not None and (before.values, before.tags) == ({"a": 1}, {"tag": ["a"]})

"""Real models in workers: the same pixels whatever the workers hold, previews, files, pictures that come in."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from tests.families import folder
from tests.families.base import picture as noise
from tests.worker.fakes import REFERENCES, TRANSFER, Running, running
from tests.worker.jobs import alone, resolved, task_of, through, topology_of
from triptych.decode import read_settings
from triptych.messages import Checkpointed, Encoding, Failed, Ready, SetPreview, Stepped, TaskDone, ticket_for
from triptych.model import Topology
from triptych.request import StageName
from triptych.worker import WorkerSettings

SMALL = {"prompt": "a red apple on the left, blue background", "width": 64, "height": 64, "seed": 3}


@pytest.fixture(scope="module")
def emoji() -> Topology:
    return topology_of("emoji")


@pytest.fixture(scope="module")
def whole() -> Iterator[Running]:
    """All of emoji in one worker."""
    with running(settings=WorkerSettings("emoji", device="cpu", transfer=TRANSFER)) as own:
        yield own


@pytest.fixture(scope="module")
def split() -> Iterator[dict[StageName, Running]]:
    """emoji in three workers."""

    def settings(stage: StageName) -> WorkerSettings:
        return WorkerSettings("emoji", (stage,), device="cpu", transfer=TRANSFER)

    with (
        running(settings=settings("encode")) as encode,
        running(settings=settings("denoise")) as denoise,
        running(settings=settings("decode")) as decode,
    ):
        yield {"encode": encode, "denoise": denoise, "decode": decode}


def everywhere(own: Running) -> dict[StageName, Running]:
    return {"encode": own, "denoise": own, "decode": own}


def test_one_worker_three_and_none_make_the_same_picture(
    emoji: Topology, whole: Running, split: dict[StageName, Running]
) -> None:
    wanted = resolved(emoji, **SMALL, num_inference_steps=3)
    expected = alone(emoji, wanted).values["images"]
    together = whole.read(through(emoji, wanted, everywhere(whole)))["images"]
    apart = split["decode"].read(through(emoji, wanted, split))["images"]
    assert torch.equal(expected, together) and torch.equal(expected, apart)
    loads = {name: own.coordinator.wait(Ready).weights for name, own in split.items()}
    assert {name: list(sizes) for name, sizes in loads.items()} == {name: [name] for name in loads}


def test_references_make_the_same_picture(emoji: Topology) -> None:
    wanted = resolved(emoji, **SMALL, num_inference_steps=2)
    with running(settings=WorkerSettings("emoji", device="cpu", transfer=REFERENCES)) as own:
        done = through(emoji, wanted, everywhere(own))
        assert done.fetched_by == "reference"
        assert torch.equal(own.read(done)["images"], alone(emoji, wanted).values["images"])


@pytest.mark.parametrize("family", ["flux", "wan-t2v", "stable-diffusion"])
def test_families_pass_through_a_worker(family: str) -> None:
    topology = topology_of(str(folder(family)))
    fields = {"prompt": "a cat", "width": 64, "height": 64, "num_inference_steps": 2, "seed": 1}
    if topology.makes == "video":
        fields["num_frames"] = 5
    wanted = resolved(topology, **fields)
    with running(settings=WorkerSettings(str(folder(family)), device="cpu", transfer=TRANSFER)) as own:
        made = own.read(through(topology, wanted, everywhere(own)))
    expected = alone(topology, wanted).values
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in made)


def test_a_task_goes_on_from_a_checkpoint(emoji: Topology, whole: Running) -> None:
    wanted = resolved(emoji, **SMALL, num_inference_steps=3)
    coordinator, secret = whole.coordinator, whole.exchange.secret
    coordinator.run(task_of(emoji, wanted, "encode", "c"))
    encoded = coordinator.wait(TaskDone, "c").descriptor

    def denoise(**more: object) -> None:
        coordinator.run(task_of(emoji, wanted, "denoise", "c", payload=ticket_for(encoded, secret), **more))

    denoise(checkpoint_seconds=0.0, exact=True)
    undisturbed = coordinator.wait(TaskDone, "c", 2)
    kept = coordinator.all(Checkpointed, "c")
    assert [item.step for item in kept] == [1, 2]
    told = [message for message in coordinator.heard if isinstance(message, Stepped | Checkpointed)]
    order = [type(message).__name__[0] for message in told if message.job == "c" and message.stage == "denoise"]
    assert "".join(order) == "SCSCS", "each checkpoint after its step"
    denoise(checkpoint=ticket_for(kept[1].descriptor, secret), attempt=2, exact=True)
    resumed = coordinator.wait(TaskDone, "c", 3)
    assert (resumed.resumed_at, resumed.steps) == (2, 3)
    assert torch.equal(whole.read(undisturbed)["latents"], whole.read(resumed)["latents"])


def test_a_checkpoint_that_does_not_fit_is_told_as_lost(emoji: Topology, whole: Running) -> None:
    wanted = resolved(emoji, **SMALL, num_inference_steps=3)
    coordinator, secret = whole.coordinator, whole.exchange.secret
    coordinator.run(task_of(emoji, wanted, "encode", "d"))
    encoded = ticket_for(coordinator.wait(TaskDone, "d").descriptor, secret)
    coordinator.run(task_of(emoji, wanted, "denoise", "d", payload=encoded, checkpoint_seconds=0.0))
    coordinator.wait(TaskDone, "d", 2)
    kept = ticket_for(coordinator.all(Checkpointed, "d")[0].descriptor, secret)
    longer = resolved(emoji, **SMALL, num_inference_steps=5)
    coordinator.run(task_of(emoji, longer, "denoise", "d", payload=encoded, checkpoint=kept, attempt=2))
    assert coordinator.wait(Failed, "d").lost == "checkpoint"


def test_previews_are_the_same_wherever_the_vae_is(
    emoji: Topology, whole: Running, split: dict[StageName, Running]
) -> None:
    wanted = resolved(emoji, **SMALL, num_inference_steps=3)
    learned = split["decode"].coordinator.wait(Ready).preview
    assert learned and not split["denoise"].coordinator.wait(Ready).preview
    split["denoise"].coordinator.send(SetPreview(preview=learned))
    seen = []
    for workers in (everywhere(whole), split):
        workers["encode"].coordinator.run(task_of(emoji, wanted, "encode", "p"))
        encoded = workers["encode"].coordinator.wait(TaskDone, "p").descriptor
        ticket = ticket_for(encoded, workers["encode"].exchange.secret)
        denoise = workers["denoise"].coordinator
        denoise.run(task_of(emoji, wanted, "denoise", "p", payload=ticket, preview=True))
        denoise.until(lambda denoise=denoise: len(steps(denoise.all(Stepped, "p"))) == 3, "three steps")
        seen.append([step.preview for step in steps(denoise.all(Stepped, "p"))])
    near, far = seen
    assert near == far and all(item is not None for item in near)
    assert near[0].width * near[0].height * 3 == len(near[0].pixels)
    assert near[0].pixels != near[-1].pixels


def steps(messages: list[Stepped]) -> list[Stepped]:
    return [message for message in messages if message.stage == "denoise"]


def test_decode_gives_files(emoji: Topology, whole: Running) -> None:
    wanted = resolved(emoji, **SMALL, num_inference_steps=1, num_outputs=2)
    pixels = whole.read(through(emoji, wanted, everywhere(whole), "pixels"))["images"]
    settings = {
        "triptych": "0",
        "model": "emoji",
        "source": "embedded",
        "workflow": "text2image",
        "output": 0,
        "request": {"prompt": "a cat", "seed": 3},
    }
    for format, kind in (("png", "image/png"), ("webp", "image/webp"), ("jpeg", "image/jpeg")):
        encoding = Encoding(format=format, metadata=settings)
        made = whole.read(through(emoji, wanted, everywhere(whole), format, encoding=encoding))
        assert made["media_types"] == [kind] * 2
        files = [file.numpy().tobytes() for file in made["files"]]
        images = [np.asarray(Image.open(io.BytesIO(file))) for file in files]
        assert all(image.shape == (64, 64, 3) for image in images)
        if format != "jpeg":
            assert all(np.array_equal(image, pixels[index].numpy()) for index, image in enumerate(images))
        outputs = [read_settings(file).output for file in files]  # type: ignore[arg-type]
        assert outputs == [0, 1]


def test_a_format_that_does_not_fit_is_refused(emoji: Topology, whole: Running) -> None:
    wanted = resolved(emoji, **SMALL, num_inference_steps=1)
    coordinator = whole.coordinator
    done = through(emoji, wanted, everywhere(whole), "before", raw=True)
    assert whole.read(done)["images"].is_floating_point()
    latents = ticket_for(coordinator.all(TaskDone, "before")[1].descriptor, whole.exchange.secret)
    coordinator.run(task_of(emoji, wanted, "decode", "wrong", payload=latents, encoding=Encoding(format="mp4")))
    failed = coordinator.wait(Failed, "wrong")
    assert (failed.code, failed.field) == ("invalid_request", "output_format")


def test_clips_become_mp4() -> None:
    model = str(folder("wan-t2v"))
    topology = topology_of(model)
    fields = {"prompt": "a cat", "width": 64, "height": 64, "num_frames": 5, "num_inference_steps": 1, "seed": 1}
    with running(settings=WorkerSettings(model, device="cpu", transfer=TRANSFER)) as own:
        done = through(topology, resolved(topology, **fields), everywhere(own), encoding=Encoding(format="mp4", fps=8))
        made = own.read(done)
    assert made["media_types"] == ["video/mp4"]
    assert made["files"][0].numpy().tobytes()[4:8] == b"ftyp"


@pytest.mark.parametrize("as_file", [False, True], ids=["pixels", "file"])
def test_pictures_come_as_pixels_or_as_files(as_file: bool) -> None:
    model = str(folder("stable-diffusion-img2img"))
    topology = topology_of(model)
    image = noise(5)
    wanted = resolved(topology, prompt="a cat", images=(image,), num_inference_steps=2, strength=0.6, seed=1)
    pixels = torch.from_numpy(np.array(image))
    if as_file:
        file = io.BytesIO()
        image.save(file, "PNG")
        pixels = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    with running(settings=WorkerSettings(model, device="cpu", transfer=TRANSFER)) as own:
        declared = topology.stages[0].request_inputs
        assert any(item.name == "image" for item in declared)
        own.coordinator.run(task_of(topology, wanted, "encode", pictures=own.give(image=pixels)))
        ticket = ticket_for(own.coordinator.wait(TaskDone).descriptor, own.exchange.secret)
        rest = {}
        if any(item.name == "image" for item in topology.stage("denoise").request_inputs):
            rest["pictures"] = own.give(image=pixels)
        own.coordinator.run(task_of(topology, wanted, "denoise", payload=ticket, **rest))
        ticket = ticket_for(own.coordinator.wait(TaskDone, count=2).descriptor, own.exchange.secret)
        own.coordinator.run(task_of(topology, wanted, "decode", payload=ticket))
        made = own.read(own.coordinator.wait(TaskDone, count=3))["images"]
    assert torch.equal(made, alone(topology, wanted).values["images"])

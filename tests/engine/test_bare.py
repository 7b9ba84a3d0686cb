"""Calls of a model's VAE by itself, against the same VAE called directly: every family's scaling, ranks and packing."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLLTXVideo, AutoencoderKLQwenImage, AutoencoderKLWan

from tests.families import folder, picture
from triptych import Engine, InvalidRequest, NotEnoughMemory, Request, Unsupported
from triptych.model import VaeCall, VaeOptions, describe, extent_of, open_model, vae_stage
from triptych.worker import WorkerSettings, replay_task

CLASSES: dict[str, Any] = {
    "flux": AutoencoderKL,
    "flux2-klein": AutoencoderKLFlux2,
    "qwen-image": AutoencoderKLQwenImage,
    "wan-t2v": AutoencoderKLWan,
    "ltx": AutoencoderKLLTXVideo,
    "stable-diffusion": AutoencoderKL,
}


@cache
def vae_of(name: str) -> Any:
    return CLASSES[name].from_pretrained(folder(name), subfolder="vae", torch_dtype=torch.float32).eval()


@pytest.fixture(params=["flux", "qwen-image", "wan-t2v", "ltx", "stable-diffusion"])
def model(request: pytest.FixtureRequest) -> Iterator[tuple[str, Engine]]:
    with Engine.open(str(folder(request.param)), device="cpu") as engine:
        yield request.param, engine


@pytest.fixture(scope="module")
def flux() -> Iterator[Engine]:
    with Engine.open(str(folder("flux")), device="cpu") as engine:
        yield engine


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latents_for(engine: Engine, frames: int = 1) -> torch.Tensor:
    topology = engine.topology
    time = (frames,) if topology.makes == "video" else ()
    return noise(2, topology.latent_channels, *time, 4, 4)


def own_scale(name: str, vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """As each family's own pipeline prepares latents for the VAE."""
    if name in ("qwen-image", "wan-t2v"):
        shape = (1, -1, *[1] * (latents.ndim - 2))
        mean, std = (torch.tensor(vae.config[f"latents_{what}"]).view(shape) for what in ("mean", "std"))
        return latents / (1.0 / std) + mean
    if name == "ltx":
        mean, std = (getattr(vae, f"latents_{what}").view(1, -1, 1, 1, 1) for what in ("mean", "std"))
        return latents * std / vae.config.scaling_factor + mean
    return latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0)


@torch.no_grad()
def test_decodes_as_the_vae_does(model: tuple[str, Engine]) -> None:
    name, engine = model
    vae = vae_of(name)
    latents = latents_for(engine, frames=2)
    for given, ready in (
        (engine.decode_latents(latents), own_scale(name, vae, latents)),
        (engine.decode_latents(latents, do_scaling=False), latents),
        (
            engine.decode_latents(latents, do_scaling=False, scaling_factor=0.5, shift_factor=0.25),
            latents / 0.5 + 0.25,
        ),
    ):
        clips = latents.ndim == 5 or name == "qwen-image"
        expected = vae.decode(ready if latents.ndim == 5 or not clips else ready.unsqueeze(2), return_dict=False)[0]
        expected = expected.squeeze(2) if clips and latents.ndim == 4 else expected
        assert given.shape == expected.shape
        assert (given - expected).abs().max() <= 1e-5


@torch.no_grad()
def test_encodes_as_the_vae_does(model: tuple[str, Engine]) -> None:
    name, engine = model
    vae, video = vae_of(name), engine.topology.makes == "video"
    frames = 1 + (engine.topology.temporal_scale or 0)
    pixels = noise(1, 3, frames, 64, 64).clamp(-1, 1) if video else noise(2, 3, 64, 64).clamp(-1, 1)
    ready = pixels.unsqueeze(2) if name == "qwen-image" else pixels
    expected = vae.encode(ready).latent_dist.mode()
    expected = expected.squeeze(2) if name == "qwen-image" else expected
    assert (engine.encode_pixels(pixels, do_scaling=False) - expected).abs().max() <= 1e-5
    scaled = engine.encode_pixels(pixels)
    assert (own_scale(name, vae, scaled) - expected).abs().max() <= 1e-5, "decode's scaling takes encode's back"
    assert (engine.encode_pixels(pixels, do_scaling=False, scaling_factor=2.0, shift_factor=0.5)
            - (expected - 0.5) * 2).abs().max() <= 1e-5  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", ["flux", "qwen-image"])
def test_packed_latents_are_unpacked_as_the_pipeline_packs_them(name: str) -> None:
    from diffusers import FluxPipeline, QwenImagePipeline

    pack = (FluxPipeline if name == "flux" else QwenImagePipeline)._pack_latents
    with Engine.open(str(folder(name)), device="cpu") as engine:
        latents = noise(1, engine.topology.latent_channels, 4, 6)
        packed = pack(latents, *latents.shape)
        assert torch.equal(engine.decode_latents(packed, height=32, width=48), engine.decode_latents(latents))


@torch.no_grad()
def test_pictures_are_encoded_as_diffusers_prepares_them(flux: Engine) -> None:
    from diffusers.image_processor import VaeImageProcessor

    vae, image = vae_of("flux"), picture(3, 70, 52)
    ready = VaeImageProcessor(vae_scale_factor=8).preprocess(image)
    expected = vae.encode(ready).latent_dist.mode()
    given = flux.encode_pixels(image, do_scaling=False)
    assert given.shape == (1, 4, 6, 8)
    assert (given - expected).abs().max() <= 1e-5
    rows = torch.from_numpy(np.array(picture(3)))[None]
    assert torch.equal(flux.encode_pixels(rows), flux.encode_pixels(picture(3)))


@torch.no_grad()
def test_a_still_of_a_model_of_clips_and_a_clip_of_pictures(flux: Engine) -> None:
    with Engine.open(str(folder("wan-t2v")), device="cpu") as engine:
        still = noise(1, 16, 4, 4)
        assert torch.equal(engine.decode_latents(still), engine.decode_latents(still.unsqueeze(2)).squeeze(2))
        assert engine.decode_latents(noise(1, 16, 3, 4, 4), output="unit").shape == (9, 3, 32, 32)
    one = noise(2, 4, 1, 4, 4)
    assert torch.equal(flux.decode_latents(one), flux.decode_latents(one.squeeze(2)).unsqueeze(2))


def test_what_the_vae_is_given_stays_as_it_was(flux: Engine) -> None:
    latents = latents_for(flux)
    before = latents.clone()
    flux.decode_latents(latents, do_scaling=False)
    assert torch.equal(latents, before)


def test_half_precision_comes_in_and_the_vaes_own_goes_out(flux: Engine) -> None:
    latents = latents_for(flux)
    made = flux.decode_latents(latents.bfloat16())
    assert made.dtype == torch.float32
    assert torch.equal(made, flux.decode_latents(latents.bfloat16().float()))


def test_vaes_that_declare_no_scaling_say_so() -> None:
    with Engine.open(str(folder("flux2-klein")), device="cpu") as engine:
        latents = latents_for(engine)
        with pytest.raises(Unsupported, match="AutoencoderKLFlux2 declares no scaling"):
            engine.decode_latents(latents)
        with torch.no_grad():
            expected = vae_of("flux2-klein").decode(latents, return_dict=False)[0]
        assert (engine.decode_latents(latents, do_scaling=False) - expected).abs().max() <= 1e-5


def test_models_without_a_vae_say_so() -> None:
    with Engine.open(str(folder("ddpm")), device="cpu") as engine, pytest.raises(Unsupported, match="has no VAE"):
        engine.decode_latents(noise(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("name", "encodes"), [("flux", "encode"), ("wan-t2v", "decode"), ("stable-diffusion", "decode")]
)
def test_the_stage_that_holds_a_vae_does_it(name: str, encodes: str) -> None:
    topology = describe(open_model(str(folder(name))))
    assert vae_stage(topology, "vae.decode") == "decode"
    assert vae_stage(topology, "vae.encode") == encodes


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"shape": (1, 5, 4, 4)}, "shape"),
        ({"shape": (1, 4)}, "shape"),
        ({"shape": (1, 4, 0, 4)}, "shape"),
        ({"shape": (1, 4, 2, 4, 4)}, "shape"),
        ({"shape": (1, 4, 4, 1 << 40)}, "shape"),
        ({"shape": (65, 4, 4, 4)}, "shape"),
        ({"dtype": "uint8"}, "dtype"),
        ({"dtype": "float64"}, "dtype"),
        ({"task": "vae.encode", "shape": (1, 4, 64, 64)}, "shape"),
        ({"task": "vae.encode", "shape": (1, 3, 63, 64)}, "shape"),
        ({"task": "vae.encode", "shape": (1, 3, 5, 64, 64)}, "shape"),
        ({"task": "vae.encode", "shape": (1, 64, 64, 4), "dtype": "uint8"}, "shape"),
        ({"shape": (1, 4, 16)}, "height"),
        ({"shape": (1, 4, 16), "options": {"height": 40, "width": 32}}, "height"),
        ({"shape": (1, 4, 16), "options": {"height": 32, "width": 48}}, "shape"),
        ({"options": {"height": 64, "width": 32}}, "height"),
        ({"options": {"scaling_factor": float("nan")}}, "scaling_factor"),
        ({"options": {"scaling_factor": 0.0}}, "scaling_factor"),
        ({"options": {"shift_factor": float("inf")}}, "shift_factor"),
    ],
)
def test_wrong_calls_are_refused_by_shape_and_dtype_alone(changes: dict[str, Any], field: str) -> None:
    topology = describe(open_model(str(folder("flux"))))
    known: dict[str, Any] = {"task": "vae.decode", "shape": (1, 4, 4, 4), "dtype": "float32"}
    given = {**known, **changes, "options": VaeOptions(**changes.get("options", {}))}
    with pytest.raises(InvalidRequest) as error:
        extent_of(topology, VaeCall(**given))
    assert error.value.field == field


def test_numbers_that_are_none_are_refused_before_any_work(flux: Engine) -> None:
    latents = latents_for(flux)
    for bad in (float("nan"), float("inf")):
        latents[0, 0, 0, 0] = bad
        for dtype in (torch.float32, torch.bfloat16):
            with pytest.raises(InvalidRequest, match="NaN or infinity"):
                flux.decode_latents(latents.to(dtype))
    assert flux.status().jobs["queued"] == flux.status().jobs["running"] == 0


def test_more_than_the_memory_holds_is_refused(flux: Engine) -> None:
    shape = (64, 4, 512, 512)
    huge = torch.zeros(1).expand(shape)
    with pytest.raises(NotEnoughMemory, match="GiB are free"):
        flux.decode_latents(huge)


def test_wrong_options_are_named(flux: Engine) -> None:
    with pytest.raises(InvalidRequest, match="scaling_factor"):
        flux.decode_latents(latents_for(flux), scale=2.0)
    with pytest.raises(InvalidRequest, match="raw, unit"):
        flux.decode_latents(latents_for(flux), output="videos")


def test_such_a_job_is_a_job_like_any_other(flux: Engine) -> None:
    latents = latents_for(flux)
    call = VaeCall("vae.decode", tuple(latents.shape), "float32")
    job = flux.submit_vae(call, bytearray(latents.numpy().tobytes()), client="a", deadline=60.0)
    view = flux.view(job)
    assert view is not None
    spec = view.record.spec
    assert (spec.workflow, spec.client, [part.stage for part in spec.stages]) == ("vae.decode", "a", ["decode"])
    assert spec.request == {"shape": [2, 4, 4, 4], "dtype": "float32", "output": "raw"}
    assert job in [record.spec.id for record in flux.jobs(client="a")]
    assert job not in [record.spec.id for record in flux.jobs(client="b")]
    with pytest.raises(InvalidRequest, match="given '3 bytes'"):
        flux.submit_vae(call, bytearray(3))


def test_calls_and_requests_run_side_by_side(flux: Engine) -> None:
    latents = latents_for(flux)
    request = Request.parse(prompt="a cat", width=64, height=64, num_inference_steps=4, seed=1, max_sequence_length=32)
    picture_alone, decoded_alone = np.asarray(flux.generate(request).images[0]), flux.decode_latents(latents)
    with ThreadPoolExecutor(6) as pool:
        pictures = [pool.submit(flux.generate, request) for _ in range(3)]
        calls = [pool.submit(flux.decode_latents, latents) for _ in range(6)]
        assert all(torch.equal(call.result(), decoded_alone) for call in calls)
        assert all(np.array_equal(np.asarray(made.result().images[0]), picture_alone) for made in pictures)


def test_a_call_that_failed_can_be_run_again(tmp_path: Path) -> None:
    model = str(folder("flux2-klein"))
    with Engine.open(model, device="cpu", state=tmp_path / "state") as engine:
        latents = latents_for(engine)
        call = VaeCall("vae.decode", tuple(latents.shape), "float32", VaeOptions(do_scaling=True))
        ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        job = engine.submit_vae(call, latents, listener=ended.put)
        assert isinstance(ended.get(timeout=60), Unsupported)
    (kept,) = tmp_path.rglob("failed.task")
    assert job in str(kept)
    with pytest.raises(Unsupported, match="declares no scaling"):
        replay_task(kept.parent, WorkerSettings(model=model, device="cpu"))

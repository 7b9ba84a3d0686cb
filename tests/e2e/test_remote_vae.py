"""diffusers' own `remote_decode` and `remote_encode` against a server of processes: the VAE's own numbers come back."""

from __future__ import annotations

import re
import signal
import socket
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.remote_utils import remote_decode, remote_encode
from diffusers.video_processor import VideoProcessor
from PIL import Image

from tests.e2e.commands import Server, short_folder, until
from tests.families import folder as family
from tests.families import picture
from triptych.model import open_model


@pytest.fixture(scope="module")
def emoji() -> Iterator[Server]:
    with short_folder() as folder:
        server = Server(folder, "--layout", "split", "--threads", "1", "--state", "state")
        yield server
        server.close()


@pytest.fixture(scope="module")
def wan() -> Iterator[Server]:
    with short_folder() as folder:
        server = Server(folder, "--threads", "1", model=str(family("wan-t2v")))
        yield server
        server.close()


@cache
def emoji_vae() -> Any:
    folder = open_model("emoji").folder
    return AutoencoderKLQwenImage.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32).eval()


@cache
def wan_vae() -> Any:
    return AutoencoderKLWan.from_pretrained(family("wan-t2v"), subfolder="vae", torch_dtype=torch.float32).eval()


def decode(*given: Any, **asked: Any) -> Any:
    """What comes back is of the kind that was asked for."""
    return remote_decode(*given, **asked)


def encode(*given: Any, **asked: Any) -> Any:
    """The same for latents."""
    return remote_encode(*given, **asked)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def decoded(vae: Any, latents: torch.Tensor, scaled: bool = False) -> torch.Tensor:
    """By the VAE itself; `scaled`: with its own scaling before, as its pipeline does."""
    clip = latents if latents.ndim == 5 else latents.unsqueeze(2)
    if scaled:
        mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
        clip = clip / (1.0 / std) + mean
    made = vae.decode(clip, return_dict=False)[0]
    return made if latents.ndim == 5 else made.squeeze(2)


def apart(one: Any, other: Any) -> float:
    return float((torch.as_tensor(one).float() - torch.as_tensor(other).float()).abs().max())


def levels(images: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_tensors_and_pictures_are_the_vaes_own(emoji: Server) -> None:
    url, latents, expected = f"{emoji.url}/v1/vae/decode", noise(2, 8, 16, 16), None
    for given, ready in (({"do_scaling": False}, latents), ({"scaling_factor": 0.5, "shift_factor": 0.1}, None)):
        ready = latents / 0.5 + 0.1 if ready is None else ready
        expected = decoded(emoji_vae(), ready)
        made = decode(url, latents, output_type="pt", return_type="pt", **given)
        assert made.dtype == torch.float32
        assert apart(made, expected) <= 1e-5
    shown = decoded(emoji_vae(), latents[:1])
    processor: Any = VaeImageProcessor()
    (wanted,) = processor.postprocess(shown, output_type="pil")
    one, plain = latents[:1], {"do_scaling": False}
    pictures = {
        "pt": decode(url, one, processor, output_type="pt", **plain),
        "levels": decode(url, one, output_type="pt", partial_postprocess=True, **plain),
        "png": decode(url, one, image_format="png", **plain),
    }
    for name, image in pictures.items():
        assert isinstance(image, Image.Image), name
        assert abs(levels([image]) - levels([wanted])).max() <= (name == "pt"), name
    assert pictures["png"].format == "png"
    jpg = decode(url, one, **plain)
    assert jpg.format == "jpeg"
    assert abs(levels([jpg]) - levels([wanted])).mean() < 4
    several = decode(url, latents, processor, output_type="pil", **plain)
    assert len(several) == 2 and abs(levels(several[:1]) - levels([wanted])).max() <= 1


def test_its_own_scaling_is_what_is_meant_without_a_factor(emoji: Server) -> None:
    latents = noise(1, 8, 16, 16)
    with pytest.warns(FutureWarning, match="do_scaling"):
        made = decode(f"{emoji.url}/v1/vae/decode", latents, output_type="pt", return_type="pt")
    assert apart(made, decoded(emoji_vae(), latents, scaled=True)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_whole(emoji: Server, dtype: torch.dtype) -> None:
    latents = noise(1, 8, 16, 16).to(dtype)
    url = f"{emoji.url}/v1/vae/decode"
    made = decode(url, latents, do_scaling=False, output_type="pt", return_type="pt")
    assert apart(made, decoded(emoji_vae(), latents.float())) <= 1e-5


def test_packed_latents(emoji: Server) -> None:
    from diffusers import QwenImagePipeline

    latents = noise(1, 8, 16, 12)
    packed = QwenImagePipeline._pack_latents(latents, *latents.shape)
    asked: dict[str, Any] = {"do_scaling": False, "output_type": "pt", "return_type": "pt"}
    made = decode(f"{emoji.url}/v1/vae/decode", packed, height=64, width=48, **asked)
    assert apart(made, decoded(emoji_vae(), latents)) <= 1e-5


@torch.no_grad()
def test_encoding_and_back(emoji: Server) -> None:
    url, image, vae = f"{emoji.url}/v1/vae/encode", picture(3), emoji_vae()
    # Contiguous: the client frees a copy that it makes itself before it sends it.
    ready = VaeImageProcessor(vae_scale_factor=4).preprocess(image).contiguous()
    expected = vae.encode(ready.unsqueeze(2)).latent_dist.mode().squeeze(2)
    assert apart(encode(url, image), expected) <= 1e-5
    assert apart(encode(url, ready), expected) <= 1e-5
    scaled = encode(url, image, scaling_factor=2.0, shift_factor=0.5)
    assert apart(scaled, (expected - 0.5) * 2) <= 1e-5
    back = decode(
        f"{emoji.url}/v1/vae/decode", scaled, scaling_factor=2.0, shift_factor=0.5, output_type="pt", return_type="pt"
    )  # fmt: skip
    assert apart(back, decoded(vae, expected)) <= 1e-4


@torch.no_grad()
@pytest.mark.slow
def test_clips(wan: Server) -> None:
    url, latents, vae = f"{wan.url}/v1/vae/decode", noise(1, 16, 2, 4, 4), wan_vae()
    expected = decoded(vae, latents)
    plain: dict[str, Any] = {"do_scaling": False}
    made = decode(url, latents, output_type="pt", return_type="pt", **plain)
    assert made.shape == (1, 3, 5, 32, 32) and apart(made, expected) <= 1e-5
    wanted = VideoProcessor().postprocess_video(expected, output_type="pil")[0]
    for frames in (
        decode(url, latents, VideoProcessor(), output_type="pt", **plain),
        decode(url, latents, VideoProcessor(), output_type="pil", **plain),
        decode(url, latents, output_type="pt", partial_postprocess=True, **plain),
    ):
        assert len(frames) == 5 and abs(levels(frames) - levels(wanted)).max() <= 1
    clip = decode(url, latents, output_type="mp4", return_type="mp4", **plain)
    assert isinstance(clip, bytes) and clip[4:8] == b"ftyp"
    pixels = noise(1, 3, 5, 32, 32).clamp(-1, 1)
    encoded = encode(f"{wan.url}/v1/vae/encode", pixels)
    assert apart(encoded, vae.encode(pixels).latent_dist.mode()) <= 1e-5
    with pytest.raises(RuntimeError, match="one picture"):
        decode(url, latents, **plain)


def test_such_calls_are_jobs_until_they_are_answered(emoji: Server) -> None:
    asked: dict[str, Any] = {"do_scaling": False, "output_type": "pt", "return_type": "pt"}
    worker = psutil.Process(emoji.worker("decode")["pid"])
    worker.suspend()
    try:
        thread = threading.Thread(target=lambda: decode(f"{emoji.url}/v1/vae/decode", noise(1, 8, 8, 8), **asked))
        thread.start()
        (job,) = until(lambda: [one for one in listed(emoji) if one["state"] == "running"], "a call that runs")
        assert (job["workflow"], job["request"]["shape"]) == ("vae.decode", [1, 8, 8, 8])
    finally:
        worker.resume()
    thread.join(90)
    until(lambda: job["id"] not in {one["id"] for one in listed(emoji)}, "it to be forgotten, with its tensor")


def listed(server: Server) -> list[dict[str, Any]]:
    found = server.client.get("/v1/jobs").raise_for_status().json()
    return found["data"] if isinstance(found, dict) else found


@pytest.mark.parametrize(
    ("latents", "given", "message"),
    [
        (torch.full((1, 8, 8, 8), float("nan")), {"scaling_factor": 1.0}, "NaN or infinity"),
        (torch.full((1, 8, 8, 8), float("inf")).bfloat16(), {"scaling_factor": 1.0}, "NaN or infinity"),
        (torch.zeros(1, 9, 8, 8), {"scaling_factor": 1.0}, "8 channels"),
        (torch.zeros(1, 8, 8, 8), {"scaling_factor": float("nan")}, "finite"),
        (torch.zeros(1, 8, 8, 8), {"scaling_factor": 0.0}, "other than 0"),
        (torch.zeros(1, 8, 8, 8).double(), {"scaling_factor": 1.0}, "float32"),
        (torch.full((1, 8, 8, 8), 3e38), {"scaling_factor": 1e-6}, "not numbers"),
    ],
)
def test_what_is_no_number_is_refused_in_words(
    emoji: Server, latents: torch.Tensor, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(RuntimeError, match=re.escape(message)):
        decode(f"{emoji.url}/v1/vae/decode", latents, image_format="png", **given)


def test_a_worker_that_is_killed_costs_no_call(emoji: Server) -> None:
    pid = emoji.worker("decode")["pid"]
    worker = psutil.Process(pid)
    worker.suspend()
    made: list[torch.Tensor] = []
    latents = noise(1, 8, 16, 16)
    asked: dict[str, Any] = {"do_scaling": False, "output_type": "pt", "return_type": "pt"}
    thread = threading.Thread(
        target=lambda: made.append(decode(f"{emoji.url}/v1/vae/decode", latents, **asked))
    )  # fmt: skip
    thread.start()
    until(lambda: [job for job in listed(emoji) if job["state"] == "running"], "a call that runs")
    worker.send_signal(signal.SIGKILL)
    thread.join(90)
    assert apart(made[0], decoded(emoji_vae(), latents)) <= 1e-5
    assert emoji.worker("decode")["pid"] != pid
    until(emoji.is_idle, emoji.cluster)


def test_a_client_that_hangs_up_cancels_its_call(emoji: Server) -> None:
    worker = psutil.Process(emoji.worker("decode")["pid"])
    worker.suspend()
    try:
        parts = urlsplit(emoji.url)
        data = noise(1, 8, 16, 16).numpy().tobytes()
        query = "shape=1&shape=8&shape=16&shape=16&dtype=float32"
        head = f"POST /v1/vae/decode?{query} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: tensor/binary\r\n"
        with socket.create_connection((parts.hostname, parts.port)) as line:
            line.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            (job,) = until(lambda: [one for one in listed(emoji) if one["state"] == "running"], "a call that runs")
        until(lambda: job["id"] not in {one["id"] for one in listed(emoji)}, "it to be cancelled and forgotten")
    finally:
        worker.resume()
    until(emoji.is_idle, emoji.cluster)
    decode(f"{emoji.url}/v1/vae/decode", noise(1, 8, 8, 8), do_scaling=False)

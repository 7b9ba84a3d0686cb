"""diffusers' remote VAE as a client meets it: what is asked of the engine, what comes back, and what is refused, before
the body is read where its announcement tells enough."""

from __future__ import annotations

import asyncio
import io
import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.server.conftest import LOCAL
from tests.server.fake import TOPOLOGY, FakeEngine, File
from tests.server.test_jobs import until
from triptych.cluster.jobs import Failure
from triptych.config import BoundsSection, ServeSection
from triptych.messages import Encoding
from triptych.model import VaeCall, VaeOptions
from triptych.server import create_app

LATENTS = {"shape": [1, 4, 4, 4], "dtype": "float32"}
BYTES = bytes(4 * 4 * 4 * 4)
BINARY = {"Content-Type": "tensor/binary"}
STAGES = tuple(replace(part, loads=("vae",) if part.name != "denoise" else ()) for part in TOPOLOGY.stages)
PICTURES = replace(TOPOLOGY, stages=STAGES)
CLIPS = replace(PICTURES, makes="video", temporal_scale=4, defaults=replace(TOPOLOGY.defaults, fps=24.0))


def safetensors(shape: list[int], kind: str, data: bytes) -> bytes:
    head = json.dumps({"tensor": {"dtype": kind, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    return struct.pack("<Q", len(head)) + head + data


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(topology=PICTURES, vae_made=File(data=b"picture"))


def decode(client: TestClient, data: bytes = BYTES, headers: dict[str, str] = BINARY, **parameters: Any) -> Any:
    return client.post("/v1/vae/decode", content=data, params={**LATENTS, **parameters}, headers=headers)


def refused(answer: Any, status: int, field: str) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["field"] == field, error
    return error["message"]


def tensors(engine: FakeEngine) -> None:
    engine.vae_made = File(data=safetensors([1, 2], "F32", bytes(range(8))), media_type="application/x-safetensors")


def test_a_picture_is_what_remote_decode_asks_for_by_itself(client: TestClient, engine: FakeEngine) -> None:
    answer = decode(client, do_scaling="True", partial_postprocess="False", image_format="jpg", output_type="pil")
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, b"picture", "image/png")
    ((call, data, options),) = engine.vae_calls
    assert call == VaeCall("vae.decode", (1, 4, 4, 4), "float32", VaeOptions(do_scaling=True, output="images"))
    assert (data, options) == (BYTES, {"encoding": Encoding(format="jpeg"), "client": "", "trace": ""})


@pytest.mark.parametrize(
    ("parameters", "accept", "output", "encoding"),
    [
        ({"image_format": "png"}, "image/png", "images", Encoding(format="png")),
        ({"output_type": "pil"}, "tensor/binary", "unit", Encoding(format="safetensors")),
        ({"output_type": "pt"}, "tensor/binary", "raw", Encoding(format="safetensors")),
        ({"output_type": "pt"}, "*/*", "raw", Encoding(format="safetensors")),
        ({"output_type": "pt", "partial_postprocess": True}, "tensor/binary", "images", Encoding(format="safetensors")),
        ({"output_type": "pt", "shape": [1, 4, 16], "height": 32, "width": 32}, "*/*", "raw",
         Encoding(format="safetensors")),
    ],
)  # fmt: skip
def test_what_each_output_is_made_of(
    client: TestClient, engine: FakeEngine, parameters: dict[str, Any], accept: str, output: str, encoding: Encoding
) -> None:
    tensors(engine)
    given = {"shape": [1, 4, 16], **parameters} if "height" in parameters else parameters
    data = bytes(1 * 4 * 16 * 4) if "height" in parameters else BYTES
    answer = decode(client, data, {**BINARY, "Accept": accept}, **given)
    assert answer.status_code == 200, answer.text
    ((call, _, options),) = engine.vae_calls
    assert (call.options.output, options["encoding"]) == (output, encoding)


def test_a_tensor_says_what_it_is_in_headers(client: TestClient, engine: FakeEngine, tmp_path: Path) -> None:
    tensors(engine)
    answer = decode(client, output_type="pt")
    assert (json.loads(answer.headers["shape"]), answer.headers["dtype"]) == ([1, 2], "float32")
    assert (answer.content, answer.headers["content-type"]) == (bytes(range(8)), "tensor/binary")
    path = tmp_path / "0.safetensors"
    numbers = bytes(range(256)) * (1 << 13)
    path.write_bytes(safetensors([1 << 20], "BF16", numbers))
    engine.vae_made = File(path, media_type="application/x-safetensors")
    answer = decode(client, output_type="pt")
    assert (answer.headers["dtype"], answer.headers["content-length"]) == ("bfloat16", str(1 << 21))
    assert answer.content == numbers
    path.unlink()
    assert decode(client, output_type="pt").status_code == 410


def test_clips_leave_as_mp4_at_the_models_rate(client: TestClient, engine: FakeEngine) -> None:
    engine.topology = CLIPS
    clip = {"shape": [1, 4, 2, 4, 4], "output_type": "mp4"}
    assert decode(client, BYTES * 2, **clip).status_code == 200
    assert decode(client, BYTES * 2, **clip, fps=8).status_code == 200
    assert [options["encoding"].fps for _, _, options in engine.vae_calls] == [24.0, 8.0]
    assert "one clip" in refused(decode(client, BYTES * 4, **{**clip, "shape": [2, 4, 2, 4, 4]}), 422, "output_type")
    assert "one picture" in refused(decode(client, BYTES * 2, shape=[1, 4, 2, 4, 4]), 422, "shape")


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"dtype": "float64"}, "dtype"),
        ({"dtype": "uint8"}, "dtype"),
        ({"shape": [1, 5, 4, 4]}, "shape"),
        ({"shape": [4]}, "shape"),
        ({"shape": [1, 4, 4, 0]}, "shape"),
        ({"shape": [1, 4, 4, -4]}, "shape"),
        ({"shape": ["a", 4, 4, 4]}, "shape"),
        ({"shape": [1, 4, 1 << 20, 1 << 20]}, "shape"),
        ({"shape": [2, 4, 4, 4]}, "shape"),
        ({"shape": [1, 4, 16]}, "height"),
        ({"height": 31, "width": 32}, "height"),
        ({"scaling_factor": "nan"}, "scaling_factor"),
        ({"scaling_factor": "inf"}, "scaling_factor"),
        ({"scaling_factor": 0}, "scaling_factor"),
        ({"shift_factor": "x"}, "shift_factor"),
        ({"output_type": "np"}, "output_type"),
        ({"output_type": "mp4"}, "output_type"),
        ({"image_format": "webp"}, "image_format"),
        ({"partial_postprocess": True}, "partial_postprocess"),
        ({"fps": 8}, "fps"),
        ({"quality": 8}, "quality"),
    ],
)
def test_wrong_parameters_name_their_field(
    client: TestClient, engine: FakeEngine, parameters: dict[str, Any], field: str
) -> None:
    refused(decode(client, **parameters), 422, field)
    assert not engine.vae_calls


def test_bodies_are_as_long_as_they_were_announced_to_be(client: TestClient, engine: FakeEngine) -> None:
    assert "given '255 bytes'; allowed: 256" in refused(decode(client, BYTES[1:]), 422, "body")
    refused(decode(client, BYTES + b"x"), 422, "body")

    def pieces(data: bytes) -> Iterator[bytes]:
        yield data

    refused(client.post("/v1/vae/decode", content=pieces(BYTES * 2), params=LATENTS, headers=BINARY), 413, "body")
    large = {"shape": [16, 4, 32, 32], "output_type": "pt"}  # 262,144 bytes
    assert "at most 100000 bytes" in refused(decode(client, b"", **large), 413, "body")
    assert not engine.vae_calls


def test_nothing_is_read_of_a_body_whose_announcement_is_wrong(engine: FakeEngine) -> None:
    """The reason to refuse is in the head: the body need not come, and no memory is taken for it."""
    app = create_app(engine, ServeSection(), version="1")
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        raise AssertionError("the body was asked for")

    async def send(message: Any) -> None:
        sent.append(message)

    latents = "shape=1&shape={}&shape=4&shape={}&dtype=float32"
    for query in (latents.format(4, 1 << 20), latents.format(9, 4), latents.format(4, 8)):
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": "/v1/vae/decode", "raw_path": b"/v1/vae/decode", "query_string": query.encode(), "root_path": "",
            "headers": [(b"host", b"localhost"), (b"content-type", b"tensor/binary"), (b"content-length", b"256")],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
        }  # fmt: skip
        asyncio.run(app(scope, receive, send))
    assert [message["status"] for message in sent if message["type"] == "http.response.start"] == [422] * 3


def test_the_deployments_bounds_hold(engine: FakeEngine) -> None:
    bounds = BoundsSection(width=64, pixels=2048, outputs=2, images=1)
    app = create_app(engine, ServeSection(bounds=bounds), version="1")
    with TestClient(app, LOCAL) as client:
        assert "width of 128" in refused(decode(client, shape=[1, 4, 1, 16]), 422, "shape")
        assert "pixels of 4096" in refused(decode(client, shape=[1, 4, 8, 8]), 422, "shape")
        assert "batch of 3" in refused(decode(client, shape=[3, 4, 4, 4], output_type="pt"), 422, "shape")
        tensor = {"shape": [2, 3, 32, 32], "dtype": "float32"}
        answer = client.post("/v1/vae/encode", content=bytes(2 * 3 * 32 * 32 * 4), params=tensor)
        assert "batch of 2" in refused(answer, 422, "shape")
        large = client.post("/v1/vae/encode", content=png(64, 64))
        assert "pixels of 4096" in refused(large, 422, "shape")


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_what_a_form_could_send_is_no_tensor(client: TestClient, kind: str) -> None:
    refused(decode(client, headers={"Content-Type": kind}), 415, "content-type")
    if kind:
        refused(client.post("/v1/vae/encode", content=png(), headers={"Content-Type": kind}), 415, "content-type")


def png(width: int = 16, height: int = 24) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def test_pictures_and_pixels_are_encoded(client: TestClient, engine: FakeEngine) -> None:
    tensors(engine)
    answer = client.post("/v1/vae/encode", content=png(17, 24), params={"scaling_factor": 2.0, "shift_factor": 0.5})
    assert answer.status_code == 200, answer.text
    pixels = {"shape": [1, 3, 8, 8], "dtype": "float16"}
    assert client.post("/v1/vae/encode", content=bytes(384), params=pixels).status_code == 200
    (first, data, options), (second, _, _) = engine.vae_calls
    assert first == VaeCall("vae.encode", (1, 24, 16, 3), "uint8", VaeOptions(2.0, 0.5))
    assert len(data) == first.bytes and options["encoding"] == Encoding(format="safetensors")
    assert second == VaeCall("vae.encode", (1, 3, 8, 8), "float16", VaeOptions())


def test_what_cannot_be_encoded_is_refused(client: TestClient, engine: FakeEngine) -> None:
    assert client.post("/v1/vae/encode", content=b"no picture").json()["error"]["code"] == "invalid_media"
    refused(client.post("/v1/vae/encode", content=png(7, 24)), 422, "image")
    refused(client.post("/v1/vae/encode", content=png(), params={"dtype": "float32"}), 422, "shape")
    refused(client.post("/v1/vae/encode", content=png(), params={"shape": [1, 3, 8, 8]}), 422, "dtype")
    odd = {"shape": [1, 3, 8, 9], "dtype": "uint8"}
    refused(client.post("/v1/vae/encode", content=bytes(216), params=odd), 422, "shape")
    assert not engine.vae_calls


def test_models_without_a_vae_say_so(client: TestClient, engine: FakeEngine) -> None:
    engine.topology = TOPOLOGY
    for answer in (decode(client), client.post("/v1/vae/encode", content=png())):
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported")


def test_only_the_stage_that_is_needed_must_have_a_worker(client: TestClient, engine: FakeEngine) -> None:
    engine.missing = ("denoise",)
    assert decode(client).status_code == 200
    engine.missing = ("decode",)
    answer = decode(client)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_worker")
    assert "retry-after" in answer.headers


@pytest.mark.parametrize(("code", "status"), [("invalid_request", 422), ("unsupported", 400), ("stage_failed", 500)])
def test_a_call_that_fails_says_why(client: TestClient, engine: FakeEngine, code: str, status: int) -> None:
    engine.vae_made = Failure(stage="decode", worker="w", code=code, message="it is so", field="body")
    answer = decode(client)
    assert (answer.status_code, answer.json()["error"]) == (
        status, {"code": code, "message": "it is so", "field": "body"},
    )  # fmt: skip


@pytest.mark.parametrize("ends", ["made", "failed", "expired"])
def test_nothing_is_kept_of_a_call(client: TestClient, engine: FakeEngine, tmp_path: Path, ends: str) -> None:
    path = tmp_path / "0.safetensors"
    path.write_bytes(safetensors([1 << 20], "BF16", bytes(1 << 21)))
    engine.vae_made = File(path, media_type="application/x-safetensors")
    if ends == "failed":
        engine.vae_made = Failure(stage="decode", worker="w", code="stage_failed", message="it is so")
    elif ends == "expired":
        path.unlink()
    answer = decode(client, output_type="pt")
    assert answer.status_code == {"made": 200, "failed": 500, "expired": 410}[ends]
    app: Any = client.app
    until(lambda: not engine.views and not engine.files)
    assert not app.state.front.follower._tracks


def test_nothing_is_kept_for_a_client_that_hangs_up(engine: FakeEngine) -> None:
    engine.vae_made = None
    app, begun = create_app(engine, ServeSection(), version="1"), asyncio.Event()

    async def receive() -> dict[str, Any]:
        if not begun.is_set():
            begun.set()
            return {"type": "http.request", "body": BYTES}
        while not engine.views:
            await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    async def hang_up() -> None:
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": "/v1/vae/decode", "raw_path": b"/v1/vae/decode", "root_path": "",
            "query_string": b"shape=1&shape=4&shape=4&shape=4&dtype=float32",
            "headers": [(b"host", b"localhost"), (b"content-type", b"tensor/binary")],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
        }  # fmt: skip
        await asyncio.wait_for(app(scope, receive, send), 10)

    asyncio.run(hang_up())
    until(lambda: bool(engine.vae_calls) and not engine.views)


def test_the_page_of_the_api_shows_both_calls(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for call in ("decode", "encode"):
        operation = paths[f"/v1/vae/{call}"]["post"]
        assert "tensor/binary" in operation["requestBody"]["content"]
        assert "shape" in operation["responses"]["200"]["headers"]

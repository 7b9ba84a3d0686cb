"""OpenAI's picture routes on an engine without a model: fields, replies, streams and errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.server.conftest import LOCAL
from tests.server.fake import TOPOLOGY, FakeEngine, File
from triptych.cluster.jobs import Failure
from triptych.config import ServeSection
from triptych.errors import InvalidRequest, QueueFull
from triptych.messages import Picture, Stepped
from triptych.server import create_app

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


def picture(color: str | tuple[int, int, int] = "red", size: tuple[int, int] = (8, 8), format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, format)
    return file.getvalue()


def stepped(job: str, step: int, steps: int) -> Stepped:
    shown = Picture(width=2, height=2, pixels=bytes([step] * 12))
    return Stepped(job=job, stage="denoise", attempt=1, step=step, steps=steps, seconds=0.1, preview=shown)


@dataclass
class Worked(FakeEngine):
    """An engine whose jobs are done, after some steps, as soon as somebody watches them."""

    steps: int = 0
    pause: float = 0.02
    """before each step, so that whoever listens has read the one before"""
    end: Callable[[Worked, str], None] = lambda engine, job: engine.put(job, "done", ended=9.0)
    seen: list[str] = field(default_factory=list)

    def watch(self, job: str, watcher: Callable[[Any], None]) -> Callable[[], None]:
        unwatch = super().watch(job, watcher)
        if job not in self.seen:
            self.seen.append(job)
            threading.Thread(target=self._work, args=[job]).start()
        return unwatch

    def _work(self, job: str) -> None:
        request, _ = self.submitted[-1]
        time.sleep(0.1)  # so that somebody listens
        for step in range(1, self.steps + 1):
            time.sleep(self.pause)
            self.tell(job, stepped(job, step, self.steps))
        time.sleep(self.pause)
        kind = request.output_format or "png"
        made = picture(format=kind)
        self.files[job] = [File(data=made, media_type=f"image/{kind}")] * request.num_outputs
        self.end(self, job)


@pytest.fixture
def engine() -> Worked:
    return Worked()


@pytest.fixture
def client(engine: Worked) -> Iterator[TestClient]:
    app = create_app(engine, ServeSection(max_body=100_000), version="1")
    with TestClient(app, LOCAL, raise_server_exceptions=False) as client:
        yield client


def refused(answer: Any, status: int, code: str, param: str | None) -> str:
    """The message of an error in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    return error["message"]


def test_pictures_come_in_base64_with_what_was_in_vain(client: TestClient, engine: Worked) -> None:
    answer = client.post(
        GENERATIONS,
        json={"prompt": "a cat", "model": "toy", "n": 2, "size": "64x32", "quality": "high", "style": "vivid",
              "user": "u1", "output_format": "webp", "background": "auto", "seed": 5, "guidance_scale": 2,
              "negative_prompt": "dogs", "num_inference_steps": 3, "extra": {"a": 1}, "priority": 3,
              "moderation": "auto"},
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    reply = answer.json()
    request, options = engine.submitted[0]
    assert (request.prompt, request.num_outputs, request.width, request.height) == ("a cat", 2, 64, 32)
    assert (request.seed, request.guidance_scale, request.negative_prompt) == (5, 2.0, "dogs")
    assert (request.num_inference_steps, request.extra, request.output_format) == (3, {"a": 1}, "webp")
    assert (options["preview"], options["priority"]) == (False, 3)
    files = [base64.b64decode(one["b64_json"]) for one in reply["data"]]
    assert files == [picture(format="webp")] * 2
    assert (reply["created"], reply["output_format"], reply["size"]) == (9, "webp", "64x32")
    in_vain = [f"{name} is accepted and has no effect here" for name in ("quality", "style", "user")]
    assert reply["warnings"] == ["a word it was never taught", *in_vain]


def test_a_url_leads_to_the_picture(client: TestClient) -> None:
    reply = client.post(GENERATIONS, json={"prompt": "a cat", "response_format": "url", "size": "auto"}).json()
    (item,) = reply["data"]
    assert item == {"url": f"{LOCAL}/v1/jobs/job1/results/0"} and reply["size"] == "8x8"
    assert client.get(item["url"]).content == picture()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "n": 65}, "n"),
        ({"prompt": "a", "n": 17}, "n"),
        ({"prompt": "a", "n": "2"}, "n"),
        ({"prompt": "a", "size": "big"}, "size"),
        ({"prompt": "a", "size": "64x"}, "size"),
        ({"prompt": "a", "size": "0x64"}, "size"),
        ({"prompt": "a", "size": "64x64\n"}, "size"),
        ({"prompt": "a", "size": "99999x64"}, "size"),
        ({"prompt": "a", "size": "64x64", "width": 64}, "size"),
        ({"prompt": "a", "size": "64x64", "aspect_ratio": "1:1"}, "size"),
        ({"prompt": "a", "output_format": "gif"}, "output_format"),
        ({"prompt": "a", "output_format": "mp4"}, "output_format"),
        ({"prompt": "a", "background": "transparent"}, "background"),
        ({"prompt": "a", "partial_images": 4, "stream": True}, "partial_images"),
        ({"prompt": "a", "partial_images": 2}, "partial_images"),
        ({"prompt": "a", "partial_images": 2, "stream": True, "n": 2}, "partial_images"),
        ({"prompt": "a", "stream": True, "response_format": "url"}, "response_format"),
        ({"prompt": "a", "response_format": "file"}, "response_format"),
        ({"prompt": "a", "num_outputs": 2}, "num_outputs"),
        ({"prompt": "a", "images": []}, "images"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "sigmas": [1.0], "num_inference_steps": 2}, "sigmas"),
    ],
)
def test_a_wrong_field_is_400_and_named(client: TestClient, engine: Worked, fields: Any, param: str) -> None:
    message = refused(client.post(GENERATIONS, json=fields), 400, "invalid_request", param)
    assert message.startswith(f"{param}: given") and "allowed" in message
    assert not engine.submitted


def test_what_the_model_refuses_is_named_in_openais_words(client: TestClient, engine: Worked) -> None:
    engine.refuse = InvalidRequest.of("width", 70, "multiples of 8, such as 72")
    body = {"prompt": "a", "size": "70x64"}
    assert refused(client.post(GENERATIONS, json=body), 400, "invalid_request", "size").startswith("size: given 70")
    engine.refuse = InvalidRequest.of("num_outputs", 2, "1 (this model makes one at a time)")
    refused(client.post(GENERATIONS, json={"prompt": "a", "n": 2}), 400, "invalid_request", "n")
    engine.refuse = QueueFull("256 jobs wait", retry_after=3)
    answer = client.post(GENERATIONS, json={"prompt": "a"})
    refused(answer, 429, "queue_full", None)
    assert (answer.json()["error"]["type"], answer.headers["retry-after"]) == ("rate_limit_error", "3")


def test_another_model_is_404(client: TestClient) -> None:
    message = refused(
        client.post(GENERATIONS, json={"prompt": "a", "model": "dall-e-3"}), 404, "model_not_found", "model"
    )
    assert "dall-e-3" in message and "toy" in message
    refused(client.get("/v1/models/dall-e-3"), 404, "model_not_found", "model")
    refused(client.get("/v1/images"), 404, "not_found", None)
    refused(client.get(GENERATIONS), 405, "method_not_allowed", None)


def test_the_model_is_told(client: TestClient) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("toy", "model", "triptych")
    assert client.get("/v1/models/toy").json() == model


def test_a_model_of_clips_makes_no_pictures(client: TestClient, engine: Worked) -> None:
    engine.topology = type(TOPOLOGY)(**{**vars(TOPOLOGY), "makes": "video"})
    message = refused(client.post(GENERATIONS, json={"prompt": "a"}), 400, "unsupported", "model")
    assert "/v1/videos" in message


@pytest.mark.parametrize(
    ("state", "failure", "status", "code"),
    [
        ("failed", Failure(stage="denoise", worker="w", code="stage_failed", message="it broke"), 500, "stage_failed"),
        ("failed", Failure(stage="denoise", worker="w", code="stage_failed", message="NaN", original="NonFinite"), 400,
         "not_finite"),
        ("failed", Failure(stage=None, worker="", code="deadline", message="too late"), 504, "deadline"),
        ("failed", Failure(stage="decode", worker="w", code="unsupported", message="cannot"), 400, "unsupported"),
        ("cancelled", None, 409, "cancelled"),
    ],
)  # fmt: skip
def test_a_job_that_ends_badly_says_why(
    client: TestClient, engine: Worked, state: Any, failure: Failure | None, status: int, code: str
) -> None:
    engine.end = lambda engine, job: engine.put(job, state, ended=9.0, failures=[failure] if failure else [])
    answer = client.post(GENERATIONS, json={"prompt": "a"})
    refused(answer, status, code, None)
    assert (answer.headers.get("x-should-retry") == "false") == (status in (409, 500, 504))
    (event,) = events(client.post(GENERATIONS, json={"prompt": "a", "stream": True}))
    assert event[0] == "error" and event[1]["error"]["code"] == code


def events(answer: Any) -> list[tuple[str, dict[str, Any]]]:
    """The events of a stream that has ended."""
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream"), answer.text
    found = []
    for block in answer.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


@pytest.mark.parametrize(
    ("steps", "count", "shown"),
    [(8, 3, [3, 6, 8]), (8, 1, [8]), (8, 2, [4, 8]), (2, 3, [1, 2]), (1, 3, [1]), (4, 0, [])],
)
def test_previews_are_spread_over_the_steps(
    client: TestClient, engine: Worked, steps: int, count: int, shown: list[int]
) -> None:
    engine.steps = steps
    body = {"prompt": "a", "stream": True, "partial_images": count, "size": "16x24", "quality": "low"}
    *partial, (name, last) = events(client.post(GENERATIONS, json=body))
    assert engine.submitted[0][1]["preview"] == (count > 0)
    assert [one["type"] for _, one in partial] == ["image_generation.partial_image"] * len(shown)
    assert [one["partial_image_index"] for _, one in partial] == list(range(len(shown)))
    for step, (_, one) in zip(shown, partial, strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))
        assert (image.size, image.format, image.getpixel((3, 3))) == ((16, 24), "PNG", (step, step, step))
        assert (one["size"], one["output_format"]) == ("16x24", "png")
    assert (name, last["type"]) == ("image_generation.completed", "image_generation.completed")
    assert base64.b64decode(last["b64_json"]) == picture()
    assert last["warnings"][-1] == "quality is accepted and has no effect here" and last["created_at"] == 9


def test_the_last_preview_is_shown_though_the_job_has_ended_meanwhile(client: TestClient, engine: Worked) -> None:
    engine.steps, engine.pause = 8, 0.0
    body = {"prompt": "a", "stream": True, "partial_images": 3}
    *partial, last = events(client.post(GENERATIONS, json=body))
    assert partial and last[0] == "image_generation.completed"
    shown = Image.open(io.BytesIO(base64.b64decode(partial[-1][1]["b64_json"])))
    assert shown.getpixel((0, 0)) == (8, 8, 8)


def test_a_stream_may_hold_several_pictures(client: TestClient) -> None:
    found = events(client.post(GENERATIONS, json={"prompt": "a", "stream": True, "n": 3}))
    assert [name for name, _ in found] == ["image_generation.completed"] * 3


def test_edits_take_files_and_text(client: TestClient, engine: Worked) -> None:
    fields = {"prompt": "a hat", "n": "2", "size": "64x64", "guidance_scale": "1.5", "exact": "true",
              "sigmas[]": ["1", "0.5"], "extra[a]": "3", "extra[b]": "word", "input_fidelity": "high"}  # fmt: skip
    red, blue = picture("red"), picture("blue", format="JPEG")
    files = [("image[]", ("../x.png", red, "image/png")), ("image[]", ("y", blue)), ("mask", ("m", picture("white")))]
    answer = client.post(EDITS, data=fields, files=files)
    assert answer.status_code == 200, answer.text
    request, options = engine.submitted[0]
    assert (request.prompt, request.num_outputs, request.guidance_scale) == ("a hat", 2, 1.5)
    assert (request.sigmas, request.extra, options["exact"]) == ((1.0, 0.5), {"a": 3, "b": "word"}, True)
    assert [image.tobytes()[0] > 200 for image in request.images] == [True, False]
    assert request.mask is not None and request.mask.getpixel((0, 0)) == 255
    assert "input_fidelity is accepted and has no effect here" in answer.json()["warnings"]


def test_edits_stream_under_their_own_name(client: TestClient, engine: Worked) -> None:
    engine.steps = 2
    fields = {"prompt": "a hat", "stream": "true", "partial_images": "1"}
    found = events(client.post(EDITS, data=fields, files={"image": picture()}))
    assert [name for name, _ in found] == ["image_edit.partial_image", "image_edit.completed"]
    assert found[0][1]["size"] == "2x2", "nothing tells how large the picture will be"


def test_where_a_mask_is_transparent_is_painted_anew(client: TestClient, engine: Worked) -> None:
    hole = Image.new("RGBA", (8, 8), (255, 255, 255, 255))
    hole.paste((0, 0, 0, 0), (0, 0, 4, 8))
    file = io.BytesIO()
    hole.save(file, "PNG")
    answer = client.post(EDITS, data={"prompt": "a"}, files={"image": picture(), "mask": file.getvalue()})
    assert answer.status_code == 200, answer.text
    mask = engine.submitted[0][0].mask
    assert mask is not None and (mask.getpixel((1, 1)), mask.getpixel((6, 6))) == (255, 0)


@pytest.mark.parametrize(
    ("fields", "files", "code", "param"),
    [
        ({"prompt": "a"}, {"other": b"x"}, "invalid_request", "other"),
        ({"prompt": "a"}, {"mask": picture()}, "invalid_request", "image"),
        ({}, {"image": picture()}, "invalid_request", "prompt"),
        ({"prompt": ["a", "b"]}, {"image": picture()}, "invalid_request", "prompt"),
        ({"prompt": "a", "n": "two"}, {"image": picture()}, "invalid_request", "n"),
        ({"prompt": "a", "n": "1.5"}, {"image": picture()}, "invalid_request", "n"),
        ({"prompt": "a", "stream": "maybe"}, {"image": picture()}, "invalid_request", "stream"),
        ({"prompt": "a", "extra": "1", "extra[a]": "1"}, {"image": picture()}, "invalid_request", "extra"),
        ({"prompt": "a", "seed[a]": "1"}, {"image": picture()}, "invalid_request", "seed"),
        ({"prompt": "a"}, {"image": b"GIF89a"}, "invalid_media", "image[0]"),
        ({"prompt": "a"}, {"image": b""}, "invalid_media", "image[0]"),
        ({"prompt": "a"}, {"image": (None, "/etc/passwd")}, "invalid_request", "image[0]"),
        ({"prompt": "a"}, {"image": (None, "http://127.0.0.1/x.png")}, "invalid_request", "image[0]"),
        ({"prompt": "a"}, {"image": picture(), "mask": b"no mask"}, "invalid_media", "mask"),
        ({"prompt": "a"}, [("image", picture())] * 17, "invalid_request", "image"),
        ({"prompt": "a"}, [("image", picture()), ("mask", picture()), ("mask", picture())], "invalid_request", "mask"),
    ],
)
def test_a_wrong_edit_is_400_and_named(
    client: TestClient, engine: Worked, fields: Any, files: Any, code: str, param: str
) -> None:
    answer = client.post(EDITS, data=fields, files=files)
    refused(answer, 400, code, param)
    assert not engine.submitted


def test_a_model_that_takes_no_picture_says_so(client: TestClient, engine: Worked) -> None:
    engine.refuse = InvalidRequest.of("images", "1 images", "none (text2image takes no image)")
    answer = client.post(EDITS, data={"prompt": "a"}, files={"image": picture()})
    assert "text2image takes no image" in refused(answer, 400, "invalid_request", "image")


@pytest.mark.parametrize("late", [0.1, 0.0], ids=["meanwhile", "at once"])
def test_a_client_that_hangs_up_in_a_stream_cancels_its_job(engine: Worked, late: float) -> None:
    engine.end = lambda engine, job: None
    app = create_app(engine, ServeSection(), version="1")

    async def call() -> None:
        body = json.dumps({"prompt": "a", "stream": True}).encode()
        parts: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]
        started = asyncio.Event()

        async def receive() -> Any:
            if parts:
                return parts.pop()
            if late:
                await started.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                asyncio.get_running_loop().call_later(late, started.set)

        scope = {
            "type": "http", "method": "POST", "path": GENERATIONS, "raw_path": GENERATIONS.encode(),
            "query_string": b"", "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
            "http_version": "1.1", "scheme": "http", "server": ("localhost", 80), "client": ("127.0.0.1", 1),
            "root_path": "",
        }  # fmt: skip
        await asyncio.wait_for(app(scope, receive, send), 10)

    asyncio.run(call())
    assert engine.views["job1"].record.state == "cancelled"

"""The `openai` package against real servers: pictures, streams with real previews, edits, clips, errors."""

from __future__ import annotations

import asyncio
import base64
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from PIL import Image

from tests.e2e.commands import PROMPT, SECONDS, Command, Server, short_folder, until
from tests.families.base import picture
from tests.families.modular import MODULAR

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

KEY = "any: the server has none"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The embedded model, in a process of its own beside the door."""
    with short_folder() as folder:
        server = Server(folder, "--threads", "1")
        yield server
        server.close()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=SECONDS) as client:
        yield client


@pytest.fixture(scope="module")
def serving() -> Iterator[Callable[..., OpenAI]]:
    """Serves a family of tiny models, and gives a client for it."""
    commands: list[Command] = []
    clients: list[OpenAI] = []
    with short_folder() as folder:

        def serve(family: str, *words: str) -> OpenAI:
            MODULAR[family].builder().save_pretrained(folder / family)
            command = Command(folder, "serve", family, "--device", "cpu", "--port", "0", "--threads", "1", *words)
            commands.append(command)
            url = command.line().removeprefix("ready: ")
            clients.append(OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=SECONDS))
            return clients[-1]

        yield serve
        for client in clients:
            client.close()
        for command in commands:
            command.close()


def image_of(found: Any) -> Image.Image:
    """The picture of an item of a reply, or of an event."""
    return Image.open(io.BytesIO(base64.b64decode(found.b64_json)))


def psnr(one: Image.Image, other: Image.Image) -> float:
    """How alike two pictures are, in decibels."""
    pair = [np.asarray(image.convert("RGB"), dtype=float) for image in (one, other)]
    return 10 * math.log10(255**2 / ((pair[0] - pair[1]) ** 2).mean())


def test_the_model_is_listed(client: OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.object) == ("emoji", "model")
    assert client.models.retrieve("emoji") == model
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("org/other")
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")


def test_pictures_are_those_of_the_native_route(client: OpenAI, server: Server) -> None:
    settings = {"seed": 7, "num_inference_steps": 4, "exact": True}
    reply = client.images.generate(
        model="emoji", prompt=PROMPT, n=2, size="32x64", quality="high", output_format="webp", user="me",
        extra_body=settings,
    )  # fmt: skip
    native = server.ended(server.submit(num_outputs=2, width=32, height=64, output_format="webp", **settings)["id"])
    wanted = [server.client.get(url).content for url in native["results"]]
    assert reply.data is not None and [base64.b64decode(one.b64_json or "") for one in reply.data] == wanted
    assert (reply.size, reply.output_format, reply.created) == (
        "32x64",
        "webp",
        pytest.approx(native["created"], abs=60),
    )
    assert [text.split()[0] for text in reply.model_extra["warnings"]] == ["quality", "user"]  # pyright: ignore[reportOptionalSubscript]


def test_a_url_leads_to_the_same_picture(client: OpenAI, server: Server) -> None:
    settings = {"seed": 7, "num_inference_steps": 2, "exact": True}
    here = client.images.generate(prompt=PROMPT, extra_body=settings)
    there = client.images.generate(prompt=PROMPT, response_format="url", extra_body=settings)
    assert here.data and there.data and there.data[0].url and there.data[0].url.startswith(server.url)
    assert httpx.get(there.data[0].url).content == base64.b64decode(here.data[0].b64_json or "")


def test_previews_come_closer_to_the_picture(client: OpenAI) -> None:
    # Prompts that leave open where and on what: there the picture is decided on the way.
    curves = []
    for seed, prompt in enumerate(("a cat", "a rocket left of a fox", "a small penguin, pink background")):
        settings = {"seed": seed, "exact": True}
        *partial, last = client.images.generate(
            prompt=prompt, stream=True, partial_images=3, size="64x64", extra_body=settings
        )
        assert [(one.type, getattr(one, "partial_image_index", None)) for one in partial] == [
            ("image_generation.partial_image", index) for index in range(3)
        ]
        assert last.type == "image_generation.completed"
        final = image_of(last)
        assert {image_of(one).size for one in partial} == {final.size} == {(64, 64)}
        curves.append([psnr(image_of(one), final) for one in partial])
        plain = client.images.generate(prompt=prompt, size="64x64", extra_body=settings)
        assert plain.data and image_of(plain.data[0]).tobytes() == final.tobytes(), "previews change nothing"
    assert all(first < second < third and third >= 15 for first, second, third in curves), curves


def test_asyncio_does_all_of_it_at_once(server: Server) -> None:
    async def call() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=SECONDS) as client:

            async def streamed() -> list[str]:
                stream = await client.images.generate(prompt="a cat", stream=True, partial_images=2)
                return [event.type async for event in stream]

            plain = [client.images.generate(prompt=f"a {word}") for word in ("tree", "star", "heart")]
            pictures, types = await asyncio.gather(asyncio.gather(*plain), streamed())
            assert len({one.data[0].b64_json for one in pictures if one.data}) == 3
            assert types == [f"image_generation.{kind}" for kind in ("partial_image", "partial_image", "completed")]

    asyncio.run(call())


def test_errors_are_openais(client: OpenAI) -> None:
    cases: list[tuple[dict[str, Any], str, str | None]] = [
        ({"size": "70x64"}, "invalid_request", "size"),
        ({"n": 17}, "invalid_request", "n"),
        ({"model": "dall-e-3"}, "model_not_found", "model"),
        ({"extra_body": {"steps": 3}}, "invalid_request", "steps"),
        ({"extra_body": {"sigmas": [1e308, 1e-308]}}, "not_finite", None),
    ]
    for given, code, param in cases:
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as raised:
            client.images.generate(prompt="a cat", **given)
        assert (raised.value.code, raised.value.param) == (code, param)
        assert raised.value.type == "invalid_request_error" and "Traceback" not in str(raised.value)
    with pytest.raises(openai.BadRequestError, match="text2image takes no image"):
        client.images.edit(image=_png(0), prompt="a hat")
    with pytest.raises(openai.BadRequestError, match="/v1/images/generations"):
        client.videos.create(prompt="a cat")


def test_who_hangs_up_cancels_the_job(client: OpenAI, server: Server) -> None:
    def cancelled() -> int:
        return server.cluster()["totals"]["cancelled"]

    before = cancelled()
    stream = client.images.generate(
        prompt="a cat", stream=True, partial_images=3, extra_body={"num_inference_steps": 150}
    )
    next(stream)
    stream.close()
    until(lambda: cancelled() == before + 1, server.cluster)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).images.generate(prompt="a cat", extra_body={"num_inference_steps": 900})
    until(lambda: cancelled() == before + 2, server.cluster)
    until(server.is_idle, server.cluster)


def _file(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _png(seed: int, size: int = 64) -> bytes:
    return _file(picture(seed, size, size))


def _url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.mark.slow
def test_edits_take_several_pictures(serving: Callable[..., OpenAI]) -> None:
    client = serving("qwen-image-edit-plus")
    pictures = {name: [_png(seed) for seed in seeds] for name, seeds in {"one": [0], "two": [0, 1]}.items()}
    made = {}
    for name, given in pictures.items():
        reply = client.images.edit(
            image=given if len(given) > 1 else given[0], prompt="make the sky red", size="64x64", output_format="jpeg",
            extra_body={"seed": 3, "num_inference_steps": 2, "negative_prompt": "bad quality", "exact": True},
        )  # fmt: skip
        assert reply.data and reply.size == "64x64"
        made[name] = image_of(reply.data[0])
        assert (made[name].size, made[name].format) == ((64, 64), "JPEG")
    assert made["one"].tobytes() != made["two"].tobytes()
    with pytest.raises(openai.BadRequestError, match="mask"):
        client.images.edit(image=_png(0), mask=_png(1), prompt="a hat")


@pytest.mark.slow
def test_a_masks_hole_is_painted_anew(serving: Callable[..., OpenAI]) -> None:
    client = serving("qwen-image", "--workflow", "inpaint")
    hole = picture(0).convert("RGBA")
    hole.paste((0, 0, 0, 0), (0, 0, 32, 64))
    settings = {"seed": 1, "num_inference_steps": 3, "exact": True}
    given: dict[str, Any] = {"image": _png(0), "mask": _file(hole), "prompt": "a cat", "size": "64x64"}
    reply = client.images.edit(**given, extra_body=settings)
    events = list(client.images.edit(**given, stream=True, partial_images=1, extra_body=settings))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert reply.data and image_of(events[-1]).tobytes() == image_of(reply.data[0]).tobytes()
    white = Image.new("L", (64, 64))
    white.paste(255, (0, 0, 32, 64))
    urls = {name: _url(data) for name, data in (("image", _png(0)), ("mask", _file(white)))}
    url, fields = str(client.base_url.join("/v1/jobs")), {"prompt": "a cat", "width": 64, "height": 64, **settings}
    job = httpx.post(url, json={**fields, "images": [urls["image"]], "mask": urls["mask"]}).raise_for_status().json()
    until(
        lambda: httpx.get(f"{url}/{job['id']}").json()["state"] == "done", lambda: httpx.get(f"{url}/{job['id']}").text
    )
    assert httpx.get(f"{url}/{job['id']}/results/0").content == base64.b64decode(reply.data[0].b64_json or "")


def test_a_clip_from_its_order_to_its_end(serving: Callable[..., OpenAI], tmp_path: Path) -> None:
    client = serving("wan-t2v")
    settings = {"num_inference_steps": 2, "fps": 16, "seed": 5}
    video = client.videos.create(prompt="a cat walks", size="32x32", seconds="1", extra_body=settings)  # pyright: ignore[reportArgumentType]
    assert (video.object, video.model, video.prompt) == ("video", "wan-t2v", "a cat walks")
    assert (video.seconds, video.size) == ("1.0625", "32x32") and video.status in ("queued", "in_progress")
    done = client.videos.poll(video.id, poll_interval_ms=50)
    assert (done.status, done.progress, done.error) == ("completed", 100, None)
    assert done.completed_at is not None and done.completed_at >= done.created_at
    clip = client.videos.download_content(video.id)
    clip.write_to_file(tmp_path / "clip.mp4")
    assert _frames(tmp_path / "clip.mp4") == (17, 32, 32)
    url = f"{client.base_url}videos/{video.id}/content"
    part = httpx.get(url, headers={"Range": "bytes=4-7"})
    assert (part.status_code, part.content) == (206, b"ftyp") and part.headers["etag"]
    with pytest.raises(openai.BadRequestError, match="thumbnail"):
        client.videos.download_content(video.id, variant="thumbnail")
    others = [client.videos.create(prompt="a dog", size="32x32", seconds="1", extra_body=settings) for _ in range(2)]  # pyright: ignore[reportArgumentType]
    names = [video.id, *(one.id for one in others)]
    assert [one.id for one in client.videos.list(limit=2)] == names[::-1], "over several pages"
    assert [one.id for one in client.videos.list(limit=2, order="asc")] == names
    slow = client.videos.create(prompt="a cow", size="32x32", seconds="1", extra_body={"num_inference_steps": 900})  # pyright: ignore[reportArgumentType]
    deleted = client.videos.delete(slow.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (slow.id, True, "video.deleted")
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(slow.id)
    client.videos.delete(video.id)
    with pytest.raises(openai.NotFoundError):
        client.videos.download_content(video.id)
    with pytest.raises(openai.BadRequestError, match="/v1/videos"):
        client.images.generate(prompt="a cat")


@pytest.mark.slow
def test_a_clip_begins_with_a_picture(serving: Callable[..., OpenAI]) -> None:
    client = serving("wan-i2v")
    fields: dict[str, Any] = {
        "prompt": "a cat walks",
        "size": "32x32",
        "extra_body": {"num_inference_steps": 1, "num_frames": 5},
    }
    with pytest.raises(openai.BadRequestError) as raised:
        client.videos.create(**fields)
    assert raised.value.param == "input_reference"
    by_url = {**fields, "extra_body": {**fields["extra_body"], "input_reference": {"image_url": _url(_png(0, 32))}}}
    for given in ({**fields, "input_reference": _png(0, 32)}, by_url):
        video = client.videos.create(**given)
        assert client.videos.poll(video.id, poll_interval_ms=50).status == "completed"


def _frames(path: Path) -> tuple[int, int, int]:
    """A clip's frames, their width and height."""
    import av

    with av.open(str(path)) as container:
        frames = [frame for frame in container.decode(video=0)]
    return len(frames), frames[0].width, frames[0].height

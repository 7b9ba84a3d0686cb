"""Pictures as they come over HTTP: right, wrong, hostile; each is a clear 400 or a correct picture."""

from __future__ import annotations

import asyncio
import base64
import io
import random
import struct
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image, PngImagePlugin

from tests.server.conftest import LOCAL
from tests.server.fake import FakeEngine
from triptych.config import ServeSection
from triptych.decode import MAX_PIXELS
from triptych.errors import InvalidRequest, MediaError, QueueFull
from triptych.server import create_app
from triptych.server.intake import pictures as intake
from triptych.server.intake.darkroom import Darkroom
from triptych.server.intake.pictures import developed
from triptych.server.locks.keys import Caller

FILE = "file:" + "//"


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[TestClient]:
    with TestClient(create_app(engine, ServeSection(), version="1"), LOCAL, raise_server_exceptions=False) as client:
        yield client


def quarters() -> Image.Image:
    """Red, green, blue and white, clockwise from the upper left, 16 × 8."""
    image = Image.new("RGB", (16, 8), "white")
    for box, color in (((0, 0), "red"), ((8, 0), "lime"), ((8, 4), "blue")):
        image.paste(Image.new("RGB", (8, 4), color), box)
    return image


def file_of(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def sent(client: TestClient, *files: bytes | str, kind: str = "png", **fields: Any) -> Any:
    urls = [
        file if isinstance(file, str) else f"data:image/{kind};base64,{base64.b64encode(file).decode()}"
        for file in files
    ]
    return client.post("/v1/jobs", json={"prompt": "a", "images": urls, **fields})


def taken(client: TestClient, engine: FakeEngine, file: bytes, kind: str = "png") -> Image.Image:
    """The picture that the engine gets."""
    answer = sent(client, file, kind=kind)
    assert answer.status_code == 202, answer.text
    (image,) = engine.submitted[-1][0].images
    assert image.mode == "RGB"
    return image


def refused(answer: Any, field: str = "images[0]", status: int = 400) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["field"]) == ("invalid_media" if status == 400 else "invalid_request", field)
    return error["message"]


def corners(image: Image.Image) -> list[Any]:
    wide, high = image.width - 1, image.height - 1
    return [image.getpixel(at) for at in ((0, 0), (wide, 0), (wide, high), (0, high))]


RED, LIME, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, data: bytes, *others: bytes, depth: int = 8, color: int = 2) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(others) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


# --- pictures that are right


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "BMP", "AVIF", "JPEG"])
def test_formats(client: TestClient, engine: FakeEngine, format: str) -> None:
    options: dict[str, dict[str, Any]] = {
        "WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}, "AVIF": {"quality": 100},
    }  # fmt: skip
    image = taken(client, engine, file_of(quarters(), format, **options.get(format, {})))
    assert image.size == (16, 8)
    for found, wanted in zip(corners(image), (RED, LIME, BLUE, WHITE), strict=True):
        assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 12


@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation_is_applied_and_metadata_dropped(client: TestClient, engine: FakeEngine, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = turn, "where I live"
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "secret")
    image = taken(client, engine, file_of(quarters(), exif=exif, pnginfo=text, icc_profile=b"x" * 200, dpi=(72, 72)))
    assert image.info == {} and not image.getexif()
    rotate = {3: 180, 6: 270, 8: 90}
    if turn == 1 or turn in rotate:
        assert corners(image) == corners(quarters().rotate(rotate.get(turn, 0), expand=True))
    assert image.size == ((16, 8) if turn < 5 else (8, 16))


def test_sixteen_bits_palettes_inks_and_transparency(client: TestClient, engine: FakeEngine) -> None:
    levels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    image = taken(client, engine, file_of(Image.fromarray(levels)))
    assert [image.getpixel((x, 0)) for x in range(4)] == [(0,) * 3, (1,) * 3, (128,) * 3, (255,) * 3]
    row = b"\x00" + struct.pack(">6H", 65535, 0, 32768, 0, 65535, 0)
    deep = taken(client, engine, png_of(2, 1, zlib.compress(row), depth=16))
    assert deep.getpixel((0, 0)) == (255, 0, 128) and deep.getpixel((1, 0)) == (0, 255, 0)
    ink = taken(client, engine, file_of(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    red, green, blue = ink.getpixel((4, 4))  # pyright: ignore[reportGeneralTypeIssues]
    assert red > 240 and green < 15 and blue < 15
    assert corners(taken(client, engine, file_of(quarters().convert("P")))) == [RED, LIME, BLUE, WHITE]
    assert corners(taken(client, engine, file_of(Image.new("RGBA", (4, 4), (0, 0, 0, 0))))) == [WHITE] * 4
    assert corners(taken(client, engine, file_of(Image.new("1", (4, 4), 1)))) == [WHITE] * 4
    assert corners(taken(client, engine, file_of(Image.new("LA", (4, 4), (0, 0))))) == [WHITE] * 4


def test_what_a_file_is_counts_and_not_what_it_is_called(client: TestClient, engine: FakeEngine) -> None:
    assert corners(taken(client, engine, file_of(quarters(), "BMP"), kind="svg+xml")) == [RED, LIME, BLUE, WHITE]


@pytest.mark.parametrize("tail", ["zip", "html", "php", "png", "noise"])
def test_of_a_polyglot_only_the_picture_goes_in(client: TestClient, engine: FakeEngine, tail: str) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("evil.py", "import os")
    ends = {
        "zip": archive.getvalue(), "html": b"<script>alert(1)</script>", "php": b"<?php system($_GET[0]); ?>",
        "png": file_of(Image.new("RGB", (99, 99))), "noise": random.Random(7).randbytes(1000),
    }  # fmt: skip
    for format in ("PNG", "GIF", "BMP"):
        image = taken(client, engine, file_of(quarters(), format) + ends[tail])
        assert image.size == (16, 8) and corners(image) == [RED, LIME, BLUE, WHITE]
    before = file_of(quarters())
    hidden = before[:33] + chunk(b"tEXt", b"x\x00" + ends[tail]) + before[33:]
    assert corners(taken(client, engine, hidden)) == [RED, LIME, BLUE, WHITE]
    refused(sent(client, ends["zip"] + before))


# --- pictures that are wrong


def animated(format: str) -> bytes:
    return file_of(quarters(), format, save_all=True, append_images=[Image.new("RGB", (16, 8))], duration=100)


HUGE = zlib.compress(bytes(50_000_000), 9)
"""50 MB of nothing in 50 kB."""

WRONG: dict[str, bytes] = {
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "svg with a mark": b"\xef\xbb\xbf \n<SVG onload='alert(1)'/>",
    "svg with a prolog": b"<?xml version='1.0'?><!DOCTYPE x [<!ENTITY e SYSTEM 'x'>]><svg>&e;</svg>",
    "html": b"<html><body>no</body></html>",
    "pdf": b"%PDF-1.7\n",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n",
    "tiff": file_of(quarters(), "TIFF"),
    "ico": file_of(quarters(), "ICO"),
    "ppm": b"P6 1 1 255 aaa",
    "zip": b"PK\x03\x04" + bytes(100),
    "text": b"hello",
    "zeros": bytes(1000),
    "a png's first bytes": b"\x89PNG\r\n\x1a\n",
    "a jpeg's first bytes": b"\xff\xd8\xff",
    "a webp's first bytes": b"RIFF\x00\x00\x00\x00WEBP",
    "a gif's first bytes": b"GIF89a",
    "a bmp's first bytes": b"BM",
    "an avif's first bytes": b"\x00\x00\x00\x20ftypavif",
    "animated gif": animated("GIF"),
    "animated webp": animated("WEBP"),
    "animated png": animated("PNG"),
    "animated avif": animated("AVIF"),
    "a bomb of pixels": png_of(100_000, 100_000, zlib.compress(b"")),
    "a bomb of pixels, wide": png_of(2**31 - 1, 1, zlib.compress(b"")),
    "a bomb of pixels, bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 58, 0, 0, 54, 40, 60000, 60000, 1, 24, *[0] * 6),
    "a bomb of pixels, gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b";",
    "no pixels": png_of(0, 0, zlib.compress(b"")),
    "a bomb of text": png_of(1, 1, zlib.compress(bytes(4)), chunk(b"zTXt", b"x\x00\x00" + HUGE)),
    "a bomb of a profile": png_of(1, 1, zlib.compress(bytes(4)), chunk(b"iCCP", b"x\x00\x00" + HUGE)),
    "a wrong checksum": file_of(quarters()).replace(b"IHDR", b"IHDR", 1)[:-20] + bytes(20),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_pictures_are_400_and_cost_little(client: TestClient, engine: FakeEngine, name: str) -> None:
    began = time.monotonic()
    answer = sent(client, file_of(quarters()), WRONG[name])
    if answer.status_code == 202 and name.startswith("a bomb of"):  # skipped over, and the picture itself is right
        assert engine.submitted[-1][0].images[1].size == (1, 1)
    else:
        message = refused(answer, "images[1]")
        assert "Traceback" not in message and "\n" not in message and len(message) < 400
        assert not engine.submitted
    assert time.monotonic() - began < 3
    assert sent(client, file_of(quarters())).status_code == 202, "and all goes on"


def test_more_rows_than_announced_are_not_read(client: TestClient, engine: FakeEngine) -> None:
    image = taken(client, engine, png_of(1, 1, HUGE))
    assert image.size == (1, 1) and image.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP"])
def test_a_truncated_picture_is_refused_or_whole(client: TestClient, engine: FakeEngine, format: str) -> None:
    noise = Image.frombytes("RGB", (32, 32), random.Random(1).randbytes(3 * 32 * 32))
    whole = file_of(noise, format)
    wanted = list(taken(client, engine, whole).tobytes())
    codes = []
    for part in range(1, 40):
        answer = sent(client, whole[: len(whole) * part // 40])
        codes.append(answer.status_code)
        if answer.status_code != 400:
            assert answer.status_code == 202, answer.text
            found = list(engine.submitted[-1][0].images[0].tobytes())
            assert found == wanted, "half a picture was taken for a whole one"
    assert codes.count(400) >= 38


def test_damaged_bytes_never_do_harm(client: TestClient) -> None:
    chance = random.Random(5)
    for format in ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP"):
        whole = bytearray(file_of(quarters().resize((64, 64)), format))
        for _ in range(25):
            bad = bytearray(whole)
            for _ in range(chance.randint(1, 8)):
                bad[chance.randrange(len(bad))] = chance.randrange(256)
            assert sent(client, bytes(bad)).status_code in (202, 400)


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("data:image/png;base64,", 400),
        ("data:image/png;base64,====", 422),
        ("data:image/png;base64,AA AA", 422),
        ("data:image/png;base64,AAAA%3D", 422),
        ("data:image/png;base64,iVBORw0KGgo", 422),
        ("data:image/png,rawbytes", 422),
        ("data:text/html;base64,AAAA", 422),
        ("data:image/png;charset=utf-8;base64,AAAA", 422),
        (f"{FILE}/etc/passwd", 422),
        ("/etc/passwd", 422),
        ("../../etc/passwd", 422),
        ("ftp://127.0.0.1/a.png", 422),
        ("", 422),
    ],
)
def test_what_is_no_source_of_a_picture(client: TestClient, engine: FakeEngine, url: str, status: int) -> None:
    answer = sent(client, url)
    assert answer.status_code == status and answer.json()["error"]["field"].startswith("images")
    mask = sent(client, file_of(quarters()), mask=url)
    assert mask.status_code == status and mask.json()["error"]["field"] == "mask"
    assert not engine.submitted


# --- how many, and how much at once


NOBODY = Caller("", admin=True)


class Shared:
    """What pictures need of a Front."""

    def __init__(self, **bounds: int) -> None:
        self.settings = ServeSection.model_validate({"bounds": bounds})
        self.darkroom = Darkroom()
        self.fetcher = None


def read(front: Any, *files: bytes) -> Any:
    async def reading() -> Any:
        async with developed(front, NOBODY, files) as brought:
            return brought["images"]

    return asyncio.run(reading())


def test_the_number_of_pictures_is_bounded() -> None:
    file = file_of(quarters())
    assert len(read(Shared(images=2), file, file)) == 2
    with pytest.raises(InvalidRequest, match="given '3 pictures'; allowed: at most 2 here"):
        read(Shared(images=2), file, file, b"never looked at")


def test_all_pictures_of_a_request_share_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "MAX_PIXELS", 300)
    file = file_of(quarters())
    assert len(read(Shared(), file, file)) == 2
    with pytest.raises(MediaError, match="128 pixels more; allowed: at most 300 in all") as wrong:
        read(Shared(), file, file, file)
    assert wrong.value.field == "images[2]"


def test_decoding_leaves_the_loop_alone_and_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most, threads, lock = [0], [0], set(), threading.Lock()

    def slow(data: bytes, *, field: str) -> Image.Image:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            threads.add(threading.current_thread())
        time.sleep(0.1)
        with lock:
            inside[0] -= 1
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(intake, "read_image", slow)
    front: Any = Shared()
    file = file_of(quarters())

    async def many() -> None:
        await asyncio.gather(*(one() for _ in range(12)))

    async def one() -> None:
        async with developed(front, NOBODY, [file]):
            pass

    asyncio.run(many())
    assert most[0] == 4 and threading.current_thread() not in threads


def test_there_is_room_for_all_pictures_of_a_request_until_its_job_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is decoded counts for as long as it is held, and headers are looked at before anything is."""
    monkeypatch.setattr(intake, "_AT_LEAST", 1)
    front: Any = Shared()
    front.darkroom = Darkroom(400)  # quarters() has 128 pixels
    held, most, file = [0], [0], file_of(quarters())

    async def one(number: int) -> None:
        async with developed(front, NOBODY, [file] * number, file) as brought:
            assert len(brought["images"]) == number and brought["mask"].mode == "L"
            held[0] += 128 * (number + 1)
            most[0] = max(most[0], held[0])
            await asyncio.sleep(0.02)
            held[0] -= 128 * (number + 1)

    async def many() -> None:
        async with asyncio.timeout(10):
            await asyncio.gather(*(one(number) for number in (1, 2, 0, 1, 2, 2, 0)))

    asyncio.run(many())
    assert most[0] == 384 and held[0] == 0


def test_a_request_of_more_pixels_than_there_is_room_is_refused_before_any_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(intake, "MAX_PIXELS", 300)
    monkeypatch.setattr(intake, "read_image", None)
    file = file_of(quarters())
    with pytest.raises(MediaError, match="at most 300 in all"):
        read(Shared(), file, file, file)


def test_a_request_without_pictures_waits_for_none() -> None:
    async def scene() -> None:
        front: Any = Shared()
        async with front.darkroom.room(MAX_PIXELS), asyncio.timeout(1), developed(front, NOBODY, ()) as brought:
            assert brought == {"images": ()}

    asyncio.run(scene())


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/images/edits", "/generate", "/v1/tasks/image/"])
def test_every_route_lets_go_of_the_room_once_its_job_is_begun(path: str) -> None:
    """Also where it waits for the pictures, and where the job was refused."""
    engine = FakeEngine()
    app = create_app(engine, ServeSection(), version="1")
    room, free = app.state.front.darkroom, []
    submit = engine.submit

    def submitting(*arguments: Any, **options: Any) -> Any:
        free.append(room._free)
        engine.refuse = QueueFull("no")
        return submit(*arguments, **options)

    engine.submit = submitting
    url = f"data:image/png;base64,{base64.b64encode(file_of(quarters())).decode()}"
    bodies: dict[str, Any] = {
        "/v1/jobs": {"json": {"prompt": "a", "images": [url]}},
        "/v1/images/edits": {"data": {"prompt": "a"}, "files": {"image": file_of(quarters())}},
        "/generate": {"json": {"prompt": "a", "image_urls": [url]}},
        "/v1/tasks/image/": {"json": {"prompt": "a", "image_path": url}},
    }
    with TestClient(app, LOCAL) as client:
        assert client.post(path, **bodies[path]).status_code == 429
    assert free == [MAX_PIXELS - MAX_PIXELS // 4], "held while the job is begun"
    assert room._free == MAX_PIXELS


def test_the_darkroom_holds_only_so_many_pixels() -> None:
    async def scene() -> None:
        room, held, most, order = Darkroom(100), [0], [0], []

        async def develop(name: int, pixels: int) -> None:
            async with room.room(pixels):
                order.append(name)
                held[0] += min(pixels, 100)
                most[0] = max(most[0], held[0])
                await asyncio.sleep(0.001)
                held[0] -= min(pixels, 100)

        sizes = [40, 40, 40, 500, 10, 100, 1, 60, 30, 20]
        await asyncio.gather(*(develop(name, pixels) for name, pixels in enumerate(sizes)))
        assert order == list(range(10)), "in line, so that a large one is not passed for ever"
        assert most[0] == 100 and held[0] == 0

    asyncio.run(scene())


def test_who_leaves_the_line_leaves_nothing_behind() -> None:
    async def scene() -> None:
        room = Darkroom(10)

        async def develop(pixels: int) -> None:
            async with room.room(pixels):
                await asyncio.sleep(0.01)

        for at in range(4):
            tasks = [asyncio.create_task(develop(10)) for _ in range(4)]
            await asyncio.sleep(0.012 if at % 2 else 0)
            tasks[at].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        async with asyncio.timeout(1), room.room(10):
            pass
        first = asyncio.create_task(develop(10))
        await asyncio.sleep(0)
        second = asyncio.create_task(develop(10))
        await first
        second.cancel()  # its turn has come, and it does not know yet
        await asyncio.gather(second, return_exceptions=True)
        async with asyncio.timeout(1), room.room(10):
            pass

    asyncio.run(scene())


def test_a_picture_at_the_bound_is_read_and_one_beyond_is_not(client: TestClient, engine: FakeEngine) -> None:
    side = int(MAX_PIXELS**0.5)
    assert side * side == MAX_PIXELS
    row = b"\x00" * (1 + side // 8)
    image = taken(client, engine, png_of(side, side, zlib.compress(row * side, 9), depth=1, color=0))
    assert image.size == (side, side)
    beyond = png_of(side + 8, side, zlib.compress(b"", 9), depth=1, color=0)
    assert f"at most {MAX_PIXELS} pixels" in refused(sent(client, beyond))

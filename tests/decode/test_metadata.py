"""Settings written into files, and read back from files that may be anything."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from triptych.decode import (
    digest,
    encode_settings,
    read_settings,
    repeat_settings,
    settings_of,
    write_clip,
    write_image,
)
from triptych.decode.metadata import MAX_SETTINGS_BYTES, Settings
from triptych.errors import InvalidRequest, MediaError
from triptych.request import Clip, Request, Result

PROMPT = "a “red” apple, \0 null, emoji 🍎 and \\ slashes"


def result(model: str = "emoji", **fields: Any) -> Result:
    request = Request.parse(**{"prompt": PROMPT, "seed": 7, "guidance_scale": 4.1, **fields})
    return Result(job="1", model=model, workflow="text2image", request=request, outputs=(), times=())


def settings(**fields: Any) -> Settings:
    return settings_of(result(**fields), version="1.2.3", source="embedded")


def write(path: Path, text: str) -> Path:
    if path.suffix == ".mp4":
        write_clip(Clip(np.zeros((2, 16, 16, 3), np.uint8), 8.0), path, text)
    else:
        write_image(Image.new("RGB", (8, 8)), path, metadata=text)
    return path


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg", ".mp4"])
def test_what_is_written_is_read(suffix: str, tmp_path: Path) -> None:
    made = settings(sigmas=(1.0, 1 / 3), extra={"flag": True, "list": [1, 2.5, None]}, num_outputs=2)
    path = write(tmp_path / f"a{suffix}", encode_settings(made))
    read = read_settings(path)
    assert read == made
    assert (
        Request.parse(**read.request)
        == result(sigmas=(1.0, 1 / 3), extra={"flag": True, "list": [1, 2.5, None]}, num_outputs=2).request
    )


def test_pictures_are_digests_only() -> None:
    image = Image.new("RGB", (64, 64), "red")
    made = settings(images=(image,), mask=image.convert("L"))
    assert made.images == (digest(image),)
    assert made.mask == digest(image.convert("L"))
    assert set(made.request) == {"prompt", "seed", "guidance_scale", "num_outputs", "extra"}


def test_a_digest_tells_pixels_and_shape_apart() -> None:
    wide, high = Image.new("L", (4, 2)), Image.new("L", (2, 4))
    assert digest(wide) == digest(wide.copy())
    assert len({digest(wide), digest(high), digest(Image.new("L", (4, 2), 1))}) == 3


def test_a_folder_leaves_its_last_name_only() -> None:
    made = settings_of(result("someone/secret/my-model/"), version="1", source="folder")
    assert made.model == "my-model"
    assert "someone" not in encode_settings(made)


def test_extra_that_is_not_json_is_an_error() -> None:
    with pytest.raises(InvalidRequest, match=r"^extra: "):
        settings(extra={"thing": object()})
    with pytest.raises(InvalidRequest, match="finite"):
        settings(extra={"number": float("nan")})


def test_settings_too_large_are_an_error() -> None:
    with pytest.raises(InvalidRequest, match=rf"at most {MAX_SETTINGS_BYTES}"):
        encode_settings(settings(prompt="x" * MAX_SETTINGS_BYTES))
    nearly = settings(prompt="x" * (MAX_SETTINGS_BYTES - 1000))
    assert encode_settings(nearly)


@pytest.mark.parametrize("suffix", [".webp", ".jpg"])
def test_the_largest_settings_fit(suffix: str, tmp_path: Path) -> None:
    made = settings(prompt="x" * (MAX_SETTINGS_BYTES - 1000))
    assert read_settings(write(tmp_path / f"a{suffix}", encode_settings(made))) == made


def changed(**fields: Any) -> str:
    return json.dumps({**json.loads(encode_settings(settings())), **fields})


def with_request(**fields: Any) -> str:
    return changed(request={**settings().request, **fields})


HOSTILE = {
    "not json": "{",
    "not an object": "[]",
    "deep": "[" * 20_000,
    "a huge integer": '{"output": ' + "9" * 5000 + "}",
    "not a number": changed()[:-1] + ', "output": NaN}',
    "unknown key": changed(allow_remote_code=True),
    "missing key": json.dumps({"model": "emoji"}),
    "unknown source": changed(source="url"),
    "output out of range": changed(output=-1),
    "long model": changed(model="x" * 300),
    "unknown request field": with_request(device="cpu"),
    "pictures": with_request(images=["secret.png"]),
    "a mask": with_request(mask="secret.png"),
    "wrong type": with_request(num_inference_steps="many"),
    "wrong value": with_request(num_inference_steps=0),
    "too large": changed(model="x" * (MAX_SETTINGS_BYTES + 1)),
    "not ascii": changed() + " é",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_settings_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_image(Image.new("RGB", (8, 8)), path, metadata=HOSTILE[name])
    if name == "not ascii":  # allowed in a PNG's text, and read as such: the JSON is what is wrong
        with pytest.raises(MediaError, match="whose settings are not JSON"):
            read_settings(path)
        return
    with pytest.raises(MediaError) as caught:
        read_settings(path)
    assert str(caught.value).startswith("like: given ") and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def mp4(*boxes: bytes) -> bytes:
    """An MP4 whose boxes, each inside the one before, hold whatever is given last."""
    content = b""
    for kind in reversed(boxes):
        content = struct.pack(">I4s", 8 + len(content), kind) + content
    return struct.pack(">I4s8s", 16, b"ftyp", b"isom\0\0\2\0") + content


FILES = {
    "empty": b"",
    "text": b"hello",
    "no settings": b"",
    "mp4 without": mp4(b"moov", b"udta"),
    "mp4 box of size 0": mp4(b"moov") + struct.pack(">I4s", 0, b"moov"),
    "mp4 box too long": struct.pack(">I4s8s", 16, b"ftyp", b"isom\0\0\2\0") + struct.pack(">I4s", 2**31, b"moov"),
    "mp4 box too short": struct.pack(">I4s8s", 16, b"ftyp", b"isom\0\0\2\0") + struct.pack(">I4s", 3, b"moov"),
    "mp4 long box": struct.pack(">I4s8s", 16, b"ftyp", b"isom\0\0\2\0") + struct.pack(">I4sQ", 1, b"moov", 2**63),
}


@pytest.mark.parametrize("name", FILES)
def test_files_without_settings_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(FILES[name])
    if name == "no settings":
        write_image(Image.new("RGB", (8, 8)), path)
    with pytest.raises(MediaError, match=r"^like: given "):
        read_settings(path)


def test_a_text_bomb_is_refused(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_itxt("triptych", "x" * 50_000_000, zip=True)
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path, pnginfo=text)
    assert path.stat().st_size < 100_000
    with pytest.raises(MediaError, match=r"^like: given "):
        read_settings(path)


def test_overrides_replace_what_says_the_same() -> None:
    made = settings(width=64, height=32, num_inference_steps=9)
    assert repeat_settings(made, {})["width"] == 64
    assert "width" not in repeat_settings(made, {"aspect_ratio": "1:1"})
    assert repeat_settings(made, {"width": 96})["height"] == 32
    assert "num_inference_steps" not in repeat_settings(made, {"sigmas": (1.0,)})
    with_sigmas = settings(sigmas=(1.0, 0.5))
    assert "sigmas" not in repeat_settings(with_sigmas, {"num_inference_steps": 4})
    with_extra = settings(extra={"a": 1, "b": 2})
    assert repeat_settings(with_extra, {"extra": {"b": 3}})["extra"] == {"a": 1, "b": 3}

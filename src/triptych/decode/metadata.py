"""The settings a picture or clip was made with, written into its file and read back from files nobody vouches
for."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from triptych.decode import exif
from triptych.decode.media import MAX_BYTES, open_image, read_bytes
from triptych.errors import InvalidRequest, MediaError
from triptych.request import MAX_OUTPUTS, Request, Result

__all__ = [
    "MAX_SETTINGS_BYTES",
    "Settings",
    "digest",
    "encode_settings",
    "read_settings",
    "repeat_settings",
    "settings_of",
]

MAX_SETTINGS_BYTES = 60_000
"""Bytes of the settings' text: what one EXIF segment holds, so that they survive a change of the file's
format."""

_ALLOWED = "a PNG, WebP, JPEG or MP4 file that Triptych wrote with its settings"
_PICTURES = ("images", "mask")
SourceKind = Literal["embedded", "folder", "hub"]


class Settings(BaseModel):
    """What to run again to get the same output. Pictures the request used are here as digests only, and a
    model that came from a folder by its last name only: neither can be found from a file alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    triptych: str = Field(max_length=64)
    """The version that wrote it."""
    model: str = Field(min_length=1, max_length=256)
    source: SourceKind
    revision: str | None = Field(None, max_length=256)
    workflow: str = Field(max_length=64)
    dtype: str | None = Field(None, max_length=32)
    """The dtype that was asked for; None: the device's own."""
    output: int = Field(ge=0, lt=MAX_OUTPUTS * MAX_OUTPUTS)
    """Which of the request's outputs the file holds."""
    images: tuple[str, ...] = Field((), max_length=64)
    mask: str | None = None
    request: dict[str, Any]
    """The request's fields, pictures and unset ones left out."""


def settings_of(
    result: Result,
    *,
    version: str,
    source: SourceKind,
    revision: str | None = None,
    dtype: str | None = None,
    output: int = 0,
) -> Settings:
    """The settings of a result's `output`-th output, made by Triptych `version`. Raises InvalidRequest if
    `extra` holds more than JSON values."""
    request = result.request
    # The file itself says what its format is.
    fields = request.model_dump(exclude={*_PICTURES, "output_format"}, exclude_none=True)
    try:
        fields = json.loads(json.dumps(fields, allow_nan=False))
    except (TypeError, ValueError):
        allowed = "JSON values, finite, for settings to be written"
        raise InvalidRequest.of("extra", request.extra, allowed) from None
    if "width" in fields or "height" in fields:
        fields.pop("aspect_ratio", None)
    return Settings(
        triptych=version,
        model=os.path.basename(os.path.normpath(result.model)) if source == "folder" else result.model,
        source=source,
        revision=revision,
        workflow=result.workflow,
        dtype=dtype,
        output=output,
        images=tuple(digest(image) for image in request.images),
        mask=digest(request.mask) if request.mask else None,
        request=fields,
    )


def digest(image: Image.Image) -> str:
    """The SHA-256 of a picture's mode, size and pixels, as hexadecimal digits."""
    header = f"{image.mode} {image.width} {image.height}\n".encode()
    return hashlib.sha256(header + image.tobytes()).hexdigest()


def encode_settings(settings: Settings) -> str:
    """The settings as one line of ASCII JSON. Raises InvalidRequest if it exceeds MAX_SETTINGS_BYTES."""
    text = settings.model_dump_json(exclude_none=True, ensure_ascii=True)
    if len(text) > MAX_SETTINGS_BYTES:
        given = f"given settings of {len(text)} bytes"
        raise InvalidRequest(f"{given}; allowed: at most {MAX_SETTINGS_BYTES} in a file", field="metadata")
    return text


def read_settings(path: str | os.PathLike[str], *, field: str = "like") -> Settings:
    """The settings that a file of Triptych's carries; the file is treated as hostile.

    Every value is checked by Settings and Request, unknown keys are errors, and no path is ever taken from
    the file. Raises MediaError, naming `field`, if the file is not one that Triptych wrote settings into.
    """
    data, given = read_bytes(path, max_bytes=MAX_BYTES, field=field, allowed=_ALLOWED)
    text = _text_of(data, given, field)
    if text is None:
        raise _refuse(given, "a file without Triptych's settings", field)
    if len(text) > MAX_SETTINGS_BYTES:
        raise _refuse(given, f"settings of {len(text)} bytes", field)
    try:
        settings = Settings.model_validate(json.loads(text, parse_constant=_no_constant))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "settings"
        raise _refuse(given, f"whose settings are wrong at {name[:60]!r} ({first['msg']})", field) from None
    except (ValueError, RecursionError):
        raise _refuse(given, "whose settings are not JSON", field) from None
    pictures = sorted(set(_PICTURES) & settings.request.keys())
    if pictures:
        raise _refuse(given, f"whose settings are wrong at {pictures[0]!r} (pictures are digests)", field)
    try:
        Request.parse(**settings.request)
    except InvalidRequest as error:
        raise _refuse(given, f"whose settings are wrong at {error.field!r} ({error.message})", field) from None
    return settings


def repeat_settings(settings: Settings, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The request's fields with `overrides` in place of theirs, and without those that an override replaces
    in other words (a size for an aspect ratio, sigmas for a number of steps). `extra` is merged key by
    key."""
    fields = dict(settings.request)
    if "aspect_ratio" in overrides:
        fields.pop("width", None)
        fields.pop("height", None)
    elif "width" in overrides or "height" in overrides:
        fields.pop("aspect_ratio", None)
    if "sigmas" in overrides:
        fields.pop("num_inference_steps", None)
    elif "num_inference_steps" in overrides:
        fields.pop("sigmas", None)
    extra = {**fields.get("extra", {}), **overrides.get("extra", {})}
    return {**fields, **overrides, "extra": extra}


def _refuse(given: str, problem: str, field: str) -> MediaError:
    return MediaError(f"given {given}, {problem}; allowed: {_ALLOWED}", field=field)


def _no_constant(name: str) -> float:
    raise ValueError(name)


def _text_of(data: bytes, given: str, field: str) -> str | None:
    """The settings' text in a file's metadata; None if it has none."""
    if data[4:8] == b"ftyp" and data[8:12] not in (b"avif", b"avis"):
        raw = _mp4_comment(data)
    else:
        with open_image(data, given, field) as image:
            if image.format == "PNG":
                text = image.info.get("triptych")
                return str(text) if text is not None else None
            raw = exif.user_comment(image.info.get("exif", b""))
        raw = raw.removeprefix(b"ASCII\x00\x00\x00") if raw is not None else None
    try:
        return raw.decode("ascii") if raw is not None else None
    except UnicodeDecodeError:
        raise _refuse(given, "whose settings are not ASCII", field) from None


def _mp4_comment(data: bytes) -> bytes | None:
    """The comment of an MP4 file, found by walking its boxes: a demuxer would parse, and decode, far more."""
    start, end = 0, len(data)
    for kind in (b"moov", b"udta", b"meta", b"ilst", b"\xa9cmt", b"data"):
        # A meta box begins with a version; all others here with their first box.
        found = next((box for box in _boxes(data, start, end) if box[0] == kind), None)
        if found is None:
            return None
        start, end = found[1] + (4 if kind == b"meta" else 0), found[2]
    return data[start + 8 : end]


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The boxes between two offsets: kind, and where the content begins and ends. Stops at the first damaged
    one."""
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, start)
        head = 8
        if size == 1 and start + 16 <= end:
            (size,) = struct.unpack_from(">Q", data, start + 8)
            head = 16
        elif size == 0:
            size = end - start
        if size < head or start + size > end:
            return
        yield kind, start + head, start + size
        start += size

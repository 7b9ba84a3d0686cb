"""The bodies of OpenAI's routes: its own fields, and the native request's beside them (`extra_body` in its client)."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from triptych.errors import InvalidRequest, ModelNotFound
from triptych.model import Topology
from triptych.request import MAX_OUTPUTS, Request
from triptych.server.admission import Wanted
from triptych.server.intake.bodies import JOB_BODY

__all__ = ["EDIT", "IMAGE", "VIDEO", "ImageBody", "VideoBody", "in_their_words", "wanted", "warnings_of"]

DEFAULT_FPS = 16
MAX_SECONDS = 3600
SIZE = r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$"
SECONDS = r"^[0-9]{1,4}(\.[0-9]{1,6})?$"

_IGNORED = (
    "quality",
    "style",
    "moderation",
    "complexity",
    "output_compression",
    "input_fidelity",
    "user",
    "safety_identifier",
)
"""Accepted, since clients send them, and without effect here."""

_SETTINGS = (
    "negative_prompt",
    "width",
    "height",
    "aspect_ratio",
    "num_inference_steps",
    "guidance_scale",
    "shift",
    "sigmas",
    "seed",
    "strength",
    "max_sequence_length",
    "extra",
)
_CLIP_SETTINGS = ("num_frames", "fps")
_JOB = ("priority", "deadline", "exact")


class SharedBody(BaseModel):
    """What pictures and clips have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: str
    model: str | None = Field(None, description="this deployment's, if any")
    size: str | None = Field(None, json_schema_extra={"pattern": SIZE}, description="WIDTHxHEIGHT in pixels, or auto")
    quality: str | None = Field(None, description="without effect")
    user: str | None = Field(None, description="without effect")
    safety_identifier: str | None = Field(None, description="without effect")


class ImageBody(SharedBody):
    """The body of `POST /v1/images/generations`."""

    n: int | None = Field(None, ge=1, le=MAX_OUTPUTS, description="how many pictures")
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="url: the pictures stay here, for whoever has the same API key"
    )
    output_format: Literal["png", "webp", "jpeg"] | None = None
    stream: bool | None = Field(None, description="server-sent events instead of one reply")
    partial_images: int | None = Field(None, ge=0, le=3, description="previews in the stream")
    background: Literal["opaque", "auto"] | None = None
    style: str | None = Field(None, description="without effect")
    moderation: str | None = Field(None, description="without effect")
    complexity: str | None = Field(None, description="without effect")
    output_compression: int | None = Field(None, ge=0, le=100, description="without effect")


class EditBody(ImageBody):
    """The body of `POST /v1/images/edits`, without its pictures."""

    input_fidelity: str | None = Field(None, description="without effect")


class VideoBody(SharedBody):
    """The body of `POST /v1/videos`."""

    seconds: str | int | float | None = Field(
        None,
        json_schema_extra={"pattern": SECONDS, "exclusiveMinimum": 0, "maximum": MAX_SECONDS},
        description="how long, rounded to what the model can make",
    )
    input_reference: dict[Literal["image_url", "file_id"], str] | None = Field(
        None, description="the picture that the clip begins with: data:image/…;base64,…, a URL, or an upload's id"
    )


def _with_settings(body: Any, names: tuple[str, ...]) -> Any:
    """The body with the native request's fields, and with what concerns the job alone."""
    found = {
        **{name: Request.model_fields[name] for name in names},
        **{name: JOB_BODY.model_fields[name] for name in _JOB},
    }
    fields: dict[str, Any] = {name: (info.annotation, info) for name, info in found.items()}
    return create_model(body.__name__, __base__=body, **fields)


IMAGE: type[ImageBody] = _with_settings(ImageBody, _SETTINGS)
EDIT: type[EditBody] = _with_settings(EditBody, _SETTINGS)
VIDEO: type[VideoBody] = _with_settings(VideoBody, (*_SETTINGS, *_CLIP_SETTINGS))


def wanted(topology: Topology, body: SharedBody, *, preview: bool = False, **pictures: Any) -> Wanted:
    """The job that a body asks for. Raises ModelNotFound, or InvalidRequest naming the field."""
    if body.model is not None and body.model != topology.source.name:
        raise ModelNotFound(f"given {body.model[:80]!r}; allowed: {topology.source.name!r}", field="model")
    given = {name: getattr(body, name) for name in Request.model_fields if name in type(body).model_fields}
    given = {name: value for name, value in given.items() if value is not None}
    given |= pictures | _sides(body, given)
    if isinstance(body, ImageBody):
        given["num_outputs"] = body.n or 1
    if isinstance(body, VideoBody) and body.seconds is not None:
        given["num_frames"] = _frames(topology, body.seconds, given)
    job = {name: getattr(body, name) for name in _JOB}
    with in_their_words(body):
        return Wanted(Request.parse(**given), preview, **job)


def _sides(body: SharedBody, given: dict[str, Any]) -> dict[str, int]:
    if body.size is None or body.size == "auto":
        return {}
    if not re.fullmatch(SIZE, body.size):
        raise InvalidRequest.of("size", body.size, "auto, or WIDTHxHEIGHT in pixels, as 1024x1024")
    if given.keys() & {"width", "height", "aspect_ratio"}:
        raise InvalidRequest.of("size", body.size, "nothing beside width, height or aspect_ratio")
    width, _, height = body.size.partition("x")
    return {"width": int(width), "height": int(height)}


def _frames(topology: Topology, given: str | int | float, others: dict[str, Any]) -> int:
    """The number of frames nearest to so many seconds that the model can make."""
    if "num_frames" in others:
        raise InvalidRequest.of("seconds", given, "nothing beside num_frames")
    allowed = f"more than 0, at most {MAX_SECONDS}"
    try:
        seconds = float(given) if not isinstance(given, str) or re.fullmatch(SECONDS, given) else math.nan
    except OverflowError:
        seconds = math.nan
    if not 0 < seconds <= MAX_SECONDS:
        raise InvalidRequest.of("seconds", given, allowed)
    fps = others.get("fps") or topology.defaults.fps or DEFAULT_FPS
    scale = topology.temporal_scale or 1
    return max(0, round((seconds * fps - 1) / scale)) * scale + 1


@contextlib.contextmanager
def in_their_words(body: SharedBody) -> Iterator[None]:
    """An error that names a native field names the one that was given instead."""
    names = {"num_outputs": "n"}
    if isinstance(body, EditBody):
        names["images"] = "image"
    if body.size not in (None, "auto"):
        names |= {"width": "size", "height": "size"}
    if isinstance(body, VideoBody):
        names["images"] = "input_reference"
        if body.seconds is not None:
            names["num_frames"] = "seconds"
    try:
        yield
    except InvalidRequest as error:
        error.field = names.get(error.field or "", error.field)
        raise


def warnings_of(body: SharedBody, job: tuple[str, ...]) -> list[str]:
    """What a client should know of its request: the job's own warnings, and what it gave in vain."""
    given = [name for name in _IGNORED if getattr(body, name, None) not in (None, "auto")]
    return [*job, *(f"{name} is accepted and has no effect here" for name in given)]

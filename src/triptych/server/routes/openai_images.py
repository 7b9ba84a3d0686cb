"""OpenAI's API: pictures."""

from __future__ import annotations

import base64
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from triptych.errors import InvalidRequest, Unsupported
from triptych.server.admission import begin, finish
from triptych.server.door import JobView
from triptych.server.files import bytes_of, files_of
from triptych.server.front import Front, FrontOf, Who
from triptych.server.intake.bodies import checked, read_body
from triptych.server.intake.forms import form_fields, read_form
from triptych.server.intake.openai_bodies import EDIT, IMAGE, ImageBody, in_their_words, wanted, warnings_of
from triptych.server.intake.pictures import Source, developed
from triptych.server.locks.keys import Caller
from triptych.server.routes.openai_stream import EVENTS, picture_events, size_of
from triptych.server.routes.openai_words import one_file, openai_wrong, request_body, some_files

__all__ = ["router"]

router = APIRouter(prefix="/v1/images", tags=["openai"])

_REFUSALS = (400, 401, 404, 409, 413, 415, 429, 500, 503, 504)
_EXAMPLE = {"prompt": "a red apple on the left, blue background", "size": "64x64", "seed": 7}


class ImageItem(BaseModel):
    """A picture: its file in base64, or where to get it."""

    b64_json: str | None = None
    url: str | None = None


class ImagesReply(BaseModel):
    """What was made."""

    created: int = Field(description="seconds since the epoch")
    data: list[ImageItem]
    background: str = "opaque"
    output_format: str
    size: str = Field(description="WIDTHxHEIGHT in pixels")
    warnings: list[str] = Field(description="what was asked for in vain")

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "created": 1767225600,
                    "data": [{"b64_json": "iVBORw0KGgo="}],
                    "background": "opaque",
                    "output_format": "png",
                    "size": "64x64",
                    "warnings": ["quality is accepted and has no effect here"],
                }
            ]
        }
    )


_ANSWERS: dict[int | str, dict[str, Any]] = {200: {"model": ImagesReply, "content": EVENTS}, **openai_wrong(*_REFUSALS)}


@router.post("/generations", responses=_ANSWERS, response_class=Response, openapi_extra=request_body(IMAGE, _EXAMPLE))
async def generate(front: FrontOf, caller: Who, http: Request) -> Response:
    """Makes pictures from text. The native request's settings may be given beside OpenAI's own."""
    body = checked(IMAGE, await read_body(http, front.settings.max_body))
    job = await _begun(front, caller, body, {})
    return await _made(front, caller, http, body, "image_generation", job)


@router.post(
    "/edits",
    responses=_ANSWERS,
    response_class=Response,
    openapi_extra=request_body(
        EDIT,
        {**_EXAMPLE, "image": ["(a file)"]},
        files={
            "image": some_files("the pictures to work on; `image[]` is the same"),
            "mask": one_file("what is transparent in it is painted anew; without transparency: what is white"),
        },
        needed=("image",),
        json=False,
    ),
)
async def edit(front: FrontOf, caller: Who, http: Request) -> Response:
    """Makes pictures from pictures and text."""
    body, job = await _edited(front, caller, http)
    return await _made(front, caller, http, body, "image_edit", job)


async def _edited(front: Front, caller: Caller, http: Request) -> tuple[ImageBody, str]:
    """A form's fields without its pictures, and the job that it has begun."""
    form = await read_form(http, front.settings.max_body)
    given: list[Source] = [*form.pop("image", ()), *form.pop("image[]", ())]
    masks: list[Source] = [*form.pop("mask", ())]
    body = form_fields(EDIT, form, lists=("sigmas",))
    if not given:
        raise InvalidRequest.of("image", "none", "at least one picture")
    if len(masks) > 1:
        raise InvalidRequest.of("mask", f"{len(masks)} masks", "one")
    painted = masks[0] if masks else None
    async with developed(front, caller, given, painted, field="image", holes=True) as brought:
        return body, await _begun(front, caller, body, brought)


async def _begun(front: Front, caller: Caller, body: ImageBody, brought: dict[str, Any]) -> str:
    _check(front, body)
    asked = wanted(front.door.topology, body, preview=bool(body.partial_images), **brought)
    with in_their_words(body):
        return await begin(front, caller, asked)


async def _made(front: Front, caller: Caller, http: Request, body: ImageBody, event: str, job: str) -> Response:
    """Answers with what the job of a body makes: once it is there, or as it comes."""
    if body.stream:
        return await picture_events(front, caller, job, body, event)
    view = await finish(front, caller, job, http)
    return await front.slowly(_reply, front, view, body, str(http.base_url))


def _check(front: Front, body: ImageBody) -> None:
    """Raises Unsupported or InvalidRequest for what these routes cannot do, whatever the model."""
    if front.door.topology.makes != "image":
        raise Unsupported(f"{front.door.topology.source.name} makes clips: POST /v1/videos", field="model")
    if body.partial_images and not body.stream:
        raise InvalidRequest.of("partial_images", body.partial_images, "0 without stream")
    if body.partial_images and (body.n or 1) > 1:
        raise InvalidRequest.of("partial_images", body.partial_images, "0 for more than one picture")
    if body.stream and body.response_format == "url":
        raise InvalidRequest.of("response_format", "url", "b64_json in a stream")


def _reply(front: Front, view: JobView, body: ImageBody, base: str) -> Response:
    files, record = files_of(front.door, view), view.record
    first = bytes_of(files[0])
    if body.response_format == "url":
        items = [{"url": f"{base}v1/jobs/{record.spec.id}/results/{index}"} for index in range(len(files))]
    else:
        contents = [first, *(bytes_of(file) for file in files[1:])]
        items = [{"b64_json": base64.b64encode(data).decode()} for data in contents]
    width, height = size_of(view, first)
    reply = {
        "created": int(record.ended or record.submitted),
        "data": items,
        "background": "opaque",
        "output_format": files[0].media_type.removeprefix("image/"),
        "size": f"{width}x{height}",
        "warnings": warnings_of(body, record.spec.warnings),
    }
    return Response(msgspec.json.encode(reply), media_type="application/json")

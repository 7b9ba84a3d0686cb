"""OpenAI's API: clips, which are jobs."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from triptych.errors import InvalidRequest, Unsupported
from triptych.server.admission import begin, view_of
from triptych.server.door import Door, JobView
from triptych.server.errors import JobNotFound
from triptych.server.files import KnownTags, result_response
from triptych.server.front import Front, FrontOf, Who
from triptych.server.intake.bodies import checked, read_body
from triptych.server.intake.forms import FORM, form_fields, media_type, read_form
from triptych.server.intake.openai_bodies import VIDEO, VideoBody, in_their_words, wanted, warnings_of
from triptych.server.intake.pictures import Source, developed, picture_sources
from triptych.server.locks.keys import Caller
from triptych.server.routes.openai_words import one_file, openai_wrong, request_body
from triptych.server.views import FILE_RESPONSES

if TYPE_CHECKING:
    from triptych.cluster import JobRecord

__all__ = ["router"]

router = APIRouter(prefix="/v1/videos", tags=["openai"])

PAGE = 100
"""Clips of a page at most, and jobs that are read at a time to find them."""
LOOKED_AT = 1000
"""Jobs that are read for the oldest first: they are kept newest first."""

_EXAMPLE = {"prompt": "a red ball rolls to the right", "size": "64x64", "seconds": "1", "seed": 7}

_STATUSES = {"queued": "queued", "running": "in_progress", "done": "completed"}
"""OpenAI's words for a job's states; a cancelled one is `failed`, with an error that says so."""

VideoId = Annotated[str, Path(description="the clip's id, which is its job's too")]


class VideoError(BaseModel):
    """Why there is no clip."""

    code: str
    message: str


class VideoObject(BaseModel):
    """A clip, made or on its way. Times of day are seconds since the epoch."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(ge=0, le=100, description="percent")
    created_at: int
    completed_at: int | None
    prompt: str | None
    seconds: str = Field(description="how long the clip is")
    size: str | None = Field(description="WIDTHxHEIGHT in pixels; null where a picture decides")
    error: VideoError | None
    warnings: list[str] = Field(description="what was asked for in vain")

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "0b6a4f0e7c5d4f6c8e5a1b2c3d4e5f60",
                    "object": "video",
                    "model": "emoji-motion",
                    "status": "in_progress",
                    "progress": 40,
                    "created_at": 1767225600,
                    "completed_at": None,
                    "prompt": "a red ball rolls to the right",
                    "seconds": "1.0625",
                    "size": "64x64",
                    "error": None,
                    "warnings": [],
                }
            ]
        }
    )


class VideoPage(BaseModel):
    """Some of a caller's clips."""

    object: Literal["list"] = "list"
    data: list[VideoObject]
    first_id: str | None
    last_id: str | None
    has_more: bool

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}]
        }
    )


class VideoDeleted(BaseModel):
    """A clip that is no more."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"id": "0b6a4f0e7c5d4f6c8e5a1b2c3d4e5f60", "object": "video.deleted", "deleted": True}]
        }
    )


@router.post(
    "",
    response_model=VideoObject,
    responses=openai_wrong(400, 401, 404, 413, 415, 429, 503),
    openapi_extra=request_body(
        VIDEO, _EXAMPLE, files={"input_reference": one_file("the picture that the clip begins with")}
    ),
)
async def create(front: FrontOf, caller: Who, http: Request) -> VideoObject:
    """Begins a clip and answers at once; `GET /v1/videos/{id}` tells how it gets on."""
    if front.door.topology.makes != "video":
        raise Unsupported(
            f"{front.door.topology.source.name} makes pictures: POST /v1/images/generations", field="model"
        )
    body, given = await _body(front, caller, http)
    async with developed(front, caller, given, field="input_reference") as brought:
        asked = wanted(front.door.topology, body, **brought)
        with in_their_words(body):
            job = await begin(front, caller, asked)
    view = await run_in_threadpool(view_of, front, caller, job)
    return _video(front.door, view, warnings_of(body, view.record.spec.warnings))


async def _body(front: Front, caller: Caller, http: Request) -> tuple[VideoBody, list[Source]]:
    """A request's fields, and the picture that it brings."""
    limit = front.settings.max_body
    if media_type(http) != FORM:
        body = checked(VIDEO, await read_body(http, limit))
        return body, _referred(front, caller, body)
    form = await read_form(http, limit)
    given: list[Source] = [*form.pop("input_reference", ())]
    body = form_fields(VIDEO, form, lists=("sigmas",))
    if len(given) > 1 or (given and body.input_reference):
        raise InvalidRequest.of("input_reference", "more than one picture", "one")
    return body, given or _referred(front, caller, body)


def _referred(front: Front, caller: Caller, body: VideoBody) -> list[Source]:
    """The picture that a body names instead of bringing it."""
    reference = body.input_reference
    if reference is None:
        return []
    if len(reference) != 1:
        raise InvalidRequest.of("input_reference", ", ".join(sorted(reference)) or "nothing", "image_url or file_id")
    return picture_sources(front, caller, [*reference.values()], "input_reference")


@router.get("", response_model=VideoPage, responses=openai_wrong(400, 401))
def videos(
    front: FrontOf,
    caller: Who,
    after: Annotated[str | None, Query(description="the clip that the last page ended with")] = None,
    limit: Annotated[int, Query(ge=1, le=PAGE, description="clips of this page at most")] = 20,
    order: Annotated[
        Literal["asc", "desc"], Query(description=f"newest first; or oldest first, of the newest {LOOKED_AT} jobs")
    ] = "desc",
) -> VideoPage:
    """The caller's clips."""
    if after is not None:
        _check_mark(front, caller, after)
    door = front.door
    if order == "desc":
        clips = filter(_is_clip, _newest_first(door, caller, after))
        records = list(islice(clips, limit + 1))
    else:
        records = _oldest_first(islice(_newest_first(door, caller, None), LOOKED_AT), after, limit + 1)
    page = [_video(door, view) for record in records[:limit] if (view := door.view(record.spec.id)) is not None]
    return VideoPage(
        data=page,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=len(records) > limit,
    )


def _check_mark(front: Front, caller: Caller, after: str) -> None:
    try:
        view_of(front, caller, after)
    except JobNotFound:
        raise InvalidRequest.of("after", after, "the id of a clip that is there") from None


def _newest_first(door: Door, caller: Caller, before: str | None) -> Iterator[JobRecord]:
    """The caller's jobs, read page by page."""
    while found := door.jobs(client=caller.name, before=before, limit=PAGE):
        before = found[-1].spec.id
        yield from found


def _oldest_first(found: Iterator[JobRecord], after: str | None, count: int) -> list[JobRecord]:
    """The first clips of what newest first ends with: the store reads in that order alone."""
    last: deque[JobRecord] = deque(maxlen=count)
    for record in found:
        if record.spec.id == after:
            break
        if _is_clip(record):
            last.append(record)
    return list(last)[::-1]


def _is_clip(record: JobRecord) -> bool:
    spec = record.spec
    return spec.bare is None and spec.encoding is not None and spec.encoding.format == "mp4"


def _clip(front: Front, caller: Caller, video: str) -> JobView:
    """One of the caller's clips. Raises JobNotFound."""
    with contextlib.suppress(JobNotFound):
        view = view_of(front, caller, video)
        if _is_clip(view.record):
            return view
    raise JobNotFound("no such clip, or it has expired", field="video_id")


@router.get("/{video_id}", response_model=VideoObject, responses=openai_wrong(401, 404))
def look(video_id: VideoId, front: FrontOf, caller: Who) -> VideoObject:
    """How a clip gets on."""
    return _video(front.door, _clip(front, caller, video_id))


@router.delete("/{video_id}", response_model=VideoDeleted, responses=openai_wrong(401, 404))
def delete(video_id: VideoId, front: FrontOf, caller: Who) -> VideoDeleted:
    """Forgets a clip and its file; one that is still made is cancelled first."""
    _clip(front, caller, video_id)
    front.door.forget(video_id)
    front.follower.forget(video_id)
    return VideoDeleted(id=video_id)


@router.get(
    "/{video_id}/content",
    response_class=Response,
    responses={**FILE_RESPONSES, **openai_wrong(400, 401, 404, 409, 410)},
)
async def content(
    video_id: VideoId,
    front: FrontOf,
    caller: Who,
    variant: Annotated[str, Query(description="`video`, which is all that there is")] = "video",
    known: KnownTags = None,
) -> Response:
    """A finished clip's file; a part of it where a range is asked for."""
    view = await run_in_threadpool(_clip, front, caller, video_id)
    if variant != "video":
        raise InvalidRequest.of("variant", variant, "video (no thumbnails or sprite sheets are made)")
    return await front.slowly(result_response, front.door, view, 0, known)


def _video(door: Door, view: JobView, warnings: list[str] | None = None) -> VideoObject:
    record = view.record
    request: dict[str, Any] = record.spec.request
    sides = [request.get("width"), request.get("height")]
    prompt = request.get("prompt")
    return VideoObject(
        id=record.spec.id,
        model=door.topology.source.name,
        status=_STATUSES.get(record.state, "failed"),  # pyright: ignore[reportArgumentType]
        progress=_progress(view),
        created_at=int(record.submitted),
        completed_at=int(record.ended) if record.state == "done" and record.ended is not None else None,
        prompt="\n".join(prompt) if isinstance(prompt, list | tuple) else prompt,
        seconds=f"{(request.get('num_frames') or 1) / (request.get('fps') or 1):g}",
        size="x".join(map(str, sides)) if all(sides) else None,
        error=_error(record),
        warnings=list(record.spec.warnings) if warnings is None else warnings,
    )


def _error(record: JobRecord) -> VideoError | None:
    if record.state == "cancelled":
        return VideoError(code="cancelled", message="the job was cancelled")
    if record.state != "failed" or not record.failures:
        return None
    return VideoError(code=record.failures[-1].code, message=record.failures[-1].message)


def _progress(view: JobView) -> int:
    """Percent, by the steps of denoising, which is what takes time."""
    record = view.record
    if record.state == "done":
        return 100
    stages = record.spec.stages
    if record.stage >= len(stages) or stages[record.stage].stage == "decode":
        return 99
    denoising = stages[record.stage].stage == "denoise" and view.steps
    return min(99, 100 * view.step // view.steps) if denoising else 0

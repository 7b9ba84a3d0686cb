"""LightX2V's API: tasks that are taken at once, looked at, fetched and cancelled."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Response
from fastapi import Request as HttpRequest
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from triptych.errors import InvalidRequest, Unsupported
from triptych.request import Request
from triptych.server.admission import Wanted, begin, finish, view_of
from triptych.server.door import JobView
from triptych.server.errors import ResultNotFound, TimedOut
from triptych.server.failures import UNDER_WAY, check_done
from triptych.server.files import result_response
from triptych.server.front import Front, FrontOf, Who
from triptych.server.intake.bodies import Body, checked, read_body
from triptych.server.intake.pictures import developed, picture_sources
from triptych.server.locks.keys import Caller
from triptych.server.routes.detail_words import body_of, detail_wrong, example, in_words, without_effect
from triptych.server.views import A_FILE, FILE_RESPONSES

__all__ = ["router"]

router = APIRouter(prefix="/v1/tasks", tags=["LightX2V"])

MAX_SYNC_SECONDS = 3600
MAX_HEADER = 2048

_STATUSES = {
    "queued": "pending",
    "running": "processing",
    "done": "completed",
    "failed": "failed",
    "cancelled": "cancelled",
}

_WORDS = {
    "num_inference_steps": "infer_steps",
    "num_frames": "target_video_length",
    "fps": "target_fps",
    "images": "image_path",
    "image_path[0]": "image_path",
    "mask": "image_mask_path",
    "image_mask_path[0]": "image_mask_path",
    "width": "target_shape",
    "height": "target_shape",
    "strength": "i2i_denoise_strength",
    "job": "task_id",
}
"""What LightX2V calls our fields."""

_PICTURE = "data:image/…;base64,…, base64, the id of an upload, or a URL where the deployment allows that; never a path"


class TaskBody(BaseModel):
    """What tasks of either kind take. What is left out is the model's own."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: str = ""
    negative_prompt: str | None = ""
    image_path: str = Field("", description=_PICTURE)
    image_mask_path: str = Field("", description=f"{_PICTURE}; white is painted anew")
    infer_steps: int | None = Field(None, ge=1, le=1000)
    seed: int | None = Field(None, ge=0, lt=2**63, description="drawn at random if it is left out")
    target_shape: list[Annotated[int, Field(ge=1, le=16384)]] = Field(
        [], max_length=2, description="height and width in pixels"
    )
    task_id: str = Field("", max_length=128, description="without effect: ids are the server's own")
    save_result_path: str | None = Field(
        None,
        pattern=r"^([A-Za-z0-9][A-Za-z0-9_-]{0,99}(\.[a-z0-9]{1,8})?)?$",
        description="a name, never a path; without effect: results are fetched",
    )
    use_prompt_enhancer: bool = Field(False, description="without effect")
    reuse: bool = Field(False, description="without effect")
    lora_strength: float = Field(1.0, description="without effect")
    sr_ratio: float = Field(2.0, gt=0, description="without effect")
    data_bootstrap_room: int | None = Field(None, description="without effect")
    disagg_bootstrap_room: int | None = Field(None, description="without effect")
    disagg_decoder_bootstrap_room: int | None = Field(None, description="without effect")
    disagg_phase1_receiver_engine_rank: int | None = Field(None, description="without effect")
    last_frame_path: str = Field("", description="refused unless empty")
    lora_name: str | None = Field(None, description="refused unless null or empty")
    presigned_url: str = Field("", description="refused unless empty: results are fetched")


class VideoTask(TaskBody):
    """The body of `POST /v1/tasks/video/`."""

    target_video_length: int | None = Field(None, ge=1, le=10_000, description="frames")
    target_fps: int | None = Field(None, ge=1, le=240)
    num_fragments: int = Field(1, ge=1, description="without effect")
    reuse_prefix_segments: int = Field(0, ge=0, description="without effect")
    video_duration: int = Field(5, description="without effect")
    resize_mode: str | None = Field("adaptive", description="without effect")
    video_path: str = Field("", description="refused unless empty")
    audio_path: str = Field("", description="refused unless empty")
    talk_objects: list[dict[str, str]] | None = Field(None, description="refused unless null or empty")


class ImageTask(TaskBody):
    """The body of `POST /v1/tasks/image/`."""

    aspect_ratio: str | None = Field(None, pattern=r"^\d{1,4}:\d{1,4}$", description="where target_shape is not given")
    i2i_denoise_strength: float | None = Field(None, gt=0, le=1)


_REFUSED = {
    "last_frame_path": "no picture that the clip ends with is taken",
    "lora_name": "no LoRA is applied",
    "presigned_url": "this server sends nothing anywhere; fetch /v1/tasks/{task_id}/result",
    "video_path": "no video is taken",
    "audio_path": "no sound is taken",
    "talk_objects": "no sound is taken",
}
"""What would change the result and cannot be done, so that doing without would be doing something else."""

_USELESS = {
    "task_id": "ids are the server's own, see the reply",
    "save_result_path": "the result is fetched from /v1/tasks/{task_id}/result",
    "use_prompt_enhancer": "prompts are taken as they are",
    "reuse": "every task is computed",
    "reuse_prefix_segments": "every task is computed",
    "lora_strength": "no LoRA is applied",
    "sr_ratio": "nothing is upscaled",
    "num_fragments": "a clip is made in one piece",
    "video_duration": "there is no sound; target_video_length says how many frames",
    "resize_mode": "pictures are fitted as the model's own pipeline does it",
    "data_bootstrap_room": "the layout says which stages run where",
    "disagg_bootstrap_room": "the layout says which stages run where",
    "disagg_decoder_bootstrap_room": "the layout says which stages run where",
    "disagg_phase1_receiver_engine_rank": "the layout says which stages run where",
}


class TaskTaken(BaseModel):
    """A task that was taken."""

    task_id: str
    task_status: Literal["pending"] = "pending"
    save_result_path: str = Field(description="what the result's file will be called")
    warnings: list[str] = Field(description="what was asked for and has no effect")


class TaskStatus(BaseModel):
    """How a task gets on."""

    task_id: str
    status: Literal["pending", "processing", "completed", "failed", "cancelled"]
    start_time: datetime
    end_time: datetime | None
    error: str | None
    save_result_path: str
    warnings: list[str]


class Stopped(BaseModel):
    """What became of a wish to cancel."""

    stop_status: Literal["success", "do_nothing"]
    reason: str


class QueueStatus(BaseModel):
    """What waits and runs, of all callers; `current_task` is one of the caller's own."""

    is_processing: bool
    current_task: str | None
    pending_count: int
    active_count: int
    queue_size: int
    queue_available: int


_ID = "4f9c1e0b2d7a4c6e8f1a3b5c7d9e0f12"
_TAKEN = {"task_id": _ID, "task_status": "pending", "save_result_path": f"{_ID}.png", "warnings": []}
_IMAGE = {"prompt": "a red apple on the left, blue background", "infer_steps": 4, "seed": 7}
_SHAPED = {"prompt": "a green star", "target_shape": [64, 64], "save_result_path": "star.png"}
_VIDEO = {"prompt": "a red apple moves to the right", "target_video_length": 17, "infer_steps": 4, "seed": 7}
_STATUS = {
    "task_id": _ID, "status": "completed", "start_time": "2026-01-01T00:00:00Z", "end_time": "2026-01-01T00:00:01Z",
    "error": None, "save_result_path": f"{_ID}.png", "warnings": [],
}  # fmt: skip
_QUEUE = {
    "is_processing": True, "current_task": _ID, "pending_count": 2, "active_count": 3, "queue_size": 256,
    "queue_available": 254,
}  # fmt: skip
_TAKES = detail_wrong(400, 401, 413, 415, 422, 429, 503)

Id = Annotated[str, Path(description="the task's id", examples=[_ID])]
Route = Callable[[Callable[..., Any]], Callable[..., Any]]


def _both(method: Callable[..., Route], path: str, **more: Any) -> Route:
    """A route with and without a slash at its end, as its clients write it either way."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        other = path.removesuffix("/") if path.endswith("/") else f"{path}/"
        method(other, include_in_schema=False, **more)(function)
        return method(path, **more)(function)

    return add


@_both(
    router.post, "/video/", response_model=TaskTaken, responses={**example(_TAKEN), **_TAKES},
    openapi_extra=body_of(VideoTask, _VIDEO),
)  # fmt: skip
async def video(front: FrontOf, caller: Who, request: HttpRequest) -> TaskTaken:
    """Takes a clip to make, and answers at once."""
    return await _take(front, caller, request, VideoTask)


@_both(
    router.post, "/image/", response_model=TaskTaken, responses={**example(_TAKEN), **_TAKES},
    openapi_extra=body_of(ImageTask, _IMAGE, _SHAPED),
)  # fmt: skip
async def image(front: FrontOf, caller: Who, request: HttpRequest) -> TaskTaken:
    """Takes a picture to make, and answers at once."""
    return await _take(front, caller, request, ImageTask)


@_both(
    router.post, "/image/sync", response_class=Response,
    responses={
        200: {"description": "the picture", "content": {"image/png": {"example": A_FILE}}},
        **detail_wrong(400, 401, 409, 410, 413, 415, 422, 429, 500, 503, 504),
    },
    openapi_extra=body_of(ImageTask, _IMAGE, _SHAPED),
)  # fmt: skip
async def image_sync(
    front: FrontOf,
    caller: Who,
    request: HttpRequest,
    timeout_seconds: Annotated[int, Query(ge=1, le=MAX_SYNC_SECONDS, description="then the task is cancelled")] = 600,
    poll_interval_seconds: Annotated[float, Query(gt=0, description="without effect: nothing is polled")] = 0.5,
) -> Response:
    """Makes a picture and answers with it. Hanging up cancels the task. What has no effect is told in the header
    `Triptych-Warnings`, as JSON."""
    with in_words(_WORDS):
        job, warnings = await _begun(front, caller, await _read(front, request, ImageTask))
        view = await finish(front, caller, job, request, timeout_seconds)
        if view.record.state in UNDER_WAY:
            if await run_in_threadpool(front.door.cancel, job):
                raise TimedOut(f"task {job} did not end within {timeout_seconds} s, and was cancelled", field="task_id")
            view = await run_in_threadpool(view_of, front, caller, job)
            check_done(view)
    response = await front.slowly(result_response, front.door, view, 0)
    text = json.dumps(warnings)
    if warnings and len(text) <= MAX_HEADER:
        response.headers["Triptych-Warnings"] = text
    return response


@_both(router.get, "/queue/status", response_model=QueueStatus, responses={**example(_QUEUE), **detail_wrong(401)})
def queue_status(front: FrontOf, caller: Who) -> QueueStatus:
    """How much waits, and for how much more there is room."""
    status = front.door.status()
    waiting, running = (status.jobs.get(state, 0) for state in ("queued", "running"))
    own = front.door.jobs(client=caller.name, states=("running",), limit=1)
    return QueueStatus(
        is_processing=running > 0,
        current_task=own[0].spec.id if own else None,
        pending_count=waiting,
        active_count=waiting + running,
        queue_size=status.max_queue,
        queue_available=max(0, status.max_queue - waiting),
    )


@_both(
    router.get, "/{task_id}/status", response_model=TaskStatus, responses={**example(_STATUS), **detail_wrong(401, 404)}
)
def task_status(task_id: Id, front: FrontOf, caller: Who) -> TaskStatus:
    """How a task gets on."""
    with in_words(_WORDS):
        view = view_of(front, caller, task_id)
    record = view.record
    failed = record.failures[-1].message if record.state == "failed" and record.failures else None
    return TaskStatus(
        task_id=task_id,
        status=_STATUSES[record.state],  # pyright: ignore[reportArgumentType]
        start_time=_when(record.started or record.submitted),
        end_time=_when(record.ended) if record.ended is not None else None,
        error="the task was cancelled" if record.state == "cancelled" else failed,
        save_result_path=_name(view),
        warnings=list(record.spec.warnings),
    )


@_both(
    router.get, "/{task_id}/result", response_class=Response,
    responses={**FILE_RESPONSES, **detail_wrong(401, 404, 410)},
)  # fmt: skip
async def task_result(task_id: Id, front: FrontOf, caller: Who) -> Response:
    """A completed task's picture or clip."""
    with in_words(_WORDS):
        view = await run_in_threadpool(view_of, front, caller, task_id)
    if view.record.state != "done":
        raise ResultNotFound(f"the task is {_STATUSES[view.record.state]}; only one that is completed has a result")
    return await front.slowly(result_response, front.door, view, 0)


@_both(
    router.delete, "/{task_id}", response_model=Stopped,
    responses={**example({"stop_status": "success", "reason": "the task was cancelled"}), **detail_wrong(401, 404)},
)  # fmt: skip
def stop(task_id: Id, front: FrontOf, caller: Who) -> Stopped:
    """Cancels a task before its next step; nothing more of it is computed."""
    with in_words(_WORDS):
        view_of(front, caller, task_id)
    if front.door.cancel(task_id):
        return Stopped(stop_status="success", reason="the task was cancelled")
    return Stopped(stop_status="do_nothing", reason="the task has ended already")


async def _take(front: Front, caller: Caller, request: HttpRequest, kind: type[TaskBody]) -> TaskTaken:
    with in_words(_WORDS):
        job, warnings = await _begun(front, caller, await _read(front, request, kind))
        view = await run_in_threadpool(view_of, front, caller, job)
    spec = view.record.spec
    return TaskTaken(task_id=spec.id, save_result_path=_name(view), warnings=[*warnings, *spec.warnings])


async def _read(front: Front, request: HttpRequest, kind: type[Body]) -> Body:
    body = checked(kind, await read_body(request, front.settings.max_body))
    makes = front.door.topology.makes
    if makes == "video" and issubclass(kind, ImageTask):
        raise Unsupported("given an image task; this model makes clips: POST /v1/tasks/video/", field="body")
    if makes == "image" and issubclass(kind, VideoTask):
        raise Unsupported("given a video task; this model makes pictures: POST /v1/tasks/image/", field="body")
    return body


async def _begun(front: Front, caller: Caller, body: TaskBody) -> tuple[str, list[str]]:
    """The job of a body, and what of it has no effect. Raises Unsupported for what cannot be done without making
    something else."""
    given, warnings = _given(body)
    images = picture_sources(front, caller, [body.image_path] if body.image_path else [], "image_path")
    masks = picture_sources(front, caller, [body.image_mask_path] if body.image_mask_path else [], "image_mask_path")
    mask = masks[0] if masks else None
    async with developed(front, caller, images, mask, field="image_path", mask_field="image_mask_path") as brought:
        return await begin(front, caller, Wanted(Request.parse(prompt=body.prompt, **given, **brought))), warnings


def _given(body: TaskBody) -> tuple[dict[str, Any], list[str]]:
    """A body's settings, and what of it has no effect. Raises Unsupported."""
    for name, why in _REFUSED.items():
        if getattr(body, name, None):
            raise Unsupported(f"given {str(getattr(body, name))[:80]!r}; allowed: nothing, {why}", field=name)
    warnings = [without_effect(name, _USELESS[name]) for name in _changed(body, _USELESS)]
    given: dict[str, Any] = {"negative_prompt": body.negative_prompt or None}
    given |= {"num_inference_steps": body.infer_steps, "seed": body.seed}
    if body.target_shape:
        if len(body.target_shape) != 2:
            raise InvalidRequest.of("target_shape", body.target_shape, "height and width, or nothing")
        given["height"], given["width"] = body.target_shape
    if isinstance(body, VideoTask):
        given |= {"num_frames": body.target_video_length, "fps": body.target_fps}
    if isinstance(body, ImageTask):
        given["strength"] = body.i2i_denoise_strength
        if body.aspect_ratio is not None and (body.target_shape or body.image_path):
            why = "target_shape says the size" if body.target_shape else "the picture's own counts"
            warnings.append(without_effect("aspect_ratio", why))
        else:
            given["aspect_ratio"] = body.aspect_ratio
    return given, warnings


def _changed(body: TaskBody, names: Iterable[str]) -> list[str]:
    """The fields that were given another value than they have by themselves."""
    fields = type(body).model_fields
    return [name for name in names if name in fields and getattr(body, name) not in (fields[name].default, "", None)]


def _name(view: JobView) -> str:
    encoding = view.record.spec.encoding
    suffix = "png" if encoding is None else encoding.format
    return f"{view.record.spec.id}.{suffix}"


def _when(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)

"""The HTTP routes."""

from __future__ import annotations

import mimetypes
import re
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from starlette.concurrency import run_in_threadpool

from triptych.messages import MEDIA_TYPES
from triptych.server.bodies import JOB_BODY, read_body, take_job
from triptych.server.door import Door, JobView, ResultFile
from triptych.server.errors import Draining, JobNotFound, NotDone, ResultGone, ResultNotFound, add_handlers
from triptych.server.views import ErrorBody, Health, JobObject, job_object

__all__ = ["create_app"]

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_SUFFIXES = {kind: ".jpg" if format == "jpeg" else f".{format}" for format, kind in MEDIA_TYPES.items()}

router = APIRouter(prefix="/v1")
probe = APIRouter()


def _wrong(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody} for status in statuses}


@dataclass(eq=False)
class Front:
    """What the routes share."""

    door: Door
    max_body: int
    draining: bool = False
    """about to stop: what runs ends well, and nothing new is taken"""


def create_app(door: Door, *, version: str, max_body: int) -> FastAPI:
    """The application on an engine; it neither opens nor closes that. `max_body`: bytes of a request's body."""
    app = FastAPI(title="Triptych", version=version, redoc_url=None)
    app.state.front = Front(door, max_body)
    add_handlers(app)
    app.include_router(probe)
    app.include_router(router)
    return app


def front_of(request: Request) -> Front:
    """What the routes of this application share."""
    return request.app.state.front


@probe.get("/health", response_model=Health, responses={503: {"model": Health}})
async def health(request: Request) -> JSONResponse:
    """200 when every stage has a worker that is ready; 503 names those that have none."""
    front = front_of(request)
    missing = list(front.door.missing_stages())
    status = "draining" if front.draining else "unavailable" if missing else "ok"
    found = Health(status=status, missing=missing)
    return JSONResponse(found.model_dump(), 200 if status == "ok" else 503)


@router.post(
    "/jobs",
    status_code=202,
    response_model=JobObject,
    responses=_wrong(400, 413, 415, 422, 429, 503),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": JOB_BODY.model_json_schema(),
                    "example": {"prompt": "a red apple on the left, blue background", "seed": 7},
                }
            },
        }
    },
)
async def submit(request: Request, response: Response) -> JobObject:
    """Takes a job and answers at once; `GET /v1/jobs/{id}` tells how it gets on."""
    front = front_of(request)
    if front.draining:
        raise Draining("the server is stopping and takes no more jobs")
    data = await read_body(request, front.max_body)
    found = await run_in_threadpool(_submit, front.door, data)
    response.headers["Location"] = f"/v1/jobs/{found.id}"
    return found


def _submit(door: Door, data: bytes) -> JobObject:
    wanted = take_job(data)
    job = door.submit(
        wanted.request,
        preview=wanted.preview,
        priority=wanted.priority,
        deadline=wanted.deadline,
        exact=wanted.exact,
    )
    return job_object(door, _view(door, job.id))


@router.get("/jobs/{job}", response_model=JobObject, responses=_wrong(404))
def look(job: str, request: Request) -> JobObject:
    """How a job gets on, and where its results are."""
    door = front_of(request).door
    return job_object(door, _view(door, job))


@router.delete("/jobs/{job}", response_model=JobObject, responses=_wrong(404))
def cancel(job: str, request: Request) -> JobObject:
    """Cancels a job before its next step. One that has ended stays as it is; the answer says how that is."""
    door = front_of(request).door
    _view(door, job)
    door.cancel(job)
    return job_object(door, _view(door, job))


@router.get(
    "/jobs/{job}/results/{number}",
    response_class=Response,
    responses={200: {"content": {kind: {} for kind in _SUFFIXES}}, 206: {}, **_wrong(404, 409, 410, 422)},
)
def result(job: str, number: int, request: Request) -> Response:
    """One output of a finished job, as a file; a part of it where a range is asked for."""
    door = front_of(request).door
    record = _view(door, job).record
    if record.state != "done":
        raise NotDone(f"job {job} is {record.state}")
    files = door.result_files(job)
    if not files:
        raise ResultGone(f"the results of job {job} have expired")
    if not 0 <= number < len(files):
        raise ResultNotFound(f"given {number}; allowed: 0 to {len(files) - 1}", field="number")
    return _file(files[number], f"{job}-{number}")


def _file(file: ResultFile, name: str) -> Response:
    suffix = _SUFFIXES.get(file.media_type) or mimetypes.guess_extension(file.media_type) or ""
    headers = {
        "Content-Disposition": f'inline; filename="{name}{suffix}"',
        "Cache-Control": "private, max-age=31536000, immutable",
        "X-Content-Type-Options": "nosniff",
    }
    if file.path is not None:
        if not file.path.is_file():
            raise ResultGone("the result has expired")
        return FileResponse(file.path, headers=headers, media_type=file.media_type)
    assert file.data is not None, "a result is a file or bytes"
    return Response(file.data, headers=headers, media_type=file.media_type)


@router.get("/cluster")
def cluster(request: Request) -> Response:
    """Stages, workers and queues."""
    return Response(msgspec.json.encode(front_of(request).door.status()), media_type="application/json")


def _view(door: Door, job: str) -> JobView:
    view = door.view(job) if _ID.fullmatch(job) else None
    if view is None:
        raise JobNotFound("no such job, or it has expired", field="job")
    return view

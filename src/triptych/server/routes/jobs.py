"""The native API: jobs."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from triptych.cluster import ENDED, JobState
from triptych.errors import InvalidRequest
from triptych.server.admission import begin_or_replay, made_before, view_of, while_connected
from triptych.server.door import JobView
from triptych.server.errors import JobNotFound
from triptych.server.events import EVENTS, job_events
from triptych.server.files import KnownTags, result_response
from triptych.server.front import Front, FrontOf, Who
from triptych.server.intake.bodies import JOB_BODY, job_of, read_body
from triptych.server.locks.keys import Caller
from triptych.server.views import FILE_RESPONSES, JobList, JobObject, job_object, wrong

__all__ = ["router"]

MAX_WAIT = 600
"""Seconds that a submission waits for its job at most."""

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

JobId = Annotated[str, Path(description="the job's id")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1, max_length=255, pattern=r"^[!-~]+$",
        description="the client's own name for this job: the same name with the same body is answered with the job "
        "that was made then, with another body refused",
    ),
]  # fmt: skip
Prefer = Annotated[
    str | None,
    Header(max_length=1000, description=f"`wait=30`: answers when the job has ended, or after 30 s (≤ {MAX_WAIT})"),
]
LastEventId = Annotated[
    int, Header(ge=0, le=2**53, description="the id of the last event that was received; what came after it is told")
]


@router.post(
    "",
    status_code=202,
    response_model=JobObject,
    responses={
        200: {"model": JobObject, "description": "The job has ended"},
        **wrong(400, 401, 409, 413, 415, 422, 429, 503),
    },
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
async def submit(
    front: FrontOf, caller: Who, request: Request, response: Response, idempotency_key: IdempotencyKey = None,
    prefer: Prefer = None,
) -> JobObject:  # fmt: skip
    """Takes a job and answers at once (202), unless it is to be waited for; `GET /v1/jobs/{job}` and
    `GET /v1/jobs/{job}/events` tell how it gets on. A client that hangs up while it waits cancels the job, unless it
    gave an `Idempotency-Key` to come back with."""
    seconds = _wait(prefer)
    job, replayed = await _begun(front, caller, request, idempotency_key)
    if replayed:
        response.headers["Idempotent-Replayed"] = "true"
    if seconds is not None:
        async with while_connected(front, job, request, cancels=idempotency_key is None):
            await front.follower.ended(job, seconds)
        response.headers["Preference-Applied"] = f"wait={seconds}"
    view = await run_in_threadpool(view_of, front, caller, job)
    response.status_code = 200 if view.record.state in ENDED else 202
    response.headers["Location"] = f"/v1/jobs/{job}"
    return await run_in_threadpool(job_object, front.door, view)


async def _begun(front: Front, caller: Caller, request: Request, name: str | None) -> tuple[str, bool]:
    """The job of a request, and whether it is one that was taken before."""
    data = await read_body(request, front.settings.max_body)
    key = None if name is None else (name, hashlib.sha256(data).hexdigest())
    if key is not None and (job := await run_in_threadpool(made_before, front, caller, key)):
        return job, True
    async with job_of(front, caller, data) as wanted:
        return await begin_or_replay(front, caller, replace(wanted, key=key))


def _wait(prefer: str | None) -> int | None:
    """The seconds of `wait` among a client's preferences; others are none of ours, and may be ignored."""
    for one in (prefer or "").split(","):
        name, _, value = one.partition(";")[0].partition("=")
        if name.strip().lower() == "wait":
            value = value.strip().strip('"')
            if not re.fullmatch(r"[0-9]{1,9}", value):
                raise InvalidRequest.of("prefer", one.strip(), f"wait=0 to wait={MAX_WAIT}, in seconds")
            return min(int(value), MAX_WAIT)
    return None


@router.get("", response_model=JobList, responses=wrong(401, 404, 422))
def list_jobs(
    front: FrontOf, caller: Who,
    limit: Annotated[int, Query(ge=1, le=100, description="so many at most")] = 20,
    before: Annotated[str | None, Query(max_length=64, description="only jobs older than the one of this id")] = None,
    state: Annotated[list[JobState] | None, Query(max_length=5, description="only jobs in these states")] = None,
) -> JobList:  # fmt: skip
    """The caller's own jobs, newest first."""
    if before is not None:
        _own(front, caller, before, "before")
    found = front.door.jobs(client=caller.name, states=state, before=before, limit=limit + 1)
    views = [view for record in found[:limit] if (view := front.door.view(record.spec.id)) is not None]
    return JobList(data=[job_object(front.door, view) for view in views], has_more=len(found) > limit)


def _own(front: Front, caller: Caller, job: str, field: str) -> JobView:
    try:
        return view_of(front, caller, job)
    except JobNotFound as error:
        error.field = field
        raise


@router.get("/{job}", response_model=JobObject, responses=wrong(401, 404))
def look(job: JobId, front: FrontOf, caller: Who) -> JobObject:
    """How a job gets on, and where its results are."""
    return job_object(front.door, view_of(front, caller, job))


@router.get(
    "/{job}/events",
    response_class=StreamingResponse,
    responses={200: {"content": EVENTS, "description": "Server-sent events"}, **wrong(401, 404, 422)},
)
async def events(job: JobId, front: FrontOf, caller: Who, last_event_id: LastEventId = 0) -> StreamingResponse:
    """How a job gets on, told as it happens: `job` (as it stands), `queued` (its place, and the seconds until it is
    begun and done), `progress` (stage, step, and a preview if the job was submitted with `preview`), and as the last
    event `done`, `failed` or `cancelled`. A client that lost the connection goes on with `Last-Event-ID`."""
    await run_in_threadpool(view_of, front, caller, job)
    return job_events(front, caller, job, last_event_id)


@router.delete("/{job}", response_model=JobObject, responses=wrong(401, 404))
def cancel(job: JobId, front: FrontOf, caller: Who) -> JobObject:
    """Cancels a job before its next step. One that has ended stays as it is; the answer says how that is."""
    view_of(front, caller, job)
    front.door.cancel(job)
    return job_object(front.door, view_of(front, caller, job))


@router.get(
    "/{job}/results/{number}",
    response_class=Response,
    responses={**FILE_RESPONSES, **wrong(401, 404, 409, 410, 422)},
)
async def result(
    job: JobId,
    number: Annotated[int, Path(description="which output, from 0")],
    front: FrontOf,
    caller: Who,
    known: KnownTags = None,
) -> Response:
    """One output of a finished job, as a file; a part of it where a range is asked for."""
    view = await run_in_threadpool(view_of, front, caller, job)
    return await front.slowly(result_response, front.door, view, number, known)

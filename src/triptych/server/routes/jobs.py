"""The native API: jobs."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from triptych.server.admission import begin, view_of
from triptych.server.files import result_response
from triptych.server.front import FrontOf, Who
from triptych.server.intake.bodies import JOB_BODY, read_body, take_job
from triptych.server.views import FILE_RESPONSES, JobObject, job_object, wrong

__all__ = ["router"]

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


@router.post(
    "",
    status_code=202,
    response_model=JobObject,
    responses=wrong(400, 401, 413, 415, 422, 429, 503),
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
async def submit(front: FrontOf, caller: Who, request: Request, response: Response) -> JobObject:
    """Takes a job and answers at once; `GET /v1/jobs/{id}` tells how it gets on."""
    data = await read_body(request, front.settings.max_body)
    wanted = await take_job(front, data)
    job = await begin(front, caller, wanted)
    response.headers["Location"] = f"/v1/jobs/{job}"
    return job_object(front.door, view_of(front, caller, job))


@router.get("/{job}", response_model=JobObject, responses=wrong(401, 404))
def look(job: str, front: FrontOf, caller: Who) -> JobObject:
    """How a job gets on, and where its results are."""
    return job_object(front.door, view_of(front, caller, job))


@router.delete("/{job}", response_model=JobObject, responses=wrong(401, 404))
def cancel(job: str, front: FrontOf, caller: Who) -> JobObject:
    """Cancels a job before its next step. One that has ended stays as it is; the answer says how that is."""
    view_of(front, caller, job)
    front.door.cancel(job)
    return job_object(front.door, view_of(front, caller, job))


@router.get(
    "/{job}/results/{number}",
    response_class=Response,
    responses={**FILE_RESPONSES, **wrong(401, 404, 409, 410, 422)},
)
def result(job: str, number: int, front: FrontOf, caller: Who) -> Response:
    """One output of a finished job, as a file; a part of it where a range is asked for."""
    return result_response(front.door, view_of(front, caller, job), number)

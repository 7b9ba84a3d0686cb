"""What a client is told of a job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from triptych.messages import MEDIA_TYPES
from triptych.server.door import Door, JobView

if TYPE_CHECKING:
    from triptych.cluster import Failure, JobRecord

__all__ = [
    "A_FILE",
    "FILE_RESPONSES",
    "SSE_EVENT",
    "ErrorBody",
    "Health",
    "JobList",
    "JobObject",
    "job_object",
    "wrong",
]

A_FILE = "(a file's bytes)"
"""What stands for a file among the OpenAPI page's examples."""

FILE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {kind: {"example": A_FILE} for kind in MEDIA_TYPES.values()}},
    206: {},
    304: {},
    400: {"description": "A Range that is none", "content": {"text/plain": {}}},
    416: {},
}
"""What a route that sends a file may answer when all is well."""

SSE_EVENT: dict[str, Any] = {
    "type": "object",
    "required": ["data"],
    "properties": {name: {"type": "string"} for name in ("id", "event", "data")},
}
"""One event of a stream of them, as the OpenAPI page describes it."""


class JobError(BaseModel):
    """Why a job, or one attempt at it, failed."""

    code: str
    message: str
    field: str | None = None
    stage: str | None = None


class ErrorDetail(BaseModel):
    """What was wrong."""

    code: str
    message: str
    field: str | None = None


class ErrorBody(BaseModel):
    """Every error's body."""

    error: ErrorDetail


def wrong(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route may answer when something is wrong, for the OpenAPI page."""
    return {status: {"model": ErrorBody} for status in statuses}


class StageTimes(BaseModel):
    """What a finished stage took: seconds from its assignment to its output, of waiting before that, of fetching its
    input."""

    stage: str
    seconds: float
    waited: float
    fetched: float
    steps: int
    peak_bytes: int
    ran: float = Field(description="seconds from its start in the stage to what it made, beside others' steps")
    resumed_at: int = Field(description="steps taken over from an attempt that was lost")


JOB_EXAMPLE: dict[str, Any] = {
    "id": "0f8b2c4de6a14f0f9c5b7a3d2e1f6c8b",
    "object": "job",
    "state": "running",
    "model": "emoji",
    "workflow": "text2image",
    "created": 1767225600.0,
    "started": 1767225600.1,
    "ended": None,
    "priority": 0,
    "position": None,
    "starts_in": 0.0,
    "done_in": 0.4,
    "stage": "denoise",
    "step": 3,
    "steps": 8,
    "retries": 0,
    "times": [],
    "warnings": [],
    "request": {"prompt": "a red apple on the left, blue background", "seed": 7, "num_inference_steps": 8},
    "results": [],
    "error": None,
    "failures": [],
}
"""A job on the OpenAPI page."""


class JobObject(BaseModel):
    """A job. Times of day are seconds since the epoch."""

    model_config = ConfigDict(json_schema_extra={"examples": [JOB_EXAMPLE]})

    id: str
    object: Literal["job"] = "job"
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    model: str
    workflow: str
    created: float
    started: float | None
    ended: float | None
    priority: int
    position: int | None = Field(description="jobs that go before it, while it waits for a stage")
    starts_in: float | None = Field(description="seconds until it is begun, 0 if it is; null while that cannot be told")
    done_in: float | None = Field(description="seconds until it is done; null while that cannot be told")
    stage: str | None = Field(description="where it is, until it ends")
    step: int
    steps: int = Field(description="of this stage; 0 while unknown")
    retries: int = Field(description="attempts beyond the first of each stage")
    times: list[StageTimes]
    warnings: list[str]
    request: dict[str, Any] = Field(description="the request with its defaults filled in")
    results: list[str] = Field(description="where to get the outputs, once it is done")
    error: JobError | None = Field(description="why it failed")
    failures: list[JobError] = Field(description="every attempt that went wrong, the last one last")


class JobList(BaseModel):
    """Some of the caller's jobs, newest first."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"object": "list", "data": [JOB_EXAMPLE], "has_more": False}]}
    )

    object: Literal["list"] = "list"
    data: list[JobObject]
    has_more: bool = Field(description="there are older ones: ask again with `before` the last one's id")


class Health(BaseModel):
    """Whether jobs can be run."""

    status: Literal["ok", "draining", "unavailable"]
    missing: list[str] = Field(description="stages that no worker is ready for")

    model_config = ConfigDict(json_schema_extra={"examples": [{"status": "ok", "missing": []}]})


def job_object(door: Door, view: JobView) -> JobObject:
    """The job as a client sees it."""
    record = view.record
    spec, ended = record.spec, record.ended is not None
    failures = [_error(failure) for failure in record.failures]
    estimate = door.estimate(spec.id)
    return JobObject(
        id=spec.id,
        state=record.state,
        model=door.topology.source.name,
        workflow=spec.workflow,
        created=record.submitted,
        started=record.started,
        ended=record.ended,
        priority=spec.priority,
        position=view.position,
        starts_in=estimate.starts_in,
        done_in=estimate.done_in,
        stage=None if ended else _stage(record),
        step=view.step,
        steps=view.steps,
        retries=sum(max(0, count - 1) for count in record.attempts),
        times=[_times(stage) for stage in record.finished],
        warnings=list(spec.warnings),
        request=spec.request,
        results=_results(door, record),
        error=failures[-1] if record.state == "failed" and failures else None,
        failures=failures,
    )


def _stage(record: JobRecord) -> str | None:
    stages = record.spec.stages
    return stages[record.stage].stage if record.stage < len(stages) else None


def _times(stage: Any) -> StageTimes:
    return StageTimes(**{name: getattr(stage, name) for name in StageTimes.model_fields})


def _error(failure: Failure) -> JobError:
    return JobError(code=failure.code, message=failure.message, field=failure.field, stage=failure.stage)


def _results(door: Door, record: JobRecord) -> list[str]:
    if record.state != "done":
        return []
    job = record.spec.id
    return [f"/v1/jobs/{job}/results/{index}" for index in range(len(door.result_files(job)))]

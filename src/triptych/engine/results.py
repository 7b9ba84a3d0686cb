"""What the cluster says, in the words of a request's owner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL import Image

from triptych.cluster import Failure, JobRecord, Outcome
from triptych.errors import Cancelled, StageFailed, TriptychError, error_class
from triptych.messages import Stepped
from triptych.model import Resolved, Topology
from triptych.request import Progress, Result, StageTime

if TYPE_CHECKING:
    from triptych.transfer import Payload

__all__ = ["error_of", "progress_of", "result_of"]


def progress_of(event: Stepped) -> Progress:
    """A unit of work done."""
    shown = event.preview
    picture = None if shown is None else Image.frombytes("RGB", (shown.width, shown.height), shown.pixels)
    return Progress(event.job, event.stage, event.step, event.steps, event.seconds, picture)


def error_of(job: str, outcome: Outcome) -> TriptychError:
    """Why a job ended without a result: the decisive failure, with the others' reasons when they are others."""
    if outcome.state == "cancelled":
        return Cancelled("the job was cancelled")
    if not outcome.failures:
        return TriptychError("the job failed")
    last = outcome.failures[-1]
    earlier = dict.fromkeys(one.message for one in outcome.failures[:-1] if one.message != last.message)
    message = last.message + "".join(f"; before that: {text}" for text in earlier)
    return _error(job, last, message)


def _error(job: str, failure: Failure, message: str) -> TriptychError:
    kind = error_class(failure.code)
    if kind is StageFailed or (kind is TriptychError and failure.stage is not None):
        stage = failure.stage or ""
        return StageFailed(message, stage=stage, job=job, original=failure.original, field=failure.field)
    return kind(message, field=failure.field)


def result_of(topology: Topology, resolved: Resolved, record: JobRecord, payload: Payload | None) -> Result:
    """The result of a job that is done; without outputs for one whose outputs are files."""
    request = resolved.request
    outputs: tuple[Any, ...] = ()
    if payload is not None:
        from triptych.decode import to_clips, to_images

        if "videos" in payload.values:
            outputs = tuple(to_clips(payload.values["videos"], request.fps or 16.0))
        else:
            outputs = tuple(to_images(payload.values["images"]))
    times = tuple(StageTime(one.stage, one.seconds, one.steps, one.peak_bytes, one.ran) for one in record.finished)
    return Result(record.spec.id, topology.source.name, resolved.workflow, request, outputs, times, resolved.warnings)

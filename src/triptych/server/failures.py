"""Jobs that ended badly, as the answer to a client that waited for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from triptych.errors import Cancelled, NoWorker, TriptychError
from triptych.server.door import JobView

if TYPE_CHECKING:
    from triptych.cluster import Failure

__all__ = ["UNDER_WAY", "JobFailed", "check_done"]

UNDER_WAY = ("queued", "running")
"""The states of a job that has not ended."""


class JobFailed(TriptychError):
    """The job that was waited for has failed, with the code of what it failed with."""

    code = "job_failed"

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message, field=failure.field)
        # Settings that lead to no numbers are the request's doing; other errors of a stage may be ours.
        self.code = "not_finite" if failure.original == "NonFinite" else failure.code


def check_done(view: JobView) -> None:
    """Raises Cancelled or JobFailed for a job that has ended without a result, NoWorker for one that has been given
    up, though it has not ended: there is nobody left to do it before the server is started again."""
    record = view.record
    if record.state == "cancelled":
        raise Cancelled("the job was cancelled")
    if record.state == "failed":
        raise JobFailed(record.failures[-1]) if record.failures else TriptychError("the job failed")
    if record.state in UNDER_WAY:
        raise NoWorker("no worker is left; the job goes on when the server has been started again")

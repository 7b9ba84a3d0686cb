"""Jobs as the cluster knows them, and what it needs of others: a store, a keeper of payloads, a line to each worker."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, Literal, Protocol

import msgspec

from triptych.messages import Descriptor, Encoding, Route, ToWorker
from triptych.request import StageName, VaeTask

__all__ = [
    "ENDED",
    "Failure",
    "JobRecord",
    "JobSpec",
    "JobState",
    "JobStore",
    "Keeper",
    "Kept",
    "Link",
    "NotNear",
    "Outcome",
    "StageRecord",
    "StageSpec",
    "snapshot",
]

JobState = Literal["queued", "running", "done", "failed", "cancelled"]
ENDED: frozenset[JobState] = frozenset({"done", "failed", "cancelled"})


class StageSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One stage's share of a job: the request fields that its pipeline code declares (JSON, without pictures), and
    whether it takes the request's pictures."""

    stage: StageName
    fields: dict[str, Any]
    pictures: bool = False


class JobSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is to be done, decided at the door and never changed afterwards."""

    id: str
    stages: tuple[StageSpec, ...]
    seed: int
    guidance_scale: float | None = None
    shift: float | None = None
    pictures: str | None = None
    """the keeper's name for the request's pictures"""
    preview: bool = False
    exact: bool = False
    raw: bool = False
    encoding: Encoding | None = None
    work: float = 1.0
    """how large it is beside others: pixels × frames × outputs"""
    rows: int = 1
    """pictures or clips that are denoised together"""
    trace: str = ""
    """the W3C `traceparent` that its spans belong to; empty: a trace of its own"""
    client: str = ""
    """whose turn it is, for fairness"""
    digest: str = ""
    """of what its client asked for, where that named the job; the cluster does not read it"""
    priority: int = 0
    """higher goes first"""
    deadline: float | None = None
    """seconds after submission at which nobody wants it any more"""
    request: dict[str, Any] = {}
    """the request as JSON, for people and for repeating it; the cluster does not read it"""
    bare: VaeTask | None = None
    """its one task is no share of a request: a call of the stage's VAE"""
    workflow: str = ""
    warnings: tuple[str, ...] = ()


class Failure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One attempt that went wrong."""

    stage: StageName | None
    worker: str
    code: str
    message: str
    field: str | None = None
    original: str = ""


class StageRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a finished stage took: seconds from assignment to its output, of waiting before, of fetching its input, and
    `ran`: from its start in the stage to what it made, beside others' steps if there were any."""

    stage: StageName
    worker: str
    seconds: float
    waited: float
    fetched: float
    steps: int
    peak_bytes: int
    resumed_at: int = 0
    ran: float = 0.0


class Kept(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something in the keeper's hands: its name there and its bytes, and how it came there."""

    name: str
    bytes: int = 0
    fetched_seconds: float = 0.0
    fetched_bytes: int = 0
    fetched_by: Route | None = None


class Outcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a job ended. `result` when done; the collected failures otherwise, the decisive one last."""

    state: JobState
    result: Kept | None = None
    failures: tuple[Failure, ...] = ()


class JobRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A job with all that a restarted coordinator needs to go on with it. Times are seconds since the epoch."""

    spec: JobSpec
    state: JobState = "queued"
    submitted: float = 0.0
    started: float | None = None
    ended: float | None = None
    stage: int = 0
    """index of the stage that it waits for or runs in; the number of stages when only its result is to be kept"""
    attempts: list[int] = []
    """by stage: how often it was handed out"""
    mark: int = 0
    """what workers count its attempts from: no other job of its id, before or after it, has the same"""
    inputs: list[Descriptor | None] = []
    """by stage: the kept output of the stage before; one more, for the last one's output"""
    checkpoint: Kept | None = None
    checkpoint_step: int = 0
    checkpoint_stage: int = 0
    """index of the stage that the checkpoint belongs to"""
    failures: list[Failure] = []
    alone: bool = False
    """was in flight at a death: runs with nothing beside it"""
    deaths_alone: int = 0
    finished: list[StageRecord] = []
    result: Kept | None = None

    @property
    def kept_bytes(self) -> int:
        """Of what the keeper still has once the job has ended."""
        return self.result.bytes if self.result else 0


def snapshot(record: JobRecord) -> JobRecord:
    """A copy that later changes of the job do not reach."""
    return msgspec.structs.replace(
        record,
        attempts=list(record.attempts),
        inputs=list(record.inputs),
        failures=list(record.failures),
        finished=list(record.finished),
    )


class JobStore(Protocol):
    """Where jobs outlive the coordinator. Called from one thread at a time; every write is durable when it returns."""

    def put(self, record: JobRecord) -> None:
        """Writes a job, new or changed."""
        ...

    def get(self, job: str) -> JobRecord | None:
        """The job, or None if it is unknown or has expired."""
        ...

    def remove(self, job: str) -> bool:
        """Removes an ended job; False if it is unknown."""
        ...

    def unfinished(self) -> list[JobRecord]:
        """Every job that has not ended, oldest first."""
        ...

    def list(
        self, *, client: str | None = None, states: Iterable[JobState] | None = None, before: str | None = None,
        limit: int = 50,
    ) -> list[JobRecord]:  # fmt: skip
        """Jobs, newest first; `before`: older than that job."""
        ...

    def expire(self, before: float, keep_bytes: int | None = None) -> list[JobRecord]:
        """Removes the ended jobs that ended before that time, then the oldest until what the rest keeps is at most
        that many bytes, and returns what it removed, so that the keeper can drop it."""
        ...

    def close(self) -> None:
        """Lets go of the files."""
        ...


class NotNear(Exception):
    """What is asked of a keeper is on its way here; `coming` ends when it is worth asking again."""

    def __init__(self, coming: Future[Any]) -> None:
        super().__init__("it is on its way here")
        self.coming = coming


class Keeper(Protocol):
    """Keeps payloads on the coordinator's side: results, checkpoints, the request's pictures. Fetching happens on its
    own threads; `done` is called from there (or at once) with what was kept or why it could not be."""

    def keep(self, job: str, what: str, descriptor: Descriptor, secret: bytes,
             done: Callable[[Kept | Exception], None]) -> None:  # fmt: skip
        """Fetches a worker's payload and keeps it for this job; `what` is `result`, `checkpoint` or `input`."""
        ...

    def offer(self, kept: str) -> tuple[Descriptor, bytes]:
        """What was kept, for a worker to fetch, and the secret for its ticket. Raises KeyError if it is gone, NotNear
        if it has to be brought here first."""
        ...

    def drop(self, job: str, what: str | None = None) -> None:
        """Forgets what was kept for a job: all of it, or `what`."""
        ...


class Link(Protocol):
    """The coordinator's line to one worker."""

    def send(self, message: ToWorker) -> None:
        """Sends, in order; never blocks and never raises: a broken line is told by the worker's silence."""
        ...

    def close(self) -> None:
        """Hangs up."""
        ...

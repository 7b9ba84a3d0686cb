"""What the scheduler wants done. It does none of it itself."""

from __future__ import annotations

from dataclasses import dataclass

from triptych.cluster.jobs import JobRecord
from triptych.messages import Descriptor, Hello

__all__ = [
    "Action",
    "Ask",
    "Assign",
    "CancelAt",
    "Dismiss",
    "Drop",
    "Ended",
    "Fetch",
    "Foretell",
    "GiveMap",
    "Let",
    "Persist",
    "WriteTask",
]


@dataclass(frozen=True, slots=True)
class Assign:
    """Send a job's current stage to a worker."""

    worker: str
    job: str
    stage: int
    attempt: int
    waited: float
    """seconds in the queue"""


@dataclass(frozen=True, slots=True)
class Foretell:
    """Tell a worker that a job will probably come to it with this stage, its next."""

    worker: str
    job: str
    stage: int


@dataclass(frozen=True, slots=True)
class CancelAt:
    """Tell a worker to drop a job's task."""

    worker: str
    job: str


@dataclass(frozen=True, slots=True)
class Let:
    """Tell a worker that nobody needs a payload of its any more. `bytes`: of its body, if known."""

    worker: str
    payload: str
    bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """Have a worker prove that it still works."""

    worker: str


@dataclass(frozen=True, slots=True)
class GiveMap:
    """Send a worker the map from latents to colours."""

    worker: str
    preview: bytes


@dataclass(frozen=True, slots=True)
class Dismiss:
    """A worker is out. `kind`: silent, hung, unhealthy, gone, superseded or left."""

    worker: str
    hello: Hello
    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class Fetch:
    """Have the keeper fetch a payload; `number` comes back with the answer."""

    job: str
    what: str
    descriptor: Descriptor
    secret: bytes
    number: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Have the keeper forget what it keeps for a job: `what`, or all."""

    job: str
    what: str | None


@dataclass(frozen=True, slots=True)
class Persist:
    """Write a job to the store."""

    record: JobRecord


@dataclass(frozen=True, slots=True)
class WriteTask:
    """A job failed in this stage; its task is worth keeping so that it can be run again."""

    record: JobRecord
    stage: int


@dataclass(frozen=True, slots=True)
class Ended:
    """Tell everybody who listens how a job ended."""

    record: JobRecord


Action = Assign | Foretell | CancelAt | Let | Ask | GiveMap | Dismiss | Fetch | Drop | Persist | WriteTask | Ended

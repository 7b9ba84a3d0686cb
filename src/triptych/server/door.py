"""What the server needs of an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from triptych.cluster import Estimate, FlushReport, JobRecord, JobState, Outcome
    from triptych.messages import Encoding, Stepped
    from triptych.model import Topology, VaeCall
    from triptych.request import Request

__all__ = ["Door", "JobView", "ResultFile", "Submitted"]


class Submitted(Protocol):
    """A job that was taken."""

    @property
    def id(self) -> str:
        """Its id, which nobody can guess."""
        ...


class JobView(Protocol):
    """A job as it is now."""

    @property
    def record(self) -> JobRecord:
        """What the cluster knows of it."""
        ...

    @property
    def position(self) -> int | None:
        """How many jobs go before it, while it waits."""
        ...

    @property
    def step(self) -> int:
        """Steps done in its present stage."""
        ...

    @property
    def steps(self) -> int:
        """Steps of its present stage; 0 while unknown."""
        ...


class ResultFile(Protocol):
    """One output of a finished job."""

    @property
    def path(self) -> Path | None:
        """Where it lies, if that is a local file."""
        ...

    @property
    def data(self) -> bytes | None:
        """What it holds, otherwise."""
        ...

    @property
    def media_type(self) -> str:
        """Such as `image/png`."""
        ...


class Door(Protocol):
    """An engine as the server sees it. Every method may be called from any thread and does not wait for a job."""

    @property
    def topology(self) -> Topology:
        """The model's."""
        ...

    def submit(
        self, request: Request, *, preview: bool = False, client: str = "", priority: int = 0,
        deadline: float | None = None, exact: bool = False, id: str | None = None, digest: str = "",
        trace: str = "", check: Callable[[Request], None] | None = None,
    ) -> Submitted:  # fmt: skip
        """Takes a job. `id`: as `id_of` gives it, InvalidRequest if there is one of that id; `digest`: of what was
        asked, kept with the job; `trace`: the W3C `traceparent` that it belongs to. `check` is given the request with
        its defaults filled in, before any work; what it raises refuses the job. Raises TriptychError if it is wrong, or
        if there is no room for it."""
        ...

    def id_of(self, client: str, name: str) -> str:
        """The id of the job that a client names so, whether there is one or not."""
        ...

    def estimate(self, job: str) -> Estimate:
        """When a job that has not ended will start and end, as far as that can be told."""
        ...

    def submit_vae(
        self, call: VaeCall, data: bytearray, *, encoding: Encoding, client: str = "", trace: str = ""
    ) -> str:  # fmt: skip
        """Takes a call of the model's VAE by itself on a tensor's bytes, and gives the job's id; what it makes is a
        file of that encoding. Raises like `submit`."""
        ...

    def view(self, job: str) -> JobView | None:
        """The job, None if it is unknown or has expired."""
        ...

    def watch(self, job: str, watcher: Callable[[Stepped | Outcome], None]) -> Callable[[], None]:
        """Calls `watcher` with every unit done from now on and finally with the Outcome, on the thread that brings it;
        returns what ends that. Raises InvalidRequest for a job that is unknown or has expired."""
        ...

    def jobs(
        self, *, client: str | None = None, states: Iterable[JobState] | None = None, before: str | None = None,
        limit: int = 50,
    ) -> list[JobRecord]:  # fmt: skip
        """Jobs, newest first; `before`: older than that job."""
        ...

    def under_way(self, client: str) -> int:
        """How many of a client's jobs have not ended."""
        ...

    def forget(self, job: str) -> bool:
        """Forgets a job and its results, cancelling it first if it has not ended; False if it is unknown."""
        ...

    def cancel(self, job: str) -> bool:
        """Ends a job; False if it is unknown or has ended."""
        ...

    def result_files(self, job: str) -> Sequence[ResultFile]:
        """A finished job's outputs, none once they have expired."""
        ...

    def status(self) -> Any:
        """The cluster's state, as data that msgspec writes."""
        ...

    def flush(self, timeout: float = 30.0) -> FlushReport:
        """Has every worker let go of what it keeps only to be faster, and waits at most `timeout` seconds for them.
        Raises QueueFull while another flush is under way."""
        ...

    def missing_stages(self) -> tuple[str, ...]:
        """The stages that no worker is ready for."""
        ...

    def drain(self, timeout: float) -> bool:
        """Takes no more jobs and waits until those that run have ended; False if the time, in seconds, was over."""
        ...

    def close(self) -> None:
        """Stops."""
        ...

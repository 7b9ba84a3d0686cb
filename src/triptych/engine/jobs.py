"""A job as its owner sees it: events as they happen, then its result."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from triptych.cluster import JobRecord
from triptych.errors import TriptychError
from triptych.model import Resolved
from triptych.request import Progress, Result

__all__ = ["Event", "Job", "JobView", "ResultFile"]

Event = Progress | Result | TriptychError


@dataclass(eq=False)
class Job:
    """A request on its way. `events` yields its progress and then its result; `cancel` takes effect before the next
    step."""

    id: str
    resolved: Resolved
    _cancel: Callable[[str], object]
    _inbox: queue.SimpleQueue[Event] = field(default_factory=queue.SimpleQueue)

    def events(self) -> Iterator[Progress | Result]:
        """Progress as it happens, then the Result; once that has been read, the Result alone. Raises what the job
        failed with, or Cancelled."""
        while True:
            event = self._inbox.get()
            if not isinstance(event, Progress):
                self._inbox.put(event)  # the outcome stays, for whoever else waits or asks again
            if isinstance(event, TriptychError):
                raise event
            yield event
            if isinstance(event, Result):
                return

    def result(self) -> Result:
        """Waits for the result. Raises what the job failed with, or Cancelled."""
        for event in self.events():
            if isinstance(event, Result):
                return event
        raise AssertionError("a job ends with its result or an error")

    def cancel(self) -> None:
        """Ends the job before its next step; a finished job is left alone."""
        self._cancel(self.id)


@dataclass(frozen=True)
class JobView:
    """A job as it stands: its record, its place in the queue of the stage it waits for (0: next; None: it does not
    wait), and the last step told of `steps` in its present stage."""

    record: JobRecord
    position: int | None
    step: int
    steps: int


@dataclass(frozen=True)
class ResultFile:
    """One output of a finished job, as a file or as bytes. `find` says where the file is, once it has fetched one that
    lies elsewhere; it raises KeyError for one that has expired, or StorageFailed."""

    media_type: str
    find: Callable[[], Path] | None = None
    data: bytes | None = None

    @property
    def path(self) -> Path | None:
        """The file, if it is one. Raises like `find`, which may take a moment."""
        return None if self.find is None else self.find()


Listener = Callable[[Event], None]

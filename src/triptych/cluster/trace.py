"""A timeline of queue waits, stage units and transfers, as the JSON that Perfetto and Chrome's tracing open."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any

from triptych.cluster.jobs import JobSpec
from triptych.cluster.observers import Observer
from triptych.errors import InvalidRequest
from triptych.messages import Hello, Stepped, TaskDone
from triptych.request import StageName

__all__ = ["Trace"]

logger = logging.getLogger(__name__)

QUEUES = 1
"""The process number of the queues in the file; workers follow."""


class Trace(Observer):
    """Writes events as they happen: the file is a valid JSON array after `close`, and opens without its last bracket
    if the process did not get there, or the disk was full. Times given are one clock's seconds. Raises InvalidRequest
    if the file cannot be written."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("w", encoding="utf-8", buffering=1 << 16)
        except OSError as error:
            raise InvalidRequest.of("trace", str(path), f"a file that can be written ({error.strerror})") from None
        self._lock = Lock()
        self._first = True
        self._tracks: dict[tuple[str, str], tuple[int, int]] = {}
        self._workers: dict[str, int] = {}
        self._ends: dict[tuple[str, str], float] = {}
        self._zero: float | None = None
        with self._writing():
            self._file.write("[\n")
            self._write("M", QUEUES, 0, "process_name", args={"name": "queues"})

    def assigned(self, spec: JobSpec, stage: StageName, attempt: int, worker: str, waited: float, now: float) -> None:
        """See Observer."""
        job = spec.id
        with self._writing():
            _, thread = self._track("queues", stage)
            for phase, at in (("b", now - waited), ("e", now)):
                self._write(phase, QUEUES, thread, job, at, cat="queue", id=f"{stage}/{job}", args={"stage": stage})

    def unit(self, spec: JobSpec, worker: str, message: Stepped, seconds: float, now: float) -> None:
        """See Observer."""
        with self._writing():
            process, thread = self._track(worker, message.stage)
            start = max(now - seconds, self._ends.get((worker, message.stage), -1e300))
            self._ends[worker, message.stage] = now
            args = {"job": message.job, "attempt": message.attempt, "step": message.step, "steps": message.steps}
            name = f"{message.job} {message.step}/{message.steps}"
            self._write("X", process, thread, name, start, dur=_micro(now - start), cat="unit", args=args)

    def done(self, worker: str, message: TaskDone, began: float, now: float) -> None:
        """See Observer."""
        with self._writing():
            args = {
                "job": message.job, "stage": message.stage, "attempt": message.attempt, "bytes": message.fetched_bytes,
                "route": message.fetched_by, "resumed_at": message.resumed_at,
            }  # fmt: skip
            for what, seconds in (("task", now - began), ("transfer", message.fetched_seconds)):
                if what == "task" or message.fetched_by is not None:
                    process, thread = self._track(worker, f"{message.stage} {what}s")
                    ident = f"{what}/{message.job}/{message.stage}/{message.attempt}"
                    for phase, at in (("b", began), ("e", began + seconds)):
                        self._write(phase, process, thread, message.job, at, cat=what, id=ident, args=args)

    def came(self, hello: Hello, now: float) -> None:
        """See Observer."""
        self.mark(hello.name, "hello", now)

    def went(self, hello: Hello, kind: str, reason: str, now: float) -> None:
        """See Observer."""
        self.mark(hello.name, f"out: {kind}", now, reason=reason)

    def mark(self, worker: str, what: str, now: float, **args: Any) -> None:
        """Something happened to a worker."""
        with self._writing():
            process, thread = self._track(worker, "events")
            self._write("i", process, thread, what, now, s="p", args=args)

    def flush(self) -> None:
        """What was written so far is in the file."""
        with self._writing():
            if not self._file.closed:
                self._file.flush()

    def close(self) -> None:
        """Ends the array. Later events are dropped."""
        with self._writing():
            if not self._file.closed:
                self._file.write("\n]\n")
                self._file.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """The file for one thread at a time. A full disk ends the trace, not what is traced."""
        with self._lock:
            try:
                yield
            except OSError as error:
                logger.error("the trace ends here, %s cannot be written: %s", self._file.name, error.strerror)
                with contextlib.suppress(OSError):
                    self._file.close()

    def _track(self, worker: str, name: str) -> tuple[int, int]:
        key = (worker, name)
        if key not in self._tracks:
            if worker != "queues" and worker not in self._workers:
                self._workers[worker] = QUEUES + 1 + len(self._workers)
                self._write("M", self._workers[worker], 0, "process_name", args={"name": worker})
            process = self._workers.get(worker, QUEUES)
            self._tracks[key] = process, len(self._tracks) + 1
            self._write("M", *self._tracks[key], "thread_name", args={"name": name})
        return self._tracks[key]

    def _write(self, phase: str, process: int, thread: int, name: str, at: float | None = None, **more: Any) -> None:
        if self._file.closed:
            return
        event: dict[str, Any] = {"ph": phase, "pid": process, "tid": thread, "name": name, **more}
        if at is not None:
            self._zero = at if self._zero is None else self._zero
            event["ts"] = _micro(at - self._zero)
        self._file.write(("" if self._first else ",\n") + json.dumps(event))
        self._first = False


def _micro(seconds: float) -> float:
    return round(seconds * 1e6, 1)

"""A stage in a process of its own, driven over a socket pair: what `triptych check` proves a split with."""

from __future__ import annotations

import socket
import subprocess
import sys
from types import TracebackType

from triptych.errors import StageFailed, TriptychError, error_class
from triptych.stage import Output, StageTask
from triptych.transfer import Payload
from triptych.worker import wire
from triptych.worker.wire import StageSpec


class StageProcess:
    """A long-lived child process that opens one stage at a time and runs tasks on it. Use as a context manager."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "triptych.worker", str(theirs.fileno())]
        # A session of its own: Ctrl-C is the parent's to handle, who closes the socket.
        self._child = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        self._socket = ours
        self._stage = ""

    def open(self, spec: StageSpec) -> tuple[str, ...]:
        """Lets the former stage go and loads this one. Returns the names of the components whose weights it loaded.

        Raises what opening or loading raised there, as a TriptychError.
        """
        self._stage = spec.stage
        self._send("", wire.Open(spec))
        answer, _ = self._receive("")
        assert isinstance(answer, wire.Opened)
        return answer.components

    def run(self, task: StageTask) -> Output:
        """Runs one task to its end. Raises what it failed with; StageFailed if the process died."""
        message = wire.Run(task.job, task.seed, task.guidance_scale, task.shift, task.raw)
        self._send(task.job, message, wire.pack_task(task.fields, task.payload))
        while True:  # steps are told on the way; they tell that it lives
            answer, payload = self._receive(task.job)
            if isinstance(answer, wire.Done):
                return Output(task.job, payload or Payload({}), answer.seconds, answer.steps, answer.peak_bytes)

    def _send(self, job: str, message: wire.Message, payload: Payload | None = None) -> None:
        try:
            wire.send(self._socket, message, payload)
        except OSError:
            raise self._died(job) from None

    def _died(self, job: str) -> StageFailed:
        code = self._child.wait()
        return StageFailed(f"the process of stage {self._stage} died ({code})", stage=self._stage, job=job)

    def _receive(self, job: str) -> tuple[wire.Message, Payload | None]:
        try:
            answer, payload = wire.receive(self._socket)
        except (EOFError, OSError):
            raise self._died(job) from None
        if isinstance(answer, wire.Broken):
            raise _error(answer, self._stage, job)
        return answer, payload

    def close(self) -> None:
        """Ends the child. Closing twice is fine."""
        self._socket.close()
        try:
            self._child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def __enter__(self) -> StageProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _error(answer: wire.Broken, stage: str, job: str) -> TriptychError:
    """The child's error, as the class that has its code."""
    kind = error_class(answer.code)
    if kind is StageFailed or kind.code != answer.code:
        return StageFailed(answer.message, stage=stage, job=job, field=answer.field)
    return kind(answer.message, field=answer.field)

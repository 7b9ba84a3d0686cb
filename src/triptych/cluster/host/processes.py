"""Worker processes: started in a session of their own, or found alive after the one who started them was killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Protocol

import psutil

__all__ = ["AdoptedProcess", "OwnProcess", "WorkerProcess", "adopt"]

SAME_START_SECONDS = 2.0  # start times are computed from the clock, which may have been set since


class WorkerProcess(Protocol):
    """A process that leads a group. `ended` must be asked until it says so: it takes the dead process away."""

    pid: int
    created: float
    """when it was started, in seconds since the epoch"""
    code: int | None
    """its exit code once it has ended (negative: the signal); None if that cannot be known"""

    def ended(self) -> bool: ...
    def signal(self, number: int) -> None: ...
    def kill(self) -> None: ...


class OwnProcess:
    """A child of this process. `variables` are added to its environment where that does not have them. Raises OSError
    if it cannot be started."""

    def __init__(self, command: Sequence[str], output: IO[bytes], variables: Mapping[str, str]) -> None:
        self._child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            env={**variables, **os.environ},
        )  # fmt: skip
        self.pid = self._child.pid
        self._lock = threading.Lock()
        self.code: int | None = None
        self.created = 0.0
        with contextlib.suppress(psutil.Error):
            self.created = psutil.Process(self.pid).create_time()

    def ended(self) -> bool:
        """Whether it has ended; then nothing of its group is left either."""
        with self._lock:
            if self.code is None and self._is_dead():
                _kill_group(self.pid)  # before the number is free for others
                self.code = self._child.wait()
            return self.code is not None

    def _is_dead(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def signal(self, number: int) -> None:
        """Sends a signal to the process itself."""
        with self._lock:
            if self.code is None:  # Popen's own would take a dead process away, and what it has left behind stayed
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills it and all that it has started."""
        with self._lock:
            if self.code is None:
                _kill_group(self.pid)


class AdoptedProcess:
    """A process that another one started."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self.pid = process.pid
        self.created = process.create_time()
        self.code: int | None = None
        self._ended = False

    def ended(self) -> bool:
        """Whether it has ended; then nothing of its group is left either."""
        if not self._ended:
            with contextlib.suppress(psutil.TimeoutExpired):
                self.code = self._process.wait(timeout=0)
                self._ended = True
                _kill_group(self.pid)
        return self._ended

    def signal(self, number: int) -> None:
        """Sends a signal to the process itself."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._process.send_signal(number)

    def kill(self) -> None:
        """Kills it and all that it has started."""
        if self._process.is_running():
            _kill_group(self.pid)


def adopt(pid: int, created: float) -> AdoptedProcess | None:
    """The process of this number, if it is the one that was started then and leads its group."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - created) < SAME_START_SECONDS
        alive = process.status() != psutil.STATUS_ZOMBIE
        return AdoptedProcess(process) if same and alive and os.getpgid(pid) == pid else None
    except (psutil.Error, ProcessLookupError):
        return None


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)

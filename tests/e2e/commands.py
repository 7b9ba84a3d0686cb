"""`triptych` commands as processes of their own, and a server as its users see it: by HTTP, signals and its log."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 90.0
"""What anything may take on a machine that is busy with other things."""
PROMPT = "a red apple on the left, blue background"
ENDED = ("done", "failed", "cancelled")


def until(holds: Callable[[], Any], what: Any, seconds: float = SECONDS) -> Any:
    """Waits until something holds, and returns what it was then. `what` is said (or asked) if it never does."""
    give_up = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < give_up, f"not within {seconds:g} s: {what() if callable(what) else what}"
        time.sleep(0.02)
    return found


class Command:
    """A `triptych` command that runs. Its temporary files go to `folder/tmp`, what it says on standard error to a log
    there; lines on standard output are read as they come."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.folder = folder
        self.temporary = folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        self.log = Path(tempfile.mkstemp(prefix=f"{words[0]}-", suffix=".log", dir=folder)[1])
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TMPDIR": str(self.temporary)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "triptych", *words],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=folder,
            )  # fmt: skip
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    @property
    def said(self) -> str:
        """All that it has said on standard error."""
        return self.log.read_text()

    def line(self) -> str:
        """The next line of its standard output; raises if it ends without one."""
        try:
            line = self._lines.get(timeout=2 * SECONDS)
        except queue.Empty:
            line = None
        assert line is not None, f"it says no line; its log:\n{self.said}"
        return line

    def rest(self) -> list[str]:
        """What is left of its standard output, once it has ended."""
        return list(iter(lambda: self._lines.get(timeout=SECONDS), None))

    def wait_to_say(self, text: str) -> None:
        """Waits until its log has this text."""
        until(lambda: text in self.said, lambda: f"{text!r} is not in\n{self.said}")

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Waits for its exit code."""
        return self.process.wait(timeout=2 * SECONDS)

    def close(self) -> None:
        """Kills what still runs of it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=SECONDS)
        self._reader.join(timeout=SECONDS)
        assert self.process.stdout is not None
        self.process.stdout.close()


class Server(Command):
    """`triptych serve emoji` (or another model) on a free port, ready when this returns."""

    def __init__(self, folder: Path, *words: str, model: str = "emoji") -> None:
        super().__init__(folder, "serve", model, "--device", "cpu", "--port", "0", *words)
        try:
            line = self.line()
            assert line.startswith("ready: "), line
        except BaseException:
            self.close()
            raise
        self.url = line.removeprefix("ready: ")
        self.client = httpx.Client(base_url=self.url, timeout=SECONDS)

    def submit(self, **fields: Any) -> dict[str, Any]:
        """A job that was taken."""
        answer = self.client.post("/v1/jobs", json={"prompt": PROMPT, "seed": 7, **fields})
        assert answer.status_code == 202, answer.text
        return answer.json()

    def job(self, job: str) -> dict[str, Any]:
        return self.client.get(f"/v1/jobs/{job}").raise_for_status().json()

    def ended(self, job: str) -> dict[str, Any]:
        """The job once it has ended."""
        until(lambda: self.job(job)["state"] in ENDED, lambda: self.job(job))
        return self.job(job)

    def reached(self, job: str, stage: str, step: int = 1) -> dict[str, Any]:
        """The job while it is at least so far in a stage; raises if it has ended before that was seen."""

        def there() -> dict[str, Any] | None:
            found = self.job(job)
            assert found["state"] not in ENDED, found
            return found if found["stage"] == stage and found["step"] >= step else None

        return until(there, lambda: self.job(job))

    def picture(self, job: dict[str, Any]) -> bytes:
        """A finished job's first file."""
        assert job["state"] == "done", job
        return self.client.get(job["results"][0]).raise_for_status().content

    def cluster(self) -> dict[str, Any]:
        return self.client.get("/v1/cluster").raise_for_status().json()

    def workers(self) -> dict[str, dict[str, Any]]:
        """What the cluster says of each worker, by name."""
        return {worker["name"]: worker for worker in self.cluster()["workers"]}

    def worker(self, name: str) -> dict[str, Any]:
        """A worker that takes tasks, as soon as there is one of that name."""
        found = until(lambda: (one := self.workers().get(name)) and one["state"] in ("idle", "busy") and one, name)
        return found

    def is_idle(self) -> bool:
        """Whether nothing runs, waits, or is kept for anybody."""
        found = self.cluster()
        held = [worker["tasks"] + worker["kept"] for worker in found["workers"]]
        return not any(held) and not any(stage["running"] + stage["waiting"] for stage in found["stages"])

    def close(self) -> None:
        if hasattr(self, "client"):
            self.client.close()
        super().close()


def processes_of(folder: Path) -> list[psutil.Process]:
    """The processes that were started in a folder and live."""
    found = []
    for process in psutil.process_iter():
        try:
            inside = Path(process.cwd()).is_relative_to(folder) and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, OSError):
            continue
        if inside:
            found.append(process)
    return found


@contextmanager
def short_folder() -> Iterator[Path]:
    """A folder whose path leaves room for the names of Unix sockets. Nothing that was started in it outlives it."""
    folder = Path(tempfile.mkdtemp(prefix="triptych-e2e-", dir="/tmp"))
    try:
        yield folder
    finally:
        for process in processes_of(folder):
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def sockets_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_socket()]


def run(folder: Path, *words: str) -> tuple[int, list[str], str]:
    """A command to its end: its exit code, standard output and standard error."""
    command = Command(folder, *words)
    try:
        code = command.end()
        return code, command.rest(), command.said
    finally:
        command.close()

"""Starts this machine's worker processes, watches them, starts them again, and gives up where that does not help."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from triptych.cluster.folders import private_folder
from triptych.cluster.host.processes import OwnProcess, WorkerProcess, adopt
from triptych.cluster.host.slot_log import SlotLog
from triptych.errors import InvalidRequest

__all__ = ["RestartPolicy", "SlotState", "Supervisor", "WorkerSlot"]

LOOK_SECONDS = 0.05
KILLED_SECONDS = 10.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

State = Literal["running", "waiting", "given up", "stopped"]

_log = logging.getLogger(__name__)
_workers = logging.getLogger("triptych.workers")


@dataclass(frozen=True)
class WorkerSlot:
    """A place for one worker process: its name, the command that fills it, and environment variables for that, where it
    has not got them from us."""

    name: str
    command: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RestartPolicy:
    """A death is followed by a restart after `first` seconds, twice as many after each further one up to `longest`. A
    process that lived for `steady` seconds starts the count anew; `quick_deaths` in a row, and its slot is given up."""

    first: float = 0.5
    longest: float = 30.0
    steady: float = 60.0
    quick_deaths: int = 6


@dataclass(frozen=True)
class SlotState:
    """How a slot is. `since`: when it came to be so, in seconds since the epoch; `last`: the last lines of its log."""

    name: str
    state: State
    pid: int | None
    since: float
    starts: int
    last: tuple[str, ...]


@dataclass
class _Place:
    slot: WorkerSlot
    log: SlotLog
    process: WorkerProcess | None = None
    state: State = "waiting"
    since: float = field(default_factory=time.time)
    started: float = 0.0
    start_at: float = 0.0
    starts: int = 0
    quick: int = 0

    def become(self, state: State) -> None:
        self.state, self.since = state, time.time()


class Supervisor:
    """Keeps a process in every slot from `start` until `stop`. What is public may be called from any thread.

    `folder` (0700): the logs, and a note of what runs, by which the supervisor of a restarted process finds its workers
    instead of starting doubles. A worker therefore outlives its supervisor; that it does not for ever is the worker's
    business. `on_exit(slot, pid, code)` and `on_given_up(slot, last lines)` are called on the supervisor's thread;
    `on_line(slot, line)` too, and logs `[slot] line` as `triptych.workers` by default. Raises InvalidRequest for slots
    without a command or a usable name, and for a folder that is not ours.
    """

    def __init__(
        self,
        slots: Sequence[WorkerSlot],
        folder: Path,
        *,
        policy: RestartPolicy | None = None,
        on_exit: Callable[[str, int, int | None], None] | None = None,
        on_given_up: Callable[[str, tuple[str, ...]], None] | None = None,
        on_line: Callable[[str, str], None] | None = None,
        max_log_bytes: int = 8 << 20,
    ) -> None:
        _check(slots)
        private_folder(folder, "state")
        self._note = folder / "workers.json"
        self._policy = policy or RestartPolicy()
        self._on_exit = on_exit
        self._on_given_up = on_given_up
        self._on_line = on_line or _log_line
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._places = {
            slot.name: _Place(slot, SlotLog(folder / f"{slot.name}.log", max_log_bytes, self._teller(slot.name)))
            for slot in slots
        }
        self._thread = threading.Thread(target=self._run, name="triptych-supervisor", daemon=True)

    @property
    def may_adopt(self) -> bool:
        """Whether a supervisor that was killed has left a note of its workers."""
        return self._note.exists()

    def start(self) -> None:
        """Adopts the workers of a supervisor that was killed, ends those that no slot wants, and starts the others.
        Starting twice is fine."""
        if self._thread.ident is None:
            _end(self._adopt(), 5.0)
            self._thread.start()

    def states(self) -> list[SlotState]:
        """How every slot is."""
        with self._lock:
            return [
                SlotState(
                    name, place.state, place.process.pid if place.process else None, place.since, place.starts,
                    tuple(place.log.last),
                )
                for name, place in self._places.items()
            ]  # fmt: skip

    def steady(self, slot: str) -> None:
        """Its worker has got ready: former deaths no longer count."""
        with self._lock:
            if slot in self._places:
                self._places[slot].quick = 0

    def kill(self, slot: str) -> None:
        """Kills a slot's process, which hangs, and all that it has started; another one follows, as after any death."""
        with self._lock:
            process = self._places[slot].process if slot in self._places else None
            if process is not None:
                process.kill()

    def revive(self, slot: str) -> None:
        """Tries again with a slot that was given up, or sooner with one that waits."""
        with self._lock:
            place = self._places.get(slot)
            if place is not None and place.process is None and not self._stopping.is_set():
                place.quick, place.start_at = 0, 0.0
                place.become("waiting")

    def stop(self, timeout: float = 30.0) -> None:
        """Asks every process to end (SIGTERM), kills what has not after `timeout` seconds, and returns when none is
        left. Stopping twice is fine; the second time, with a smaller `timeout`, hurries the first."""
        self._stopping.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        with self._lock:
            running = [place.process for place in self._places.values() if place.process is not None]
        _end(running, timeout, self._follow)
        with self._lock:
            for place in self._places.values():
                place.process = None
                place.become("stopped")
            self._note.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._stopping.wait(LOOK_SECONDS):
            for place in self._places.values():
                try:
                    self._look(place)
                    place.log.follow()
                except Exception:
                    _log.exception("the supervisor failed at slot %s", place.slot.name)

    def _look(self, place: _Place) -> None:
        """One slot's turn: what has ended is told and followed by another."""
        with self._lock:
            process = place.process
            ended = process is not None and process.ended()
            start = process is None and place.state == "waiting" and time.monotonic() >= place.start_at
        if process is not None and ended:
            self._bury(place, process)
        elif start and not self._stopping.is_set():
            self._fill(place)

    def _fill(self, place: _Place) -> None:
        place.starts += 1
        place.started = time.monotonic()
        try:
            with place.log.writer() as output:
                process = OwnProcess(place.slot.command, output, place.slot.variables)
        except OSError as error:
            place.log.note(f"{place.slot.command[0]} cannot be started: {error.strerror}")
            self._again(place)
            return
        with self._lock:
            place.process = process
            place.become("running")
            self._write_note()

    def _bury(self, place: _Place, process: WorkerProcess) -> None:
        with self._lock:
            place.process = None
            self._write_note()
        name, code = place.slot.name, process.code
        place.log.follow()
        if self._on_exit is not None:
            on_exit = self._on_exit
            _tell(lambda: on_exit(name, process.pid, code))
        how = "ended" if code is None else f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        place.log.note(f"process {process.pid} {how}")
        self._again(place)

    def _again(self, place: _Place) -> None:
        policy = self._policy
        with self._lock:
            lived = time.monotonic() - place.started
            place.quick = 1 if lived >= policy.steady else place.quick + 1
            given_up = place.quick >= policy.quick_deaths
            pause = min(policy.longest, policy.first * 2 ** min(place.quick - 1, 30))
            place.start_at = time.monotonic() + pause
            place.become("given up" if given_up else "waiting")
        if given_up:
            place.log.note(f"given up: {place.quick} processes in a row died early")
            if self._on_given_up is not None:
                on_given_up = self._on_given_up
                _tell(lambda: on_given_up(place.slot.name, tuple(place.log.last)))

    def _follow(self) -> None:
        for place in self._places.values():
            place.log.follow()

    def _adopt(self) -> list[WorkerProcess]:
        """Takes over what the note tells of; returns what lives but has no slot (any more)."""
        unwanted: list[WorkerProcess] = []
        for name, entry in _read_note(self._note).items():
            process = adopt(entry["pid"], entry["created"])
            place = self._places.get(name)
            if process is None:
                continue
            if place is None or list(place.slot.command) != entry["command"]:
                unwanted.append(process)
            else:
                place.process, place.started = process, time.monotonic() - (time.time() - process.created)
                place.become("running")
        return unwanted

    def _write_note(self) -> None:
        running = {
            name: {
                "pid": place.process.pid,
                "created": place.process.created,
                "command": list(place.slot.command),
            }
            for name, place in self._places.items()
            if place.process is not None
        }
        new = self._note.with_suffix(".new")
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
                json.dump(running, file)
            os.replace(new, self._note)
        except OSError as error:  # the processes go on; only a next supervisor would not find them
            _log.error("%s cannot be written: %s", self._note, error.strerror)

    def _teller(self, name: str) -> Callable[[str], None]:
        return lambda line: self._on_line(name, line)


def _check(slots: Sequence[WorkerSlot]) -> None:
    names = [slot.name for slot in slots]
    for slot in slots:
        if not _NAME.fullmatch(slot.name) or names.count(slot.name) > 1:
            raise InvalidRequest.of("slot", slot.name, "different names of letters, digits, dots, hyphens, underscores")
        if not slot.command:
            raise InvalidRequest.of("command", list(slot.command), f"a program for slot {slot.name}")


def _tell(call: Callable[[], None]) -> None:
    try:
        call()
    except Exception:
        _log.exception("whoever was told of a worker process failed")


def _log_line(slot: str, line: str) -> None:
    _workers.info("[%s] %s", slot, line, extra={"worker": slot, "event": line})


def _read_note(path: Path) -> dict[str, dict[str, Any]]:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(name): {"pid": int(entry["pid"]), "created": float(entry["created"]), "command": entry["command"]}
            for name, entry in note.items()
        }
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError):
        _log.warning("%s cannot be read; what it told of is not found again", path)
        return {}


def _end(processes: Sequence[WorkerProcess], timeout: float, meanwhile: Callable[[], None] = lambda: None) -> None:
    """SIGTERM, SIGKILL after `timeout` seconds, and not back before they are gone."""
    left = list(processes)
    for process in left:
        if not process.ended():
            process.signal(signal.SIGTERM)
    kill_at = time.monotonic() + timeout
    give_up_at = kill_at + KILLED_SECONDS
    while left := [process for process in left if not process.ended()]:
        meanwhile()
        if time.monotonic() >= kill_at:
            for process in left:
                process.kill()
        if time.monotonic() >= give_up_at:
            _log.error("processes %s cannot be killed", ", ".join(str(process.pid) for process in left))
            break
        time.sleep(0.02)
    meanwhile()

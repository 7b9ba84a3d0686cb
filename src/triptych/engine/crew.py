"""Who does the work: a worker on a thread of this process, or worker processes that are started and watched."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from triptych import cluster
from triptych.cluster import Coordinator, Link
from triptych.device import free_bytes
from triptych.errors import LoadError
from triptych.messages import FromWorker, Hello, Loading, Ready
from triptych.model import StageName, Topology
from triptych.stage import LoadProgress
from triptych.transfer import Exchange
from triptych.worker import InProcessUplink, Opened, Worker, WorkerSettings

if TYPE_CHECKING:
    from triptych.cluster import ServerKeys, Supervisor

__all__ = ["Crew", "InProcess", "LoadReport", "OnExit", "OnGivenUp", "Processes", "Told"]

LoadReport = Callable[[LoadProgress], None]
OnExit = Callable[[str, int, int | None], None]
OnGivenUp = Callable[[str, tuple[str, ...]], None]

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.25
WORKER_STOP_SECONDS = 10.0
NOT_ITS_OWN = ("process ", "given up")
"""How the supervisor's lines in a worker's log begin."""
WRONG_SETTINGS = 2
"""A worker's exit code for an error that a restart does not help."""


class Crew(Protocol):
    """What holds the stages of an engine."""

    def start(self, report: LoadReport) -> None:
        """Returns when every stage that is to be here has loaded. Raises what loading raises."""
        ...

    def free_bytes(self) -> int | None:
        """Memory that a request may take where it is scarcest; None if nobody has said."""
        ...

    def watch(self, died: Callable[[str], None]) -> None:
        """Calls `died` with the reason if nobody is left who could work, and nobody will come."""
        ...

    def stop(self) -> None:
        """Ends all of it; the weights are let go."""
        ...


class Told:
    """Between the workers and their coordinator: passes everything on, and tells what is being loaded."""

    def __init__(self, coordinator: Coordinator, topology: Topology) -> None:
        self._coordinator = coordinator
        self._components = topology.components
        self._since = time.perf_counter()
        self._slots: dict[str, str] = {}
        self.report: LoadReport | None = None
        self.steady: Callable[[str], None] | None = None
        """told of the slot of a worker that has got ready"""

    def hello(self, hello: Hello, link: Link) -> None:
        """A worker offers itself."""
        if hello.slot is not None:
            self._slots = {one: slot for one, slot in self._slots.items() if slot != hello.slot}
            self._slots[hello.incarnation] = hello.slot
        self._coordinator.hello(hello, link)

    def hear(self, incarnation: str, message: FromWorker) -> None:
        """A worker says something."""
        if isinstance(message, Loading) and self.report is not None:
            self._tell(message, self.report)
        if isinstance(message, Ready) and self.steady is not None and incarnation in self._slots:
            self.steady(self._slots[incarnation])
        self._coordinator.hear(incarnation, message)

    def _tell(self, message: Loading, report: LoadReport) -> None:
        began, self._since = self._since, time.perf_counter()
        component = self._components.get(message.what)
        if component is not None:
            seconds = self._since - began
            report(LoadProgress(message.what, component.bytes, seconds, message.done, message.total))

    def left(self, incarnation: str, reason: str) -> None:
        """A worker is gone."""
        self._coordinator.left(incarnation, reason)

    def tick(self) -> None:
        """Time has passed."""
        self._coordinator.tick()


class InProcess:
    """One worker with all stages, on a thread of this process."""

    def __init__(
        self, told: Told, coordinator: Coordinator, opened: Opened, settings: WorkerSettings, exchange: Exchange
    ) -> None:
        self._told = told
        self._coordinator = coordinator
        self._stages: tuple[StageName, ...] = tuple(opened.stages)
        self._device = opened.placement.device
        self._worker: Worker | None = Worker(settings, self._connect, exchange, opened)
        self._thread = threading.Thread(target=self._run, name="triptych-worker", daemon=True)
        self._clock = threading.Thread(target=self._tick, name="triptych-clock", daemon=True)
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._told_to_stop = False
        self._died: Callable[[str], None] | None = None

    def _connect(self, hello: Hello) -> InProcessUplink:
        return InProcessUplink(self._told, hello)

    def _run(self) -> None:
        assert self._worker is not None
        try:
            self._worker.run()
        except BaseException as error:  # also an exit that a library or a callback asks for
            self._error = error
            logger.debug("the worker's thread has ended", exc_info=True)
        finally:
            self._ended.set()
            self._tell_death()

    def watch(self, died: Callable[[str], None]) -> None:
        """Calls `died` once the worker's thread has ended without having been told to."""
        self._died = died
        if self._ended.is_set():
            self._tell_death()

    def _tell_death(self) -> None:
        if self._died is not None and not self._told_to_stop:
            error = self._error
            reason = "" if error is None else f": {type(error).__name__}: {error}"
            self._died(f"the worker's thread has ended{reason}")

    def _tick(self) -> None:
        while not self._ended.wait(TICK_SECONDS):
            self._told.tick()

    def start(self, report: LoadReport) -> None:
        """Loads on the worker's own thread, where all of its work happens. Raises what loading raised."""
        self._told.report = report
        self._thread.start()
        try:
            while self._coordinator.require(self._stages, TICK_SECONDS) and not self._ended.is_set():
                pass
        except BaseException:
            self._leave()  # Ctrl-C: what is being loaded is not waited for
            raise
        self._told.report = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        self._clock.start()

    def free_bytes(self) -> int | None:
        """Free memory of the device."""
        return free_bytes(self._device)

    def _leave(self) -> None:
        self._told_to_stop = True
        if self._worker is not None:
            self._worker.stop()

    def stop(self) -> None:
        """Ends the worker after the unit that runs."""
        self._leave()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        self._error = None
        self._ended.set()
        if self._clock.is_alive():
            self._clock.join()
        self._worker = None


class Processes:
    """Worker processes on this machine, and a door for those that come from elsewhere."""

    def __init__(
        self,
        told: Told,
        coordinator: Coordinator,
        endpoints: Sequence[str],
        keys: ServerKeys | None,
        supervise: Callable[[OnExit, OnGivenUp], Supervisor],
        held: Mapping[str, Sequence[StageName]],
        awaited: bool = True,
    ) -> None:
        """`held`: by slot, the stages that the processes started here hold. `awaited`: others may join."""
        self._told = told
        self._coordinator = coordinator
        self._held = held
        self._awaited = awaited
        self._failed: set[str] = set()
        self._given_up_slots: set[str] = set()
        self._died: Callable[[str], None] | None = None
        self._supervisor = supervise(self._exited, self._given_up)
        told.steady = self._supervisor.steady
        self._listener = cluster.Listener(told, endpoints, keys)
        self.endpoints = self._listener.endpoints
        for endpoint in self.endpoints:
            if endpoint.startswith("tcp:"):
                logger.info("workers of other hosts join at %s", endpoint)

    def dismissed(self, hello: Hello, kind: str, reason: str) -> None:
        """A worker is out: one that hangs or is silent is killed, if its process is ours."""
        if hello.slot is not None and kind in ("silent", "hung", "unhealthy"):
            self._supervisor.kill(hello.slot)

    def _exited(self, slot: str, pid: int, code: int | None) -> None:
        self._coordinator.left_slot(slot, f"its process ended with code {code}", pid)
        if code == WRONG_SETTINGS:
            self._failed.add(slot)

    def _given_up(self, slot: str, last: tuple[str, ...]) -> None:
        self._failed.add(slot)
        self._given_up_slots.add(slot)
        if self._died is not None:
            self._tell_death(self._died)

    def watch(self, died: Callable[[str], None]) -> None:
        """Calls `died` once a stage's last slot has been given up, where nobody else may join."""
        self._died = died
        self._tell_death(died)

    def _tell_death(self, died: Callable[[str], None]) -> None:
        left = {stage for slot, stages in self._held.items() if slot not in self._given_up_slots for stage in stages}
        for slot in sorted(self._given_up_slots):
            if not self._awaited and not set(self._held[slot]) <= left:
                died(f"worker {slot} was given up: {self._last_words(slot)}")
                return

    def _last_words(self, slot: str) -> str:
        """The last line of a worker's own in its log."""
        last = next((state.last for state in self._supervisor.states() if state.name == slot), ())
        own = [line for line in last if line and not line.startswith(NOT_ITS_OWN)]
        return own[-1] if own else "it ended without a word"

    def start(self, report: LoadReport) -> None:
        """Starts the processes and waits until their stages have loaded. Raises LoadError with a worker's last words
        if it cannot start."""
        self._told.report = report
        self._supervisor.start()
        failed: set[str] = set()
        own: set[StageName] = {stage for stages in self._held.values() for stage in stages}
        while self._coordinator.require(own, TICK_SECONDS):
            for slot in failed:
                raise LoadError(f"worker {slot} did not start: {self._last_words(slot)}")
            failed = set(self._failed)  # a turn later all that it said is in its log
        self._told.report = None

    def free_bytes(self) -> int | None:
        """What the workers say is free, where it is least."""
        free = [worker.free_bytes for worker in self._coordinator.status().workers if worker.free_bytes]
        return min(free, default=None)

    def stop(self) -> None:
        """Ends every process that was started here."""
        try:
            self._supervisor.stop(WORKER_STOP_SECONDS)
        finally:
            self._listener.close()

"""Who does the work: worker processes that are started and watched, or whoever else holds the stages."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from triptych import cluster
from triptych.cluster import Coordinator, Link
from triptych.errors import LoadError
from triptych.messages import FromWorker, Hello, Loading, Ready
from triptych.model import StageName, Topology

if TYPE_CHECKING:
    from triptych.cluster import ServerKeys, Supervisor
    from triptych.stage import LoadProgress

__all__ = ["TICK_SECONDS", "WRONG_SETTINGS", "Crew", "LoadReport", "OnExit", "OnGivenUp", "Processes", "Told"]

LoadReport = Callable[["LoadProgress"], None]
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
            from triptych.stage import LoadProgress  # torch comes along

            seconds = self._since - began
            report(LoadProgress(message.what, component.bytes, seconds, message.done, message.total))

    def left(self, incarnation: str, reason: str) -> None:
        """A worker is gone."""
        self._coordinator.left(incarnation, reason)

    def tick(self) -> None:
        """Time has passed."""
        self._coordinator.tick()


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
        return self._coordinator.free_bytes()

    def stop(self) -> None:
        """Ends every process that was started here."""
        try:
            self._supervisor.stop(WORKER_STOP_SECONDS)
        finally:
            self._listener.close()

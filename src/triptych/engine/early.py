"""Worker processes that are started before anything is known of their model: it is they who find out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from triptych import cluster
from triptych.cluster import Supervisor, WorkerSlot
from triptych.engine.crew import WRONG_SETTINGS, OnExit, OnGivenUp
from triptych.model import StageName, Topology, topology_from_bytes

__all__ = ["TOPOLOGY", "Early"]

TOPOLOGY = "topology"
"""The file in the engine's folder where a worker says what its model consists of."""
LOOK_SECONDS = 0.02


class Early:
    """The processes of this host's slots. `held`: the stages of each slot. `supervise` makes a crew hear of them, of
    what happened before, too."""

    def __init__(self, slots: Sequence[WorkerSlot], held: Mapping[str, Sequence[StageName]], folder: Path) -> None:
        self.held = held
        self._path = folder / TOPOLOGY
        self._supervisor = cluster.Supervisor(
            slots, folder / "workers", on_exit=self._exited, on_given_up=self._given_up
        )
        self._lock = threading.Lock()
        self._missed: list[Callable[[OnExit, OnGivenUp], None]] = []
        self._told: tuple[OnExit, OnGivenUp] | None = None
        self._failed = threading.Event()

    @property
    def finds_others(self) -> bool:
        """Whether workers of a server that was killed may still be there, who have said what they know to that."""
        return self._supervisor.may_adopt

    def start(self) -> None:
        """Starts them."""
        self._path.unlink(missing_ok=True)
        self._supervisor.start()

    def stop(self) -> None:
        """Ends them. Twice is fine."""
        self._supervisor.stop()

    def topology(self) -> Topology | None:
        """The model's, once one of them has described it; None once one of them has ended for good."""
        while not self._failed.wait(LOOK_SECONDS):
            if self._path.exists():
                return topology_from_bytes(self._path.read_bytes())
        return None

    def supervise(self, exited: OnExit, given_up: OnGivenUp) -> Supervisor:
        """For a crew."""
        with self._lock:
            self._told = (exited, given_up)
            for tell in self._missed:
                tell(exited, given_up)
        return self._supervisor

    def _exited(self, slot: str, pid: int, code: int | None) -> None:
        self._tell(lambda exited, given_up: exited(slot, pid, code))
        if code == WRONG_SETTINGS:
            self._failed.set()

    def _given_up(self, slot: str, last: tuple[str, ...]) -> None:
        self._tell(lambda exited, given_up: given_up(slot, last))
        self._failed.set()

    def _tell(self, tell: Callable[[OnExit, OnGivenUp], None]) -> None:
        with self._lock:
            if self._told is None:
                self._missed.append(tell)
                return
            exited, given_up = self._told
        tell(exited, given_up)

"""The fault matrix: each kind of process, caught at each phase of its work, and struck by each kind of fault."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from tests.chaos.cables import IN_BODY, IN_HEAD, Trap, ports_of
from tests.chaos.cluster import LEASE, STAGES, Cluster, Wanted
from tests.chaos.remote import Deed, Puppet

__all__ = ["CELLS", "OUTSIDE", "PHASES", "Cell", "Evidence", "run_cell"]

WHO = (*STAGES, "coordinator")
PHASES = ("idle", "computing", "sending", "receiving")
FAULTS = ("SIGKILL", "SIGSTOP", "exception", "out-of-memory", "corrupted byte", "partition")
OUTSIDE = ("SIGKILL", "SIGSTOP", "partition")
"""Faults from outside, after which a process is away for as long as it takes to start one."""
FLAGS, CIPHERTEXT = 0, 20
"""Places in a frame of a control line, which begins where the trap is set."""
STEPS_BEFORE = 6
"""Calls of the transformer after which a denoiser is caught, so that there is something to resume."""


@dataclass(frozen=True)
class Cell:
    """One field of the matrix."""

    who: str
    phase: str
    fault: str

    def __str__(self) -> str:
        return f"{self.who} × {self.phase} × {self.fault}"


CELLS = tuple(Cell(who, phase, fault) for fault in FAULTS for phase in PHASES for who in WHO)


@dataclass(frozen=True)
class Evidence:
    """What showed that a cell was really hit."""

    jobs: int
    retries: int
    resumes: int
    damaged: int
    seconds: float


class Stroke:
    """One cell on its way: the jobs that are in flight, and what is held."""

    def __init__(self, cluster: Cluster, cell: Cell, wanted: Iterable[Wanted]) -> None:
        self.cluster, self.cell = cluster, cell
        self.wanted = tuple(wanted)
        self.jobs: list[str] = []
        self._traps: list[Trap] = []

    def submit(self) -> None:
        """Sends the cell's jobs."""
        self.jobs = [self.cluster.submit(one) for one in self.wanted]

    def strike(self) -> None:
        """Catches the process and lets the fault happen."""
        cell = self.cell
        if cell.fault in ("exception", "out-of-memory"):
            self._err("raise" if cell.fault == "exception" else "oom")
        elif cell.fault == "corrupted byte":
            self._damage()
        else:
            with self._caught() as puppet:
                self._hit(puppet)
        if not self.jobs:
            self.submit()

    # From outside: signals and cut cables, on a process that is held where the cell wants it.

    def _hit(self, puppet: Puppet) -> None:
        cluster = self.cluster
        if self.cell.fault == "SIGKILL":
            puppet.kill()
            cluster.tend()
            for trap in self._traps if self.cell.phase == "sending" else ():
                trap.release(lost=True)  # what it had not sent yet: it is the sender that died
        elif self.cell.fault == "SIGSTOP":
            puppet.signal(signal.SIGSTOP)
            self._outlast_lease(puppet)
            puppet.signal(signal.SIGCONT)
        else:
            cluster.cut(puppet)
            self._outlast_lease(puppet)
            cluster.mend(puppet)

    def _outlast_lease(self, puppet: Puppet) -> None:
        """Past the lease; of a worker, until it is taken for dead (a coordinator that was slow itself forgives)."""
        time.sleep(1.6 * LEASE)
        if self.cell.who != "coordinator":
            self.cluster.until(
                lambda status: all(one["pid"] != puppet.pid for one in status["workers"]), f"{puppet} to be out"
            )

    @contextlib.contextmanager
    def _caught(self) -> Iterator[Puppet]:
        catch: dict[str, Callable[[], Puppet]] = {
            "idle": lambda: self.cluster.of(self.cell.who)[-1],
            "computing": self._computing,
            "sending": self._sending,
            "receiving": self._receiving,
        }
        try:
            yield catch[self.cell.phase]()
        finally:
            self._release()

    def _release(self, but: Puppet | None = None) -> None:
        for cable in self.cluster.data.values():
            cable.clear()
        for trap in self._traps:
            trap.release()
        for puppet in self.cluster.panel.living():
            puppet.disarm()
            if puppet is not but:
                puppet.go()

    def _computing(self) -> Puppet:
        if self.cell.who == "coordinator":
            self._hold("denoise", "computing")
            return self.cluster.coordinator
        return self._hold(self.cell.who, "computing")

    def _hold(self, stage: str, point: str) -> Puppet:
        """A worker of a stage that waits at a point; of denoise, with a checkpoint kept."""
        denoises = stage == "denoise" and point == "computing"
        among = self._arm(stage, point, "wait", STEPS_BEFORE if denoises else 0)
        self.submit()
        puppet = self.cluster.panel.reached(point, among)
        if denoises:
            self.cluster.panel.wait(self._all_kept, "every job to have a checkpoint")
        return puppet

    def _all_kept(self) -> bool:
        steps = self.cluster.coordinator.ask("checkpoints")
        return all(steps.get(job) for job in self.jobs)

    def _arm(self, who: str, point: str, deed: Deed, skip: int = 0) -> list[Puppet]:
        among = self.cluster.of(who)
        for puppet in among:
            puppet.arm(point, deed, skip)
        return among

    def _sending(self) -> Puppet:
        """A process in the middle of a payload that another one fetches."""
        if self.cell.who == "coordinator":
            self._resumed(lambda: self._trap(["coordinator"], IN_HEAD, "denoise"))
            self._sprung()
            return self.cluster.coordinator
        place = STAGES.index(self.cell.who)
        self._trap(self._names_of(self.cell.who), IN_HEAD, (*STAGES, "coordinator")[place + 1])
        self.submit()
        return self._sprung()

    def _receiving(self) -> Puppet:
        """A process in the middle of a payload that it fetches; encode fetches none, and is given its task."""
        who = self.cell.who
        if who == "encode":
            return self._hold(who, "receiving")
        source = STAGES[STAGES.index(who) - 1] if who in STAGES else STAGES[-1]
        if who == "coordinator":
            self._trap(self._names_of(source), IN_HEAD, who)
            self.submit()
            self._sprung()
            return self.cluster.coordinator
        among = self._arm(who, "receiving", "report")
        self._trap(self._names_of(source), IN_HEAD, who)
        self.submit()
        self._sprung()
        return self.cluster.panel.reached("receiving", among)

    def _resumed(self, before_loss: Callable[[], None]) -> None:
        """Brings a job to where a denoiser takes its checkpoint from the coordinator."""
        puppet = self._hold("denoise", "computing")
        before_loss()
        puppet.kill()
        for other in self.cluster.of("denoise"):
            other.disarm()
            other.go()

    def _names_of(self, who: str) -> list[str]:
        return [puppet.name for puppet in self.cluster.of(who)]

    def _trap(self, names: Iterable[str], after: int, to: str, *, damage: bool = False) -> None:
        """Waits for what these processes send to those."""

        def wanted(port: int) -> bool:
            return any(port in ports_of(puppet.pid) for puppet in self.cluster.of(to))

        self._names = list(names)
        self._traps = [self.cluster.data[name].trap("down", after, damage=damage, of=wanted) for name in self._names]

    def _sprung(self) -> Puppet:
        """The process whose answer is held (or was damaged); nobody else's will be."""
        pairs = list(zip(self._names, self._traps, strict=True))

        def first() -> str | None:
            return next((name for name, trap in pairs if trap.sprung.is_set()), None)

        name = self.cluster.panel.wait(first, f"a payload to leave {' or '.join(self._names)}")
        for other in self._names:
            if other != name:
                self.cluster.data[other].clear()
        return self.cluster.panel.wait(lambda: self.cluster.panel.get(name), name)

    # From within: an exception or a failing allocation at a fault point.

    def _err(self, deed: Deed) -> None:
        """One process errs, once: of several workers all wait, and the first that comes is told to."""
        who, phase = self.cell.who, self.cell.phase
        at_once: Deed = deed if who == "coordinator" else "wait"
        if (who, phase) == ("coordinator", "sending"):
            among = self.cluster.of(who)
            self._resumed(lambda: self.cluster.coordinator.arm(phase, at_once))
        else:
            among = self._arm(who, phase, at_once)
            if phase != "idle":
                self.submit()
        first = self.cluster.panel.reached(phase, among)
        for puppet in among:
            puppet.disarm()
        first.go(deed)
        self._release(but=first)

    # A byte of a payload (sending: of its header, receiving: of its body), or of the control line.

    def _damage(self) -> None:
        who, phase = self.cell.who, self.cell.phase
        if phase in ("idle", "computing") or (who, phase) == ("encode", "receiving"):
            self._damage_control()
        elif who == "coordinator" and phase == "sending":
            self._resumed(lambda: self._trap(["coordinator"], IN_HEAD, "denoise", damage=True))
            self._sprung()
        else:
            line = (*STAGES, "coordinator")
            place = line.index(who) + (phase == "sending")
            self._trap(
                self._names_of(line[place - 1]), IN_HEAD if phase == "sending" else IN_BODY, line[place], damage=True
            )
            self.submit()
            self._sprung()
        self._release()

    def _damage_control(self) -> None:
        who, phase = self.cell.who, self.cell.phase
        if phase == "computing":
            puppet = self._hold("denoise" if who == "coordinator" else who, "computing")
        else:
            puppet = self.cluster.of("decode" if who == "coordinator" else who)[-1]
        way = "down" if who == "coordinator" or phase == "receiving" else "up"
        trap = self.cluster.control[puppet.name].trap(way, FLAGS if phase == "idle" else CIPHERTEXT, damage=True)
        if not self.jobs and phase == "receiving":
            self.submit()
        self.cluster.panel.wait(trap.sprung.is_set, f"a byte of the control line of {puppet} to pass")


def run_cell(cluster: Cluster, cell: Cell, reference: dict[Wanted, bytes]) -> Evidence:
    """Runs a cell with two jobs in flight. Raises AssertionError (Lost for a job) or TimeoutError if it is not met."""
    cluster.whole(cell.who if cell.who in STAGES else "denoise")
    cluster.panel.forget()
    began, damaged = time.monotonic(), cluster.status()["totals"]["digest_failures"]
    wanted = list(reference)[:2]
    stroke = Stroke(cluster, cell, wanted)
    stroke.strike()
    for job, one in zip(stroke.jobs, wanted, strict=True):
        assert cluster.result(job) == reference[one], f"{cell}: the picture of job {job} is another one"
    records = [cluster.job(job) for job in stroke.jobs]
    evidence = Evidence(
        jobs=len(records),
        retries=sum(record["retries"] for record in records),
        resumes=sum(time["resumed_at"] > 0 for record in records for time in record["times"]),
        damaged=cluster.status()["totals"]["digest_failures"] - damaged,
        seconds=time.monotonic() - began,
    )
    _check(cell, evidence)
    return evidence


def _check(cell: Cell, evidence: Evidence) -> None:
    """Whether what the cell wants to happen did happen."""
    payload = cell.fault == "corrupted byte" and cell.phase in ("sending", "receiving")
    if cell.who != "coordinator" and cell.phase != "idle" and cell.fault != "corrupted byte":
        assert evidence.retries, f"{cell}: nothing was tried again"
    if (cell.who, cell.phase) == ("denoise", "computing") and cell.fault in OUTSIDE:
        assert evidence.resumes, f"{cell}: the job did not go on from its checkpoint"
    if payload and (cell.who, cell.phase) != ("encode", "receiving"):
        assert evidence.damaged, f"{cell}: the damage was not counted"
        to_coordinator = cell.who == "coordinator" or (cell.who, cell.phase) == ("decode", "sending")
        assert evidence.retries or to_coordinator, f"{cell}: nothing was tried again"  # that only fetches again

"""From what a person wants opened to a coordinator with its keeper and its crew."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import psutil

from triptych import cluster
from triptych.cluster import Coordinator, JobRecord, JobStore, Limits, MemoryStore, Observer, Trace
from triptych.config import Layout, Slot
from triptych.engine.crew import Crew, LoadReport, Processes, Told
from triptych.engine.early import TOPOLOGY, Early
from triptych.engine.names import kept_secret
from triptych.engine.specs import Signing
from triptych.messages import Hello, Task
from triptych.model import STAGES, StageName, Topology, Trust, model_digest, open_model
from triptych.transfer import TransferSettings

if TYPE_CHECKING:
    from triptych.cluster import ArtifactFolder
    from triptych.engine.keeper import PayloadKeeper
    from triptych.transfer import Exchange

__all__ = ["Opening", "Parts", "open_crew"]

# What only some layouts need is `cluster.X`, imported at that moment: `fused` pays for no network and no database.
# What brings torch along is imported once the worker processes have been started, which are at the same.

ORPHAN_SECONDS = 60.0
"""How long a worker outlives a coordinator that was killed, to be found by the next one."""
LOST_SECONDS = 10.0
"""The same where the next one will not look for it: there is no state folder."""

NO_WATCH: dict[str, float] = {
    "heartbeat_seconds": 3600.0,
    **dict.fromkeys(
        (
            "lease_seconds", "loading_seconds", "hung_floor_seconds", "first_unit_seconds", "stalled_seconds",
            "prove_seconds", "time_limit_seconds",
        ),
        math.inf,
    ),
}  # fmt: skip
"""Nobody watches a worker on a thread of the coordinator's own process: if it dies, so does everything."""


CONTROL = "control.sock"
"""The socket where workers of this host join."""

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Lets the kernel back what a worker process allocates with huge pages (glibc 2.35 and later), which computing on a
CPU gains from. To be had from a process' start on only."""
PATIENT = {"OMP_WAIT_POLICY": "PASSIVE"}
"""For processes that share processors: threads that spin while they wait for those that another process has ousted
make seconds of milliseconds."""

MAX_SOCKETS_PATH = 64
"""Bytes of a folder's path that leave room for the names of sockets in it: a socket's whole path has about 100."""


@dataclass(frozen=True)
class Opening:
    """What `Engine.open` was asked; its words."""

    model: str
    layout: str | Path | Layout
    workflow: str | None
    device: str
    dtype: str | None
    revision: str | None
    offline: bool
    trust: Trust
    capacity: int | None
    preview_vae: str | None
    isolate: bool
    state: Path | None
    listen: str | None
    keys: Path | None
    trace: Path | None
    artifacts: str | None
    signed: str | None
    observers: Sequence[Observer]
    meanwhile: Callable[[], None]
    """called while worker processes start"""


@dataclass(frozen=True)
class Parts:
    """An open engine's parts."""

    topology: Topology
    coordinator: Coordinator
    keeper: PayloadKeeper
    crew: Crew
    durable: bool
    """jobs outlive this process"""
    cleanup: contextlib.ExitStack
    """closes all of it, in the right order"""
    signing: Signing | None = None
    """files say how they were made"""
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    """the ids of jobs that clients name are made with it"""


def open_crew(opening: Opening, report: LoadReport) -> Parts:
    """Opens it all and waits until the stages have loaded. Raises what `Engine.open` raises."""
    layout = Layout.of(opening.layout).overridden(
        device=None if opening.device == "auto" else opening.device,
        dtype=opening.dtype,
        capacity=opening.capacity,
        listen=opening.listen,
        keys=opening.keys,
    )
    alone = layout.name == "fused" and not opening.isolate and layout.listen is None
    with contextlib.ExitStack() as stack:
        parts = _open_alone(opening, layout, stack) if alone else _open_processes(opening, layout, stack)
        stack.callback(parts.crew.stop)
        stack.callback(parts.coordinator.close)  # first, so that no worker that is told to end gets another task
        parts.crew.start(report)
        if opening.state is not None:
            parts = replace(parts, secret=kept_secret(opening.state))
        return replace(parts, cleanup=stack.pop_all(), signing=_signing(opening, layout))


def _open_alone(opening: Opening, layout: Layout, stack: contextlib.ExitStack) -> Parts:
    from triptych.engine.in_process import InProcess
    from triptych.transfer import Exchange
    from triptych.worker import WorkerSettings, open_for

    transfer = TransferSettings(routes=("reference",))
    plan = layout.workers[0]
    settings = WorkerSettings(
        model=opening.model,
        workflow=opening.workflow,
        device=plan.devices[0],
        dtype=plan.dtype,
        revision=opening.revision,
        offline=opening.offline,
        trust=opening.trust,
        preview_vae=opening.preview_vae,
        threads=plan.threads,
        cpus=plan.cpus or (),
        capacity=plan.capacity or WorkerSettings.capacity,
        transfer=transfer,
    )
    # Only what is in a folder outlives this process, and is worth checkpoints.
    kept = {} if opening.state is not None else {"checkpoint_seconds": None}
    limits = Limits(**{**NO_WATCH, **kept, **layout.limits.given()})
    opened = open_for(settings)
    exchange = Exchange(transfer)
    stack.callback(exchange.close)
    folder = None if opening.state is None else _folder(opening.state, stack)
    store = _store(folder, stack)
    keeper = _keeper(_artifacts(folder, opening, stack), exchange, stack, opening)
    coordinator = Coordinator(
        opened.stages,
        store=store,
        keeper=keeper,
        model_digest=opened.digest,
        limits=limits,
        observers=_observers(opening),
        failed=_failed(keeper),
    )
    stack.callback(coordinator.close)
    coordinator.restore(grace=0.0)  # the worker of before was of a process that is no more
    told = Told(coordinator, opened.topology)
    crew = InProcess(told, coordinator, opened, settings, exchange)
    return Parts(opened.topology, coordinator, keeper, crew, folder is not None, stack)


def _open_processes(opening: Opening, layout: Layout, stack: contextlib.ExitStack) -> Parts:
    trust = opening.trust
    source = open_model(opening.model, revision=opening.revision, offline=opening.offline, trust=trust)
    keys = None if layout.listen is None else cluster.load_server_keys(layout.listen.keys)
    folder = _folder(opening.state, stack)
    sockets = _sockets(folder, stack)
    # From here on the folder is nobody else's, and so are the workers of which it tells.
    store = _store(folder if opening.state is not None else None, stack)
    artifacts = _artifacts(folder, opening, stack)  # before the workers, who do not wait for long once they look for us
    socket = f"ipc://{sockets / CONTROL}"

    def workers(stages: Sequence[StageName]) -> Early:
        here = [slot for slot in layout.slots(stages) if slot.local]
        variables = HUGE_PAGES | (PATIENT if len(here) > 1 else {})
        slots = [
            cluster.WorkerSlot(slot.name, _command(opening, layout, slot, socket, folder), variables) for slot in here
        ]
        return Early(slots, {slot.name: slot.stages for slot in here}, folder)

    early = _start_early(layout, workers, stack)
    opening.meanwhile()
    from triptych.transfer import Exchange

    exchange = Exchange(TransferSettings(**layout.transfer.given()), folder=sockets / "keeper")
    stack.callback(exchange.close)
    keeper = _keeper(artifacts, exchange, stack, opening)
    topology = None if early is None else early.topology()
    if topology is None:
        from triptych.model import describe

        topology = describe(source, opening.workflow, trust)
    stages: tuple[StageName, ...] = tuple(part.name for part in topology.stages)
    layout.check(stages, psutil.virtual_memory().total)
    if early is None or stages != STAGES:
        if early is not None:
            early.stop()
        early = workers(stages)
    crew: Processes | None = None

    def dismissed(hello: Hello, kind: str, reason: str) -> None:
        if crew is not None:
            crew.dismissed(hello, kind, reason)

    coordinator = Coordinator(
        stages,
        store=store,
        keeper=keeper,
        model_digest=model_digest(source, topology.workflow),
        limits=Limits(**layout.limits.given()),
        observers=_observers(opening),
        dismissed=dismissed,
        failed=_failed(keeper),
        gone=exchange.peer_gone,
    )
    stack.callback(coordinator.close)
    coordinator.restore()
    endpoints = [socket] if layout.listen is None else [socket, layout.listen.endpoint]
    awaited = opening.isolate or layout.listen is not None
    told = Told(coordinator, topology)
    crew = Processes(told, coordinator, endpoints, keys, early.supervise, early.held, awaited)
    return Parts(topology, coordinator, keeper, crew, opening.state is not None, stack)


def _start_early(
    layout: Layout, workers: Callable[[Sequence[StageName]], Early], stack: contextlib.ExitStack
) -> Early | None:
    """Starts the workers of a model that has all the stages, as nearly every one does: what it is they will say. None
    where that would not do, or where workers may be left that need not be started."""
    if layout.problems(STAGES, psutil.virtual_memory().total):
        return None
    early = workers(STAGES)
    if not early.held or early.finds_others:
        return None
    stack.callback(early.stop)
    early.start()
    return early


def _folder(state: Path | None, stack: contextlib.ExitStack) -> Path:
    """The folder of what runs: the state's, or one that goes with the engine."""
    if state is None:
        made = Path(tempfile.mkdtemp(prefix="triptych-"))
        stack.callback(shutil.rmtree, made, ignore_errors=True)
        return made
    cluster.private_folder(state, "state")
    return state.absolute()


def _sockets(folder: Path, stack: contextlib.ExitStack) -> Path:
    """Where its sockets are: there, or where that is too long for them, in a temporary folder that whoever opens the
    same folder again finds again."""
    if len(os.fsencode(folder)) <= MAX_SOCKETS_PATH:
        return folder
    short = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    place = Path(tempfile.gettempdir(), f"triptych-{os.getuid()}-{short}")
    cluster.private_folder(place, "state")
    stack.callback(_leave, place)
    return place


def _leave(sockets: Path) -> None:
    """Removes a folder of sockets, unless another server listens in it and holds the lock."""
    with contextlib.suppress(OSError), (sockets / f"{CONTROL}.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(sockets)


def _command(opening: Opening, layout: Layout, slot: Slot, socket: str, folder: Path) -> list[str]:
    """The command line of a worker process: the same as a person's."""
    words = [sys.executable, "-m", "triptych", "worker", *slot.arguments(), "--model", opening.model]
    orphan = ORPHAN_SECONDS if opening.state is not None else LOST_SECONDS
    words += ["--join", socket, "--orphan-seconds", str(orphan), *layout.transfer.arguments()]
    words += ["--topology", str(folder / TOPOLOGY)]
    given = {"workflow": opening.workflow, "revision": opening.revision, "preview-vae": opening.preview_vae}
    for name, value in given.items():
        words += [] if value is None else [f"--{name}", value]
    flags = {
        "offline": opening.offline,
        "allow-pickle": opening.trust.pickle_weights,
        "allow-remote-code": opening.trust.remote_code,
    }
    return words + [f"--{name}" for name, wanted in flags.items() if wanted]


def _observers(opening: Opening) -> list[Observer]:
    return [*opening.observers, *([] if opening.trace is None else [Trace(opening.trace)])]


def _signing(opening: Opening, layout: Layout) -> Signing | None:
    dtypes = {plan.dtype for plan in layout.workers}
    return None if opening.signed is None else Signing(opening.signed, dtypes.pop() if len(dtypes) == 1 else None)


def _store(folder: Path | None, stack: contextlib.ExitStack) -> JobStore:
    store: JobStore = MemoryStore() if folder is None else cluster.SqliteStore(folder / "jobs.sqlite")
    stack.callback(store.close)
    return store


def _keeper(
    artifacts: ArtifactFolder | None, exchange: Exchange, stack: contextlib.ExitStack, opening: Opening
) -> PayloadKeeper:
    from triptych.engine.keeper import Folder, Memory, PayloadKeeper

    lasting = opening.state is not None
    keeper = PayloadKeeper(exchange, Memory() if artifacts is None else Folder(artifacts, lasting=lasting))
    stack.callback(keeper.close)
    return keeper


def _artifacts(folder: Path | None, opening: Opening, stack: contextlib.ExitStack) -> ArtifactFolder | None:
    if opening.artifacts is None:
        return None if folder is None else cluster.ArtifactFolder(folder / "artifacts")
    spool = None if folder is None else folder / "spool"
    found = cluster.ArtifactFolder(opening.artifacts, spool=spool, own=opening.state is None)
    stack.callback(found.close)
    return found


def _failed(keeper: PayloadKeeper) -> Callable[[JobRecord, Task], None]:
    def keep(record: JobRecord, task: Task) -> None:
        keeper.keep_failed(record.spec.id, msgspec.msgpack.encode(task))

    return keep

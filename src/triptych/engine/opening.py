"""From what a person wants opened to a coordinator with its keeper and its crew."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import psutil

from triptych import cluster
from triptych.cluster import Coordinator, JobRecord, JobStore, Limits, MemoryStore, Trace
from triptych.config import Layout, Slot
from triptych.engine.crew import Crew, InProcess, LoadReport, OnExit, OnGivenUp, Processes, Told
from triptych.engine.keeper import Folder, Memory, PayloadKeeper
from triptych.messages import Hello, Task
from triptych.model import StageName, Topology, Trust, describe, model_digest, open_model
from triptych.transfer import Exchange, TransferSettings
from triptych.worker import WorkerSettings, open_for

if TYPE_CHECKING:
    from triptych.cluster import Supervisor

__all__ = ["Opening", "Parts", "open_crew"]

# What only some layouts need is `cluster.X`, imported at that moment: `fused` pays for no network and no database.

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
        return replace(parts, cleanup=stack.pop_all())


def _open_alone(opening: Opening, layout: Layout, stack: contextlib.ExitStack) -> Parts:
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
    store, keeper = _keeping(folder, exchange, stack, durable=True)
    coordinator = Coordinator(
        opened.stages,
        store=store,
        keeper=keeper,
        model_digest=opened.digest,
        limits=limits,
        trace=_trace(opening),
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
    topology = describe(source, opening.workflow, trust)
    stages: tuple[StageName, ...] = tuple(part.name for part in topology.stages)
    layout.check(stages, psutil.virtual_memory().total)
    keys = None if layout.listen is None else cluster.load_server_keys(layout.listen.keys)
    folder = _folder(opening.state, stack)
    sockets = _sockets(folder, stack)
    exchange = Exchange(TransferSettings(**layout.transfer.given()), folder=sockets / "keeper")
    stack.callback(exchange.close)
    store, keeper = _keeping(folder, exchange, stack, durable=opening.state is not None)
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
        trace=_trace(opening),
        dismissed=dismissed,
        failed=_failed(keeper),
        gone=exchange.peer_gone,
    )
    stack.callback(coordinator.close)
    coordinator.restore()
    socket = f"ipc://{sockets / CONTROL}"
    endpoints = [socket] if layout.listen is None else [socket, layout.listen.endpoint]
    here = [slot for slot in layout.slots(stages) if slot.local]
    slots = [cluster.WorkerSlot(slot.name, _command(opening, layout, slot, socket)) for slot in here]

    def supervise(exited: OnExit, given_up: OnGivenUp) -> Supervisor:
        return cluster.Supervisor(slots, folder / "workers", on_exit=exited, on_given_up=given_up)

    awaited = opening.isolate or layout.listen is not None
    held = {slot.name: slot.stages for slot in here}
    told = Told(coordinator, topology)
    crew = Processes(told, coordinator, endpoints, keys, supervise, held, awaited)
    return Parts(topology, coordinator, keeper, crew, opening.state is not None, stack)


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


def _command(opening: Opening, layout: Layout, slot: Slot, socket: str) -> list[str]:
    """The command line of a worker process: the same as a person's."""
    words = [sys.executable, "-m", "triptych", "worker", *slot.arguments(), "--model", opening.model]
    orphan = ORPHAN_SECONDS if opening.state is not None else LOST_SECONDS
    words += ["--join", socket, "--orphan-seconds", str(orphan), *layout.transfer.arguments()]
    given = {"workflow": opening.workflow, "revision": opening.revision, "preview-vae": opening.preview_vae}
    for name, value in given.items():
        words += [] if value is None else [f"--{name}", value]
    flags = {
        "offline": opening.offline,
        "allow-pickle": opening.trust.pickle_weights,
        "allow-remote-code": opening.trust.remote_code,
    }
    return words + [f"--{name}" for name, wanted in flags.items() if wanted]


def _trace(opening: Opening) -> Trace | None:
    return None if opening.trace is None else Trace(opening.trace)


def _keeping(
    folder: Path | None, exchange: Exchange, stack: contextlib.ExitStack, durable: bool
) -> tuple[JobStore, PayloadKeeper]:
    store: JobStore = MemoryStore() if folder is None or not durable else cluster.SqliteStore(folder / "jobs.sqlite")
    stack.callback(store.close)
    shelf = Memory() if folder is None else Folder(cluster.ArtifactFolder(folder / "artifacts"), lasting=durable)
    keeper = PayloadKeeper(exchange, shelf)
    stack.callback(keeper.close)
    return store, keeper


def _failed(keeper: PayloadKeeper) -> Callable[[JobRecord, Task], None]:
    def keep(record: JobRecord, task: Task) -> None:
        keeper.keep_failed(record.spec.id, msgspec.msgpack.encode(task))

    return keep

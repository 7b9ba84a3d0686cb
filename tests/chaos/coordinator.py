"""`triptych serve` with fault points: the product's parts put together as the engine does it, some of them faulty.

`python -m tests.chaos.coordinator PLAN.json`, see `tests.chaos.cluster`.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from tests.chaos.remote import Remote
from tests.chaos.worker import MODEL, FaultyExchange, transfer_settings
from triptych.cli.serve import run
from triptych.cluster import (
    ArtifactFolder,
    Coordinator,
    JobRecord,
    Limits,
    SqliteStore,
    Supervisor,
    WorkerSlot,
    load_server_keys,
    private_folder,
)
from triptych.config import Layout
from triptych.engine import Engine
from triptych.engine.crew import OnExit, OnGivenUp, Processes, Told
from triptych.engine.keeper import Folder, PayloadKeeper
from triptych.engine.opening import CONTROL, Parts
from triptych.messages import Hello
from triptych.model import describe, model_digest, open_model
from triptych.noise import hush
from triptych.request import StageName

DRAIN_SECONDS = 30.0


class FaultyStore(SqliteStore):
    """A job store that may fail at a write."""

    remote: Remote | None = None

    def put(self, record: JobRecord) -> None:
        """Passes the point `computing`: what a coordinator computes are jobs' next states."""
        if self.remote is not None and record.state == "running":
            self.remote.point("computing")
        super().put(record)


class FaultyTold(Told):
    """A coordinator's ear and clock."""

    remote: Remote | None = None

    def tick(self) -> None:
        """Passes the point `idle`."""
        if self.remote is not None:
            self.remote.point("idle")
        super().tick()


def open_engine(plan: dict[str, Any]) -> Engine:
    """The engine of a server, as `triptych.engine.opening` builds it."""
    layout = Layout.load(plan["layout"])
    folder = Path(plan["state"])
    private_folder(folder, "state")
    source = open_model(MODEL)
    topology = describe(source)
    stages: tuple[StageName, ...] = tuple(part.name for part in topology.stages)
    layout.check(stages)
    with contextlib.ExitStack() as stack:
        exchange = FaultyExchange(transfer_settings(plan["transfer"]), folder=folder / "keeper")
        stack.callback(exchange.close)
        exchange.is_worker = False
        store = FaultyStore(folder / "jobs.sqlite")
        keeper = PayloadKeeper(exchange, Folder(ArtifactFolder(folder / "artifacts")))
        crew: Processes | None = None

        def dismissed(hello: Hello, kind: str, reason: str) -> None:
            if crew is not None:
                crew.dismissed(hello, kind, reason)

        coordinator = Coordinator(
            stages, store=store, keeper=keeper, model_digest=model_digest(source, topology.workflow),
            limits=Limits(**layout.limits.given()), dismissed=dismissed, gone=exchange.peer_gone,
        )  # fmt: skip

        def checkpoints() -> dict[str, int]:
            return {one.spec.id: one.checkpoint_step for one in coordinator.jobs(states=("running",))}

        told = FaultyTold(coordinator, topology)
        answers = {"numbers": exchange.numbers, "checkpoints": checkpoints}
        told.remote = store.remote = exchange.remote = Remote(plan["panel"], "coordinator", answers)
        coordinator.restore()
        slots = [WorkerSlot(name, command) for name, command in plan["commands"].items()]

        def supervise(exited: OnExit, given_up: OnGivenUp) -> Supervisor:
            return Supervisor(slots, folder / "workers", on_exit=exited, on_given_up=given_up)

        assert layout.listen is not None, "the plan has one"
        keys = load_server_keys(layout.listen.keys)
        endpoints = [f"ipc://{folder / CONTROL}", layout.listen.endpoint]
        crew = Processes(told, coordinator, endpoints, keys, supervise, {})
        for close in (store.close, keeper.close, crew.stop, coordinator.close):
            stack.callback(close)
        crew.start(lambda _: None)
        return Engine(Parts(topology, coordinator, keeper, crew, True, stack.pop_all()), isolated=True)


def main() -> None:
    """Serves until a signal."""
    hush()
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    run(Layout.load(plan["layout"]), lambda: open_engine(plan), DRAIN_SECONDS)


if __name__ == "__main__":
    main()

"""A worker of the product, with fault points: `python -m tests.chaos.worker --panel … --join …`."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.chaos.remote import Remote
from triptych.cluster import load_client_keys
from triptych.encode import EncodeStage
from triptych.messages import Descriptor, Ticket
from triptych.model import (
    CHECKPOINT_VALUES,
    ComponentInfo,
    Components,
    Placement,
    describe,
    model_digest,
    open_model,
    program,
)
from triptych.noise import hush
from triptych.request import StageName
from triptych.stage import Admitted, Full, Refused, Stage, StageTask
from triptych.transfer import Exchange, ExchangeStats, Fetched, Payload, TransferSettings
from triptych.worker import Opened, ProcessUplink, Worker, WorkerSettings, build_stage
from triptych.worker.main import signals

__all__ = ["FaultyExchange", "transfer_settings"]

MODEL = "emoji"


class FaultyExchange(Exchange):
    """An exchange whose owner may fail at what it does: sending (publishing), receiving, and, idle, telling how it
    is, which a worker's pulse asks."""

    remote: Remote | None = None
    is_worker = True

    def publish(self, payload: Payload) -> Descriptor:
        """Passes the point `sending` with what a stage made, and with a checkpoint that the coordinator kept."""
        if payload.values.keys() != CHECKPOINT_VALUES or not self.is_worker:
            self._point("sending")
        return super().publish(payload)

    def fetch(self, ticket: Ticket, *, limit: int | None = None, check: Callable[..., None] | None = None) -> Fetched:
        """Passes the point `receiving`."""
        self._point("receiving")
        return super().fetch(ticket, limit=limit, check=check)

    def stats(self) -> ExchangeStats:
        """Passes the point `idle`."""
        self._point("idle")
        return super().stats()

    def numbers(self) -> dict[str, int]:
        """What must be nothing when nothing is under way, and what was received."""
        stats = super().stats()
        return {
            "kept": stats.kept,
            "open": stats.open,
            "quarantined": stats.quarantined,
            "received": sum(stats.received.values()),
        }

    def _point(self, name: str) -> None:
        if self.remote is not None:
            self.remote.point(name)


class FaultyComponents(Components):
    """Components whose modules pass the point `computing` whenever they are called."""

    remote: Remote | None = None

    def get(self, spec: ComponentInfo, placement: Placement) -> Any:
        """Hooks into what is loaded."""
        part = super().get(spec, placement)
        if isinstance(part, torch.nn.Module):
            for module in {part, getattr(part, "decoder", part)}:
                module.register_forward_pre_hook(self._point)
        return part

    def _point(self, *_: object) -> None:
        if self.remote is not None:
            self.remote.point("computing")


class FaultyEncode(EncodeStage):
    """The first stage fetches nothing: what it receives are its tasks."""

    remote: Remote | None = None

    def admit(self, task: StageTask) -> Admitted | Full | Refused:
        """Passes the point `receiving`."""
        if self.remote is not None:
            self.remote.point("receiving")
        return super().admit(task)


def transfer_settings(text: str) -> TransferSettings:
    """Settings from JSON."""
    given = json.loads(text)
    return TransferSettings(**{**given, "routes": tuple(given["routes"])})


def _open(wanted: tuple[StageName, ...], remote: Remote) -> Opened:
    """As `open_for` does it, of faulty parts."""
    source = open_model(MODEL)
    topology = describe(source)
    components, placement = FaultyComponents(source), Placement(torch.device("cpu"), torch.float32)
    components.remote = remote
    stages: dict[StageName, Stage] = {}
    for name in wanted:
        stages[name] = build_stage(topology, name, components, placement)
        if name == "encode":
            stages[name] = encode = FaultyEncode(program(topology, name), components, placement)
            encode.remote = remote
    return Opened(topology, model_digest(source, topology.workflow), stages, placement)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name in ("panel", "join", "key", "name", "stage", "transfer", "folder"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--slot")
    return parser.parse_args()


def main() -> int:
    """Runs a worker until it is told to leave."""
    given = _arguments()
    hush()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = WorkerSettings(
        MODEL, (given.stage,), device="cpu", threads=1, name=given.name, slot=given.slot,
        transfer=transfer_settings(given.transfer), drain_seconds=10.0,
    )  # fmt: skip
    keys = load_client_keys(given.key)
    exchange = FaultyExchange(settings.transfer, folder=Path(given.folder))
    remote = exchange.remote = Remote(given.panel, given.name, {"numbers": exchange.numbers})
    opened = _open(settings.stages, remote)
    worker = Worker(settings, lambda hello: ProcessUplink(given.join, hello, keys), exchange, opened)
    with signals(worker, exchange), contextlib.closing(exchange):
        worker.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m triptych.worker FD`: the child of a StageProcess."""

from __future__ import annotations

import contextlib
import socket
import sys

import torch

from triptych.device import pick_device, pick_dtype
from triptych.errors import StageFailed, TriptychError, Unsupported
from triptych.model import Components, Placement, describe, open_model
from triptych.noise import hush
from triptych.stage import GatherStage, StageTask
from triptych.worker import wire
from triptych.worker.stages import build_stage, run_alone
from triptych.worker.wire import StageSpec


def open_stage(spec: StageSpec) -> GatherStage:
    """Opens the model and loads the stage. Raises TriptychError."""
    if spec.threads:
        torch.set_num_threads(spec.threads)
    device = pick_device(spec.device)
    source = open_model(spec.model, revision=spec.revision, offline=spec.offline, trust=spec.trust)
    topology = describe(source, spec.workflow, spec.trust)
    placement = Placement(device, pick_dtype(spec.dtype, device))
    stage = build_stage(topology, spec.stage, Components(source, spec.trust), placement, capacity=1)
    stage.load(lambda _: None)
    return stage


def run_task(connection: socket.socket, stage: GatherStage, task: StageTask) -> None:
    """Drives the stage until the task is done, and reports. Raises what the task failed with."""
    made = run_alone(stage, task, lambda done: wire.send(connection, wire.Stepped(done.step, done.steps, done.seconds)))
    wire.send(connection, wire.Done(made.seconds, made.steps, made.peak_bytes), made.payload)


@torch.no_grad()
def serve(connection: socket.socket) -> None:
    """Carries out orders until the parent is gone."""
    stage: GatherStage | None = None
    while True:
        message, payload = wire.receive(connection)
        try:
            if isinstance(message, wire.Open):
                stage = None  # its weights go before the next ones come
                stage = open_stage(message.spec)
                weighty = (name for name, part in stage.program.components.items() if _has_weights(part))
                wire.send(connection, wire.Opened(tuple(sorted(weighty))))
            elif isinstance(message, wire.Run) and stage is not None and payload is not None:
                fields, before = wire.unpack_task(payload)
                task = StageTask(
                    message.job,
                    fields,
                    message.seed,
                    message.guidance_scale,
                    message.shift,
                    before,
                    raw=message.raw,
                )
                run_task(connection, stage, task)
            else:
                raise Unsupported("no stage is open here")
        except TriptychError as error:
            wire.send(connection, wire.Broken(error.code, error.message, error.field))
        except Exception as error:
            wire.send(connection, wire.Broken(StageFailed.code, f"{type(error).__name__}: {error}"))


def _has_weights(part: object) -> bool:
    return isinstance(part, torch.nn.Module) and any(not p.is_meta for p in part.parameters())


if __name__ == "__main__":
    hush()
    with contextlib.suppress(EOFError, OSError):
        serve(socket.socket(fileno=int(sys.argv[1])))

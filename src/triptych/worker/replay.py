"""A task that failed, kept in a folder, and run again alone, where a debugger reaches it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import torch

from triptych.errors import InvalidRequest, WrongPayload
from triptych.messages import Task
from triptych.request import StageName
from triptych.stage import Output
from triptych.transfer import Payload, payload_of, payload_parts
from triptych.worker.inputs import hand_pictures, stage_task
from triptych.worker.opening import open_for
from triptych.worker.outputs import as_files
from triptych.worker.settings import WorkerSettings
from triptych.worker.stages import run_alone

__all__ = ["keep_task", "read_payload", "replay_task", "write_payload"]

TASK = "failed.task"
INPUTS = ("pictures", "payload", "checkpoint")


def keep_task(folder: Path, task: Task, inputs: dict[str, Payload]) -> None:
    """Writes a task and its `inputs` (`pictures`, `payload`, `checkpoint`, as far as it has them) for `replay_task`:
    `failed.task` (msgpack, without tickets) and a file per input in the payload's wire form. Raises OSError."""
    bare = msgspec.structs.replace(task, pictures=None, payload=None, checkpoint=None)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name in INPUTS:
        path = folder / f"failed.{name}"
        if name in inputs:
            write_payload(path, inputs[name])
        else:
            path.unlink(missing_ok=True)
    (folder / TASK).write_bytes(msgspec.msgpack.encode(bare))


def write_payload(path: Path, payload: Payload) -> None:
    """A payload as a file, see `transfer.payload_parts`. Raises OSError."""
    with path.open("wb") as file:
        file.writelines(payload_parts(payload))


def read_payload(path: Path) -> Payload:
    """What `write_payload` wrote. Raises WrongPayload if it is something else, or damaged."""
    return payload_of(path.read_bytes())


@torch.no_grad()
def replay_task(folder: Path, settings: WorkerSettings, stage: StageName | None = None) -> Output:
    """Runs the task that `keep_task` kept, alone, in this process, on the settings' model and device.

    Returns what it made, as it would have left the worker. Raises InvalidRequest if there is no task (of that stage),
    WrongPayload for damaged files, and what the task fails with: a TriptychError that says what happened, with the
    original error and its whole traceback behind it.
    """
    path = folder / TASK
    if not path.is_file():
        raise InvalidRequest.of("job", str(folder), f"a folder with {TASK}, which is kept of a job that failed")
    try:
        task = msgspec.msgpack.decode(path.read_bytes(), type=Task)
    except msgspec.DecodeError as error:
        raise WrongPayload(f"{path} is no task ({error})", field="job") from None
    if stage is not None and stage != task.stage:
        raise InvalidRequest.of("stage", stage, f"{task.stage}, where this job failed")
    opened = open_for(replace(settings, stages=(task.stage,)))
    own = stage_task(task)
    inputs = {name: read_payload(folder / f"failed.{name}") for name in INPUTS if (folder / f"failed.{name}").exists()}
    own.payload, own.checkpoint = inputs.get("payload"), inputs.get("checkpoint")
    if "pictures" in inputs:
        hand_pictures(own, inputs["pictures"])
    runner = opened.stages[task.stage]
    runner.load(lambda _: None)
    try:
        made = run_alone(runner, own)
    finally:
        runner.close()
    return made if task.encoding is None else replace(made, payload=as_files(made.payload, task.encoding))

"""`triptych replay`: a task that failed, run again alone in this process."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triptych.cli.console import human_bytes, table_console
from triptych.cli.generation import DEFAULT_MODEL
from triptych.cli.options import AllowPickle, AllowRemoteCode, Device, Dtype, Offline, Revision, Threads
from triptych.errors import InvalidRequest, StorageFailed

if TYPE_CHECKING:
    from triptych.stage import Output

__all__ = ["replay"]

_JOB = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)


def replay(
    job: Annotated[str, typer.Argument(help="The id of a job that failed.")],
    state: Annotated[Path | None, typer.Option(metavar="DIR", help="The --state of the server that ran it.")] = None,
    artifacts: Annotated[str | None, typer.Option(metavar="URL", help="Its --artifacts, if it had any.")] = None,
    stage: Annotated[
        str | None, typer.Option(help="The stage that failed.", show_default="the one that was kept")
    ] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="The server's model.")] = DEFAULT_MODEL,
    workflow: Annotated[str | None, typer.Option(help="The server's.")] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    threads: Threads = None,
    revision: Revision = None,
    offline: Offline = False,
    allow_pickle: AllowPickle = False,
    allow_remote_code: AllowRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what it made as JSON.")] = False,
) -> None:
    """Run the stage of a job that failed again, alone, from the input that was kept.

    Fails as the job did (`--debug` shows the whole traceback), or says what it made.
    """
    from triptych.config import parse_stages

    wanted = None if stage is None else parse_stages(stage)
    if wanted is not None and len(wanted) != 1:
        raise InvalidRequest.of("stage", stage, "one stage")
    from triptych.model import Trust
    from triptych.worker import WorkerSettings, replay_task

    settings = WorkerSettings(
        model=model,
        workflow=workflow,
        device=device,
        dtype=dtype,
        revision=revision,
        offline=offline,
        trust=Trust(pickle_weights=allow_pickle, remote_code=allow_remote_code),
        threads=threads,
    )
    with _kept(state, artifacts, job) as folder:
        _show(replay_task(folder, settings, None if wanted is None else wanted[0]), as_json)


@contextlib.contextmanager
def _kept(state: Path | None, artifacts: str | None, job: str) -> Iterator[Path]:
    """The folder with a job's task. Raises InvalidRequest if there is none, StorageFailed if it cannot be had."""
    if not _JOB.fullmatch(job):
        raise InvalidRequest.of("job", job, "a job's id: letters, digits, hyphens and underscores")
    if artifacts is None:
        yield _folder(state, job)
        return
    with tempfile.TemporaryDirectory(prefix="triptych-") as made:
        _fetch(artifacts, job, Path(made))
        yield Path(made)


def _fetch(artifacts: str, job: str, folder: Path) -> None:
    from triptych.cluster import ArtifactFolder

    found = ArtifactFolder(artifacts)
    try:
        names = [name for name in found.names(job) if name.startswith("failed.")]
        if "failed.task" not in names:
            raise InvalidRequest.of("job", job, f"one that failed and has not expired; {artifacts} has no failed.task")
        for name in names:
            (folder / name).write_bytes(found.view(job, name))
    except OSError as error:
        raise StorageFailed(str(error), field="artifacts") from error
    finally:
        found.close()


def _folder(state: Path | None, job: str) -> Path:
    """Where the server kept a job's task. Raises InvalidRequest if there is none."""
    if state is None:
        raise InvalidRequest.of("state", "none", "the folder that was given to `triptych serve --state`")
    folder = state / "artifacts" / job
    if not state.is_dir():
        raise InvalidRequest.of("state", str(state), "the folder that was given to `triptych serve --state`")
    if not (folder / "failed.task").is_file():
        raise InvalidRequest.of("job", job, f"one that failed and has not expired; {folder} holds no failed.task")
    return folder


def _show(made: Output, as_json: bool) -> None:
    from triptych.transfer import tensors_in

    tensors = {
        name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "bytes": tensor.nbytes}
        for name, tensor in _named(made.payload.values, tensors_in)
    }
    if as_json:
        facts = {"seconds": made.seconds, "steps": made.steps, "peak_bytes": made.peak_bytes, "tensors": tensors}
        print(json.dumps({"job": made.job, **facts}))
        return
    console = table_console()
    line = f"job {made.job} went well: {made.steps} steps in {made.seconds:.2f} s, peak {human_bytes(made.peak_bytes)}"
    console.print(line, markup=False)
    for name, facts in tensors.items():
        shape = "×".join(map(str, facts["shape"])) or "scalar"
        console.print(f"  {name}: {facts['dtype']} {shape}, {human_bytes(facts['bytes'])}", markup=False)


def _named(values: dict[str, Any], tensors_in: Any) -> list[tuple[str, Any]]:
    found = []
    for name, value in values.items():
        inside = list(tensors_in(value))
        found += [(name if len(inside) == 1 else f"{name}[{index}]", tensor) for index, tensor in enumerate(inside)]
    return found

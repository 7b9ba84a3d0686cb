"""One stage of a model and nothing around it, in a process of its own: what a worker of it could reach at best.

`python benchmarks/stage_alone.py FOLDER STAGE FIELDS CPUS` runs the request's stages once, then answers each line with
a count on its standard input by the seconds that so many tasks of the stage took, back to back, and exits when the
input ends.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, cast

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: the repository's root is not on the path then
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]

__all__ = ["StageAlone"]


class StageAlone:
    """The process, and what it is asked. Use as a context manager."""

    def __init__(self, folder: str, stage: str, fields: Mapping[str, Any], cpus: tuple[int, ...]) -> None:
        command = [sys.executable, __file__, folder, stage, json.dumps(fields), json.dumps(cpus)]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def rate(self, count: int) -> float:
        """Tasks per second of `count` back to back. Raises EOFError if the process has died."""
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write(f"{count}\n")
        self._child.stdin.flush()
        answer = self._child.stdout.readline()
        if not answer:
            raise EOFError("the process of the stage alone has died")
        return count / float(answer)

    def __enter__(self) -> StageAlone:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._child.communicate()


def main(folder: str, wanted: str, fields: str, cpus: str) -> None:
    """The child."""
    import torch

    from triptych import Request
    from triptych.model import resolve
    from triptych.stage import Stage, StageTask
    from triptych.worker import WorkerSettings, open_for, run_alone
    from triptych.worker.opening import keep_memory, pin, settle

    settings = WorkerSettings(folder, device="cpu", threads=1, cpus=tuple(json.loads(cpus)))
    pin(settings)
    keep_memory()
    opened = open_for(settings)
    resolved = resolve(opened.topology, Request.parse(**json.loads(fields)), None)

    with torch.no_grad():
        payload, asked = None, None
        for part in opened.topology.stages:
            stage = opened.stages[part.name]
            stage.load(lambda _: None)
            declared = {item.name for item in part.request_inputs}
            given = {name: value for name, value in resolved.fields.items() if name in declared}
            task = StageTask("warm", given, resolved.seed, resolved.guidance_scale, payload=payload)
            if part.name == wanted:
                asked = stage, task
            payload = run_alone(stage, task).payload
        stage, task = cast(tuple[Stage, StageTask], asked)
        settle()
        for line in sys.stdin:
            began = time.perf_counter()
            for _ in range(int(line)):
                run_alone(stage, task)
            print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

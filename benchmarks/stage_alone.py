"""Stages of a model and nothing around them, in a process of their own: what a worker of them could reach at best.

`python benchmarks/stage_alone.py FOLDER STAGES FIELDS CPUS` runs the request's stages once, then answers each line with
a count on its standard input by the seconds that so many tasks of its STAGES (`denoise`, `encode,denoise`) took, back
to back, and exits when the input ends.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: the repository's root is not on the path then
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]

__all__ = ["StagesAlone"]


class StagesAlone:
    """The process, and what it is asked. Use as a context manager."""

    def __init__(
        self, folder: str, stages: Sequence[str], fields: Mapping[str, Any], cpus: tuple[int, ...] = ()
    ) -> None:
        command = [sys.executable, __file__, folder, ",".join(stages), json.dumps(fields), json.dumps(cpus)]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def rate(self, count: int) -> float:
        """Tasks (of each stage one) per second of `count` back to back. Raises EOFError if the process has died."""
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write(f"{count}\n")
        self._child.stdin.flush()
        answer = self._child.stdout.readline()
        if not answer:
            raise EOFError("the process of the stages alone has died")
        return count / float(answer)

    def __enter__(self) -> StagesAlone:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._child.communicate()


def main(folder: str, wanted: str, fields: str, cpus: str) -> None:
    """The child."""
    import torch

    from triptych import Request
    from triptych.model import resolve
    from triptych.stage import StageTask
    from triptych.worker import WorkerSettings, open_for, run_alone
    from triptych.worker.opening import keep_memory, pin, settle

    settings = WorkerSettings(folder, device="cpu", threads=1, cpus=tuple(json.loads(cpus)))
    pin(settings)
    keep_memory()
    opened = open_for(settings)
    resolved = resolve(opened.topology, Request.parse(**json.loads(fields)), None)

    with torch.no_grad():
        payload, names, asked = None, wanted.split(","), []
        for part in opened.topology.stages:
            stage = opened.stages[part.name]
            stage.load(lambda _: None)
            declared = {item.name for item in part.request_inputs}
            given = {name: value for name, value in resolved.fields.items() if name in declared}
            task = StageTask("warm", given, resolved.seed, resolved.guidance_scale, payload=payload)
            if part.name in names:
                asked.append((stage, task))
            payload = run_alone(stage, task).payload
        assert len(asked) == len(names), f"{wanted}: the model has {', '.join(opened.stages)}"
        settle()
        for line in sys.stdin:
            began = time.perf_counter()
            for stage, task in asked * int(line):
                run_alone(stage, task)
            print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

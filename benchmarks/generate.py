"""What Triptych costs over diffusers on the same folder: per step, in memory, from import to first picture.

Per step: whole requests (prompt to pictures, nothing left out) in one process, the three ways taking turns,
divided by their steps; the figure is the median of the rounds' ratios. Memory and first picture: processes of
their own, taking turns; ratios of medians.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: the repository's root is not on the path then
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import torch  # noqa: E402

from benchmarks import Row, report  # noqa: E402
from benchmarks.contenders import CONTENDERS, Run  # noqa: E402

STEP_LIMIT, MEMORY_LIMIT, FIRST_LIMIT = 1.02, 1.05, 1.1


@dataclass(frozen=True)
class Case:
    """A folder and the request that is run on it."""

    name: str
    folder: str
    fields: dict[str, Any]


def cases(steps: int) -> list[Case]:
    """The embedded model, and tiny random models of an image and a video family."""
    from tests.families import folder
    from triptych.model import open_model

    common = {"num_inference_steps": steps, "seed": 5}
    emoji = {
        "prompt": "a red apple on the left, blue background",
        "negative_prompt": "",
        "guidance_scale": 3.0,
    }
    flux = {"prompt": "a photo of a cat", "guidance_scale": 3.5, "max_sequence_length": 32}
    wan = {
        "prompt": "a cat",
        "negative_prompt": "bad quality",
        "guidance_scale": 5.0,
        "num_frames": 9,
        "max_sequence_length": 32,
    }
    return [
        Case("emoji", open_model("emoji").folder, {**emoji, **common, "width": 64, "height": 64}),
        Case("flux (tiny)", str(folder("flux")), {**flux, **common, "width": 64, "height": 64}),
        Case("wan (tiny)", str(folder("wan")), {**wan, **common, "width": 32, "height": 32}),
    ]


@dataclass(frozen=True)
class Spent:
    """What one run took, in seconds."""

    wall: float
    cpu: float


def spend(run: Run, fields: dict[str, Any]) -> Spent:
    wall, cpu = time.perf_counter(), time.process_time()
    run(fields)
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


def per_step(case: Case, rounds: int) -> list[Row]:
    """Rows of one case: pictures compared, then Triptych and the standard pipeline over the modular one."""
    runs = {name: opened(case.folder) for name, opened in CONTENDERS.items()}
    pictures = {name: run(case.fields) for name, run in runs.items()}
    equal = bool((pictures["triptych"] == pictures["modular"]).all())
    spent: dict[str, list[Spent]] = {name: [] for name in runs}
    for turn in range(rounds):
        order = list(runs) if turn % 2 else list(reversed(runs))
        for name in order:
            spent[name].append(spend(runs[name], case.fields))

    def ratio(name: str, clock: str) -> float:
        pairs = zip(spent[name], spent["modular"], strict=True)
        return statistics.median(getattr(one, clock) / getattr(other, clock) for one, other in pairs)

    def milliseconds(name: str) -> str:
        middle = statistics.median(one.wall for one in spent[name])
        return f"{1000 * middle / case.fields['num_inference_steps']:.2f}"

    per = ", ".join(f"{name} {milliseconds(name)}" for name in runs)
    return [
        Row(
            f"{case.name}: picture equals the modular pipeline's",
            "yes" if equal else "no",
            "bit for bit",
            equal,
        ),
        Row.at_most(f"{case.name}: per step, Triptych / modular", ratio("triptych", "wall"), STEP_LIMIT),
        Row(f"{case.name}: the same in CPU time", f"{ratio('triptych', 'cpu'):.3f}"),
        Row(f"{case.name}: per step, standard / modular", f"{ratio('standard', 'wall'):.3f}"),
        Row(f"{case.name}: ms per step (median)", per),
    ]


def first_picture(case: Case, rounds: int, threads: int) -> list[Row]:
    """Rows from processes of their own: peak memory over modular's, seconds over the standard pipeline's."""
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    memory: dict[str, list[int]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name in CONTENDERS:
            took, peak = fresh(name, case, threads)
            seconds[name].append(took)
            memory[name].append(peak)
    took_of = {name: statistics.median(values) for name, values in seconds.items()}
    peak_of = {name: statistics.median(values) for name, values in memory.items()}
    return [
        Row.at_most(
            f"{case.name}: peak memory, Triptych / modular",
            peak_of["triptych"] / peak_of["modular"],
            MEMORY_LIMIT,
        ),
        Row(f"{case.name}: MiB", ", ".join(f"{name} {peak / 2**20:.0f}" for name, peak in peak_of.items())),
        Row.at_most(
            f"{case.name}: import to first picture, Triptych / standard",
            took_of["triptych"] / took_of["standard"],
            FIRST_LIMIT,
        ),
        Row(f"{case.name}: seconds to it", ", ".join(f"{name} {took:.2f}" for name, took in took_of.items())),
    ]


def fresh(contender: str, case: Case, threads: int) -> tuple[float, int]:
    """Seconds from the start of a new process to its first picture, and its peak resident bytes. Raises
    CalledProcessError when it fails."""
    arguments = [contender, case.folder, json.dumps(case.fields), str(threads)]
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'src')!r}]; "
    code += "from benchmarks.first_picture import main; main(*sys.argv[1:])"
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return time.perf_counter() - began, int(done.stdout.split()[-1])


def main() -> int:
    """Runs all of it; 1 if a target was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="turns per contender (default 9)")
    parser.add_argument("--processes", type=int, default=5, help="fresh processes per contender (default 5)")
    parser.add_argument("--steps", type=int, default=40, help="denoising steps of a request (default 40)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="torch threads, for all alike"
    )
    parser.add_argument("--only", help="cases whose name begins with this")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/generate.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for case in cases(options.steps):
        if case.name.startswith(options.only or ""):
            with contextlib.redirect_stdout(sys.stderr):
                rows += per_step(case, options.rounds)
            if case.name == "emoji" and options.processes:
                rows += first_picture(case, options.processes, options.threads)
    return report("generate", rows, options.save)


if __name__ == "__main__":
    raise SystemExit(main())

"""What Triptych costs over diffusers on the same folder: per step, in memory, from import to first picture.

Per step: requests of few and of many steps, the three ways taking many short turns in one process, so that
whatever slows the machine for a second slows all of them; what the difference says of one step, and what
remains of a request beyond its steps. A round is a process and the medians of its turns, a figure the median
of the rounds' ratios.
Memory and first picture: processes of their own, taking turns; ratios of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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


def cases() -> list[Case]:
    """The embedded model, and tiny random models of an image and a video family."""
    from tests.families import FAMILIES, folder
    from triptych.model import open_model

    common = {"num_inference_steps": 8, "seed": 5}
    emoji = {"prompt": "a red apple on the left, blue background", "negative_prompt": "", "guidance_scale": 3.0}
    found = [Case("emoji", open_model("emoji").folder, {**emoji, **common, "width": 64, "height": 64})]
    for name in ("flux", "wan-t2v"):
        family = FAMILIES[name]
        fields = {**family.fields, "guidance_scale": family.guidance_scale, **common}
        found.append(Case(f"{name} (tiny)", str(folder(name)), fields))
    return found


@dataclass(frozen=True)
class Spent:
    """What one turn of one contender took, in seconds: a request of few steps and one of many."""

    few: float
    many: float

    def per_step(self, few: int, many: int) -> float:
        """Seconds of one more step."""
        return (self.many - self.few) / (many - few)

    def beyond(self, few: int, many: int) -> float:
        """Seconds of a request that are not its steps."""
        return self.few - few * self.per_step(few, many)


Clock = Literal["cpu", "wall"]
CLOCKS: dict[Clock, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}


def take_turn(run: Run, few: dict[str, Any], many: dict[str, Any]) -> dict[Clock, Spent]:
    """Runs both requests and says what they took on each clock."""
    stamps = [{name: clock() for name, clock in CLOCKS.items()}]
    for fields in (few, many):
        run(fields)
        stamps.append({name: clock() for name, clock in CLOCKS.items()})
    began, between, ended = stamps
    return {name: Spent(between[name] - began[name], ended[name] - between[name]) for name in CLOCKS}


@dataclass(frozen=True)
class Turns:
    """All rounds of all contenders on one case, on one clock."""

    few: int
    many: int
    spent: dict[str, list[Spent]]

    def ratio(self, name: str) -> float:
        """A contender's seconds per step over the modular pipeline's: the median of the rounds' ratios."""
        steps = {who: [one.per_step(self.few, self.many) for one in self.spent[who]] for who in (name, "modular")}
        pairs = zip(steps[name], steps["modular"], strict=True)
        return statistics.median(mine / modular for mine, modular in pairs)

    def per_step(self) -> str:
        """Milliseconds per step of each contender."""
        return self._milliseconds(lambda one: one.per_step(self.few, self.many))

    def beyond(self) -> str:
        """Milliseconds of each contender's requests that are not steps."""
        return self._milliseconds(lambda one: one.beyond(self.few, self.many))

    def _milliseconds(self, what: Callable[[Spent], float]) -> str:
        middle = {name: statistics.median(map(what, spent)) for name, spent in self.spent.items()}
        return ", ".join(f"{name} {1000 * seconds:.2f}" for name, seconds in middle.items())


def middle(turns: list[Spent]) -> Spent:
    """A round: each request's median over its turns, which an interruption of one turn does not move."""
    return Spent(statistics.median(one.few for one in turns), statistics.median(one.many for one in turns))


@dataclass(frozen=True)
class Round:
    """One process's word: whether Triptych's picture is the modular pipeline's, and what each contender took."""

    equal: bool
    spent: dict[Clock, dict[str, Spent]]


def take_round(case: Case, order: list[str], turns: int, few: int, many: int) -> Round:
    """Opens the contenders in this order, then lets them take turns, after one each to warm up."""
    runs = {name: CONTENDERS[name](case.folder) for name in order}
    fewer, more = ({**case.fields, "num_inference_steps": steps} for steps in (few, many))
    pictures = {name: run(fewer) for name, run in runs.items()}
    taken: dict[Clock, dict[str, list[Spent]]] = {clock: {name: [] for name in runs} for clock in CLOCKS}
    for number in range(turns):
        for name in order if number % 2 else reversed(order):
            for clock, one in take_turn(runs[name], fewer, more).items():
                taken[clock][name].append(one)
    equal = bool((pictures["triptych"] == pictures["modular"]).all())
    spent: dict[Clock, dict[str, Spent]] = {
        clock: {name: middle(done) for name, done in by_name.items()} for clock, by_name in taken.items()
    }
    return Round(equal, spent)


def measure(case: Case, rounds: int, turns: int, few: int, many: int) -> tuple[bool, dict[Clock, Turns]]:
    """All rounds of a case, each a process of its own: where its weights happen to lie makes a contender a few
    per cent faster or slower for as long as its process lives. Who opens first changes from round to round."""
    names = list(CONTENDERS)
    done: list[Round] = []
    for number in range(rounds):
        shift = number % len(names)
        told = subprocess.run(
            [sys.executable, __file__, "--round", json.dumps([case.folder, case.fields, names[shift:] + names[:shift]]),
             "--turns", str(turns), "--steps", str(few), str(many), "--threads", str(torch.get_num_threads())],
            stdout=subprocess.PIPE, text=True, check=True,
        ).stdout  # fmt: skip
        equal, spent = json.loads(told.splitlines()[-1])
        done.append(Round(equal, {clock: {who: Spent(*one) for who, one in spent[clock].items()} for clock in CLOCKS}))
    together: dict[Clock, Turns] = {
        clock: Turns(few, many, {name: [one.spent[clock][name] for one in done] for name in names}) for clock in CLOCKS
    }
    return all(one.equal for one in done), together


def per_step(case: Case, rounds: int, turns: int, few: int, many: int) -> list[Row]:
    """Rows of one case. CPU time carries the target, since on the wall other programs count too."""
    equal, spent = measure(case, rounds, turns, few, many)
    cpu, wall = spent["cpu"], spent["wall"]
    return [
        Row(f"{case.name}: picture equals modular's", "yes" if equal else "no", "bit for bit", equal),
        Row.at_most(f"{case.name}: CPU time per step, Triptych / modular", cpu.ratio("triptych"), STEP_LIMIT),
        Row(f"{case.name}: the same on the wall", f"{wall.ratio('triptych'):.3f}"),
        Row(f"{case.name}: CPU time per step, standard / modular", f"{cpu.ratio('standard'):.3f}"),
        Row(f"{case.name}: CPU ms per step", cpu.per_step()),
        Row(f"{case.name}: CPU ms of a request beyond its steps", cpu.beyond()),
    ]


@dataclass(frozen=True)
class Fresh:
    """A process of its own, from its start to its first picture: seconds of CPU time and on the wall, and the
    bytes of its peak resident memory."""

    cpu: float
    wall: float
    peak: int


def first_picture(case: Case, rounds: int, threads: int) -> list[Row]:
    """Rows from fresh processes: peak memory and CPU time over modular's, the standard pipeline's beside them."""
    runs: dict[str, list[Fresh]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, done in runs.items():
            done.append(start(name, case, threads))

    def medians(what: Callable[[Fresh], float]) -> dict[str, float]:
        return {name: statistics.median(map(what, done)) for name, done in runs.items()}

    def figures(values: dict[str, float], unit: float, digits: int) -> str:
        return ", ".join(f"{name} {value / unit:.{digits}f}" for name, value in values.items())

    cpu, wall, peak = medians(lambda one: one.cpu), medians(lambda one: one.wall), medians(lambda one: one.peak)
    memory, seconds = peak["triptych"] / peak["modular"], cpu["triptych"] / cpu["modular"]
    what = f"{case.name}: import to first picture"
    return [
        Row.at_most(f"{case.name}: peak memory, Triptych / modular", memory, MEMORY_LIMIT),
        Row(f"{case.name}: peak MiB", figures(peak, 2**20, 0)),
        Row.at_most(f"{what}, CPU time, Triptych / modular", seconds, FIRST_LIMIT),
        Row(f"{what}, the same on the wall", f"{wall['triptych'] / wall['modular']:.3f}"),
        # Importing the modular blocks alone puts diffusers' own modular pipeline beyond its standard one.
        Row(f"{what}, CPU time, Triptych / standard", f"{cpu['triptych'] / cpu['standard']:.3f}"),
        Row(f"{what}, CPU time, modular / standard", f"{cpu['modular'] / cpu['standard']:.3f}"),
        Row(f"{what}, CPU seconds", figures(cpu, 1, 2)),
        Row(f"{what}, seconds on the wall", figures(wall, 1, 2)),
    ]


def start(contender: str, case: Case, threads: int) -> Fresh:
    """Runs one contender in a process of its own. Raises CalledProcessError when it fails."""
    arguments = [contender, case.folder, json.dumps(case.fields), str(threads)]
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'src')!r}]; "
    code += "from benchmarks.first_picture import main; main(*sys.argv[1:])"
    command = [sys.executable, "-c", code, *arguments]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    wall = time.perf_counter() - began
    cpu, peak = done.stdout.split()[-2:]
    return Fresh(float(cpu), wall, int(peak))


def main() -> int:
    """Runs all of it; 1 if a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="rounds per contender (default 9)")
    parser.add_argument("--turns", type=int, default=5, help="turns per round (default 5)")
    parser.add_argument("--processes", type=int, default=5, help="fresh processes per contender (default 5)")
    parser.add_argument("--steps", type=int, nargs=2, default=(4, 36), help="few and many (default 4 36)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads, for all alike")
    parser.add_argument("--only", help="cases whose name begins with this")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/generate.md")
    parser.add_argument("--round", help=argparse.SUPPRESS)  # this process is one round of `measure`
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.round:
        folder, fields, order = json.loads(options.round)
        done = take_round(Case("", folder, fields), order, options.turns, *options.steps)
        spent = {c: {name: (one.few, one.many) for name, one in by.items()} for c, by in done.spent.items()}
        print(json.dumps([done.equal, spent]))
        return 0
    rows: list[Row] = []
    for case in cases():
        if case.name.startswith(options.only or ""):
            rows += per_step(case, options.rounds, options.turns, *options.steps)
            if case.name == "emoji" and options.processes:
                rows += first_picture(case, options.processes, options.threads)
    return report("generate", rows, options.save)


if __name__ == "__main__":
    raise SystemExit(main())

"""What it costs to be split, and what a split keeps of its slowest stage: per request, and with many in flight.

Latency: requests through a fused and a split Engine in turns, each stage with one thread, wherever the system puts it.
Throughput: so many in flight through worker processes, beside the slowest stage driven alone, back to back, by the same
number of threads on the same processors; both in turns, the median of the turns' ratios. Once with stages that only
wait, and with real ones.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import operator
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: the repository's root is not on the path then
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    # So that the workers, processes of their own, find the package too.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))

import torch  # noqa: E402

from benchmarks import Row, report, waiting  # noqa: E402
from benchmarks.contenders import open_modular, pictures_in  # noqa: E402
from benchmarks.rates import completions, rate_of  # noqa: E402
from benchmarks.stage_alone import StageAlone  # noqa: E402
from triptych import Engine, Request, Result  # noqa: E402
from triptych.config import Layout, WorkerPlan  # noqa: E402
from triptych.engine.opening import HUGE_PAGES  # noqa: E402
from triptych.worker.opening import keep_memory, settle  # noqa: E402

TURNS = 50
LATENCY_LIMIT, WAITING_LIMIT, REAL_LIMIT = 4.0, 0.97, 0.9
WAITS = (0.010, 0.050, 0.010)
CLIENTS = 8


@dataclass(frozen=True)
class Case:
    """A folder, and its request with few steps, for the latency, and with so many that denoising is by far the
    slowest stage, for the throughput."""

    name: str
    folder: str
    fields: dict[str, Any]
    few: int
    many: int

    def request(self, steps: int) -> dict[str, Any]:
        """The request's fields."""
        return {**self.fields, "num_inference_steps": steps, "seed": 5}


def cases() -> list[Case]:
    """The embedded model, and a tiny random one of a video family."""
    from tests.families import FAMILIES, folder
    from triptych.model import open_model

    emoji = {"prompt": "a red apple on the left, blue background", "negative_prompt": "", "guidance_scale": 3.0}
    emoji |= {"width": 64, "height": 64}
    family = FAMILIES["wan-t2v"]
    wan = {**family.fields, "guidance_scale": family.guidance_scale}
    return [
        Case("emoji", open_model("emoji").folder, emoji, few=2, many=6),
        Case("wan-t2v (tiny)", str(folder("wan-t2v")), wan, few=2, many=24),
    ]


def waiting_rows(rounds: int, count: int) -> list[Row]:
    """Stages that only wait, in worker processes."""
    wait, ratios, rates = max(WAITS), [], []
    with waiting.cluster(WAITS) as run:
        completions(run, CLIENTS, CLIENTS)
        for _ in range(rounds):
            bare = waiting.alone(wait, count // 2)
            rates.append(rate_of(completions(run, CLIENTS, count), CLIENTS))
            ratios.append(rates[-1] / bare)
        single = [seconds_of(run) for _ in range(count)]
    what = f"waiting {'/'.join(f'{1000 * one:g}' for one in WAITS)} ms"
    beyond = 1000 * (statistics.median(single) - sum(WAITS))
    return [
        Row.at_least(f"{what}: throughput over the slowest stage alone", statistics.median(ratios), WAITING_LIMIT),
        Row(f"{what}: requests per second, {CLIENTS} in flight", f"{statistics.median(rates):.2f}"),
        Row(f"{what}: a request beyond its waits", f"{beyond:.2f} ms"),
    ]


def seconds_of(run: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def pinned() -> tuple[Layout, tuple[int, ...]]:
    """A worker for each stage, a thread each; denoise has a processor to itself. With that processor."""
    *others, last = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    plans = [
        WorkerPlan(stages=("encode",), threads=1, cpus=tuple(others) or (last,)),
        WorkerPlan(stages=("denoise",), threads=1, cpus=(last,)),
        WorkerPlan(stages=("decode",), threads=1, cpus=tuple(others) or (last,)),
    ]
    return Layout(name="pinned", workers=tuple(plans)), (last,)


def asking(engine: Engine, fields: dict[str, Any]) -> Callable[[], Result]:
    """What runs a request through an engine."""
    return lambda: engine.generate(Request.parse(**fields))


def latency_rows(case: Case, openings: int) -> list[Row]:
    """Fused and split engines in turns, opened anew a few times."""
    taken: dict[str, list[float]] = {"fused": [], "split": []}
    outside: dict[str, list[float]] = {"fused": [], "split": []}
    equal = True
    for _ in range(openings):
        equal &= _take_turns(case, taken, outside)
    what = f"{case.name}, {case.few} steps"
    more = "a request split takes more than fused"
    beyond = _more(taken)
    return [
        Row(f"{case.name}: pictures of split and fused", "equal" if equal else "differ", "bit for bit", equal),
        Row.at_most(f"{what}: {more}", 1000 * statistics.median(beyond), LATENCY_LIMIT, "ms", 2),
        Row(f"{what}: {more}, by opening", _spread(beyond)),
        Row(f"{what}: {more}, outside of its stages", f"{1000 * statistics.median(_more(outside)):.2f} ms"),
        Row(f"{what}: a request", _medians(taken, 1)),
        Row(f"{what}: outside of its stages", _medians(outside, 2)),
    ]


def _more(seconds: dict[str, list[float]]) -> list[float]:
    """By how many seconds split is longer than fused, turn by turn."""
    return list(map(operator.sub, seconds["split"], seconds["fused"]))


def _spread(more: list[float]) -> str:
    """The medians of the openings' turns."""
    each = [1000 * statistics.median(more[at : at + TURNS]) for at in range(0, len(more), TURNS)]
    return f"{min(each):.1f} to {max(each):.1f} ms"


def _medians(taken: dict[str, list[float]], digits: int) -> str:
    return ", ".join(f"{name} {1000 * statistics.median(seconds):.{digits}f} ms" for name, seconds in taken.items())


def _take_turns(case: Case, taken: dict[str, list[float]], outside: dict[str, list[float]]) -> bool:
    """Adds each turn's requests, by contender: how long they took, and of it what is outside of the stages. A turn is
    one request of each, after one that finds others' data in the caches and does not count: the machine's speed drifts,
    and the less time lies between those that are compared, the less of it. Whether fused and split give equal
    pictures."""
    fields = case.request(case.few)
    layouts = {"fused": Layout.fused().overridden(threads=1), "split": Layout.split().overridden(threads=1)}
    with contextlib.ExitStack() as stack:
        engines = {
            name: asking(stack.enter_context(Engine.open(case.folder, layout=layout, device="cpu")), fields)
            for name, layout in layouts.items()
        }
        made = {name: run() for name, run in engines.items()}
        settle()  # as worker processes do
        stack.callback(gc.unfreeze)
        order, shuffler = list(engines), random.Random(0)
        for _ in range(TURNS):
            shuffler.shuffle(order)
            for name in order:
                engines[name]()
                whole, rest = _timed(engines[name])
                taken[name].append(whole)
                outside[name].append(rest)
    return bool((pictures_in(made["fused"]) == pictures_in(made["split"])).all())


def _timed(run: Callable[[], Result]) -> tuple[float, float]:
    """How long a request takes, and how much of it outside of its stages."""
    began = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - began
    return seconds, seconds - sum(took.ran for took in result.times)


def throughput_rows(case: Case, rounds: int, count: int) -> list[Row]:
    """A split engine with requests in flight, beside its slowest stage alone, a fused engine, and diffusers."""
    fields = case.request(case.many)
    layout, cpus = pinned()
    rates: dict[str, list[float]] = {name: [] for name in ("split", "denoise alone", "fused", "diffusers in a loop")}
    with contextlib.ExitStack() as stack:
        split = stack.enter_context(Engine.open(case.folder, layout=layout, device="cpu"))
        fused_layout = Layout.fused().overridden(threads=1)
        fused = asking(stack.enter_context(Engine.open(case.folder, layout=fused_layout, device="cpu")), fields)
        bare = stack.enter_context(StageAlone(case.folder, "denoise", fields, cpus))
        loop = open_modular(case.folder)
        run = asking(split, fields)
        stages = [f"{took.stage} {1000 * took.ran:.1f} ms" for took in fused().times]
        equal = bool((pictures_in(run()) == loop(fields)).all())
        bare.rate(1)
        for _ in range(rounds):
            rates["denoise alone"].append(bare.rate(count // 2))
            rates["split"].append(rate_of(completions(run, CLIENTS, count), CLIENTS))
            rates["fused"].append(rate_of(completions(fused, CLIENTS, count), CLIENTS))
            looped = statistics.median(seconds_of(lambda: loop(fields)) for _ in range(5))
            rates["diffusers in a loop"].append(1 / looped)
    kept = statistics.median(map(operator.truediv, rates["split"], rates["denoise alone"]))
    what = f"{case.name}, {case.many} steps, {CLIENTS} in flight"
    middle = {name: statistics.median(found) for name, found in rates.items()}
    return [
        Row(f"{case.name}: pictures of split and diffusers", "equal" if equal else "differ", "bit for bit", equal),
        Row.at_least(f"{what}: split over denoise alone", kept, REAL_LIMIT),
        Row(f"{what}: requests per second", ", ".join(f"{name} {rate:.2f}" for name, rate in middle.items())),
        Row(f"{case.name}, {case.many} steps: stages fused", ", ".join(stages)),
    ]


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """All that was asked for."""
    wanted = options.only or ""
    if "waiting".startswith(wanted):
        yield from waiting_rows(options.rounds, options.count)
    for case in cases():
        if case.name.startswith(wanted):
            if "latency" in options.parts:
                yield from latency_rows(case, options.openings)
            if "throughput" in options.parts:
                yield from throughput_rows(case, options.rounds, options.count)


def main() -> int:
    """Runs all of it; 1 if a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each throughput (default 5)")
    parser.add_argument("--openings", type=int, default=10, help="of the engines in the latency (default 10)")
    parser.add_argument("--count", type=int, default=60, help="requests per turn (default 60)")
    parser.add_argument("--parts", nargs="+", default=["latency", "throughput"], choices=["latency", "throughput"])
    parser.add_argument("--only", help="`waiting`, or the cases whose name begins with this")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/layout.md")
    options = parser.parse_args()
    if options.count < CLIENTS + 2:
        parser.error(f"--count must be at least {CLIENTS + 2}: a rate is of what ends after all clients have begun")
    if not os.environ.keys() >= HUGE_PAGES.keys():  # fused and diffusers run in this process: as in those of workers
        os.execve(sys.executable, sys.orig_argv, HUGE_PAGES | os.environ)
    torch.set_num_threads(1)
    keep_memory()
    return report("layout", list(rows(options)), options.save)


if __name__ == "__main__":
    raise SystemExit(main())

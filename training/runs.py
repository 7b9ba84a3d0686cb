"""What both trainers share: the budget, the moving average, and checkpoints that resume exactly."""

import argparse
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DEFAULT_WORK = Path(__file__).with_name("work")


@dataclass
class Budget:
    """A training run's length, in minutes of training or in samples; the schedule follows `fraction`."""

    minutes: float | None
    samples: int | None
    elapsed: float = 0.0
    seen: int = 0
    _mark: float = field(default_factory=time.monotonic)

    def tick(self, samples: int) -> None:
        now = time.monotonic()
        self.elapsed += now - self._mark
        self._mark = now
        self.seen += samples

    def pause(self) -> None:
        """Leave out the time since the last tick: probes and checkpoints are not training."""
        self._mark = time.monotonic()

    @property
    def fraction(self) -> float:
        by_time = self.elapsed / (60 * self.minutes) if self.minutes else 0.0
        by_samples = self.seen / self.samples if self.samples else 0.0
        return min(1.0, max(by_time, by_samples))

    @property
    def done(self) -> bool:
        return self.fraction >= 1.0


def warm_then_decay(step: int, fraction: float, warm_up: int, decay_from: float, floor: float) -> float:
    """Factor on the learning rate: linear warm-up in steps, level, then linear decay over the rest."""
    warm = min(1.0, (step + 1) / warm_up)
    if fraction < decay_from:
        return warm
    return warm * max(floor, 1 - (fraction - decay_from) / (1 - decay_from))


class MovingAverage:
    """Exponential moving average of parameters, young at first so that it follows an untrained model."""

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        self.live = list(parameters)
        self.average = [p.detach().clone() for p in self.live]
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.live], 1 - decay)

    def swap(self) -> None:
        """Exchange live and averaged parameters: before a probe, and again after it.

        Storage changes hands, not values: other processes go on training the shared live parameters meanwhile.
        """
        for index, live in enumerate(self.live):
            live.data, self.average[index] = self.average[index], live.data


def save_checkpoint(path: Path, budget: Budget, step: int, rng: random.Random, parts: dict[str, Any]) -> None:
    """Everything a resumed run needs; written beside the old checkpoint, then renamed over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "step": step,
        "elapsed": budget.elapsed,
        "seen": budget.seen,
        "rng": rng.getstate(),
        "torch_rng": torch.get_rng_state(),
        **parts,
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def load_checkpoint(path: Path, budget: Budget, rng: random.Random) -> dict[str, Any]:
    """The saved parts; clock, sample count and random states are put back on the way.

    Our own file: it holds optimizer state and Python's random state, which the safe loader refuses.
    """
    state = torch.load(path, map_location="cpu", weights_only=False)
    budget.elapsed, budget.seen = state["elapsed"], state["seen"]
    rng.setstate(state["rng"])
    torch.set_rng_state(state["torch_rng"])
    budget.pause()
    return state


def add_run_options(parser: argparse.ArgumentParser, minutes: float) -> None:
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="folder of checkpoints")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 …")
    parser.add_argument("--minutes", type=float, default=None, help=f"length of the run (default {minutes:g})")
    parser.add_argument("--samples", type=int, default=None, help="length of the run in samples instead")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="start over instead of resuming from --work")
    parser.set_defaults(default_minutes=minutes)


def budget_of(arguments: argparse.Namespace) -> Budget:
    if arguments.minutes is None and arguments.samples is None:
        return Budget(arguments.default_minutes, None)
    return Budget(arguments.minutes, arguments.samples)

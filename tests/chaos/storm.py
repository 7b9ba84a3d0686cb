"""Many jobs while something breaks every second, and what became of them."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from tests.chaos.cables import IN_BODY, IN_HEAD
from tests.chaos.cluster import LEASE, Cluster, Lost, Wanted
from tests.chaos.matrix import OUTSIDE, PHASES
from tests.chaos.remote import Deed, Puppet

__all__ = ["Outcome", "Weather", "run_jobs"]

IN_FLIGHT = 12


@dataclass
class Outcome:
    """What became of many jobs."""

    jobs: int = 0
    lost: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    error: float = 0.0
    """the largest of a pixel in 0…1"""
    retries: int = 0
    resumes: int = 0
    seconds: float = 0.0


def run_jobs(cluster: Cluster, wanted: Sequence[Wanted], reference: dict[Wanted, bytes]) -> Outcome:
    """Keeps a number of jobs in flight until all have ended."""
    outcome, began = Outcome(jobs=len(wanted)), time.monotonic()
    flying: list[tuple[str, Wanted]] = []
    for one in wanted:
        if len(flying) >= IN_FLIGHT:
            _land(cluster, *flying.pop(0), reference, outcome)
        flying.append((cluster.submit(one), one))
    for job, one in flying:
        _land(cluster, job, one, reference, outcome)
    outcome.seconds = time.monotonic() - began
    return outcome


def _land(cluster: Cluster, job: str, wanted: Wanted, reference: dict[Wanted, bytes], outcome: Outcome) -> None:
    try:
        picture = cluster.result(job)
    except Lost as error:
        outcome.lost.append(str(error))
        return
    if picture != reference[wanted]:
        outcome.different.append(job)
        outcome.error = max(outcome.error, _error(picture, reference[wanted]))
    record = cluster.job(job)
    outcome.retries += record["retries"]
    outcome.resumes += sum(stage["resumed_at"] > 0 for stage in record["times"])


def _error(one: bytes, other: bytes) -> float:
    pixels = [np.asarray(Image.open(io.BytesIO(file)), dtype=np.float64) / 255 for file in (one, other)]
    return float(np.abs(pixels[0] - pixels[1]).max())


class Weather:
    """Breaks something every so many seconds, on a thread of its own, until `stop`. The same seed breaks the same
    things in the same order."""

    def __init__(self, cluster: Cluster, seed: int, every: float = 1.0) -> None:
        self.faults: Counter[str] = Counter()
        self._cluster, self._random, self._every = cluster, random.Random(seed), every
        self._ended = threading.Event()
        self._healing: list[threading.Timer] = []
        self._deeds: dict[str, tuple[int, Callable[[Puppet], None]]] = {
            "SIGKILL": (1, self._kill),
            "SIGSTOP": (1, self._stop),
            "partition": (1, self._part),
            "exception": (4, lambda puppet: self._arm(puppet, "raise")),
            "out-of-memory": (4, lambda puppet: self._arm(puppet, "oom")),
            "corrupted byte": (4, self._damage),
        }
        self._thread = threading.Thread(target=self._run, name="chaos-weather", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No more faults; what was stopped or parted is healed."""
        self._ended.set()
        self._thread.join()
        for timer in self._healing:
            timer.join()
        self._cluster.heal()

    def _run(self) -> None:
        names = list(self._deeds)
        weights = [weight for weight, _ in self._deeds.values()]
        while not self._ended.wait(self._every):
            fault = self._random.choices(names, weights)[0]
            living = sorted(self._cluster.panel.living(), key=lambda puppet: puppet.name)
            chosen = [puppet for puppet in living if fault not in OUTSIDE or self._has_twin(puppet)]
            if chosen:
                self.faults[fault] += 1
                self._deeds[fault][1](self._random.choice(chosen))

    def _has_twin(self, puppet: Puppet) -> bool:
        """Whether another worker of its stage works, so that the jobs get on and not only the processes start."""
        if puppet.name not in self._cluster.stages:
            return True
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            workers = json.loads(self._cluster.ask("GET", "/v1/cluster")[1])["workers"]
            working = {one["name"] for one in workers if one["state"] != "loading" and one["last_seen"] < LEASE / 2}
            stage = self._cluster.stages[puppet.name]
            return any(self._cluster.stages[name] == stage for name in working - {puppet.name})
        return False

    def _kill(self, puppet: Puppet) -> None:
        puppet.signal(signal.SIGKILL)

    def _stop(self, puppet: Puppet) -> None:
        puppet.signal(signal.SIGSTOP)
        self._later(lambda: puppet.signal(signal.SIGCONT))

    def _part(self, puppet: Puppet) -> None:
        self._cluster.cut(puppet)
        self._later(lambda: self._cluster.mend(puppet))

    def _arm(self, puppet: Puppet, deed: Deed) -> None:
        puppet.arm(self._random.choice(PHASES), deed)

    def _damage(self, puppet: Puppet) -> None:
        if puppet.name in self._cluster.control and self._random.random() < 0.3:
            self._cluster.control[puppet.name].trap(self._random.choice(("up", "down")), damage=True)
        else:
            self._cluster.data[puppet.name].trap("down", self._random.choice((IN_HEAD, IN_BODY)), damage=True)

    def _later(self, heal: Callable[[], None]) -> None:
        timer = threading.Timer(1.5 * LEASE, heal)
        self._healing = [one for one in self._healing if one.is_alive()] + [timer]
        timer.start()

"""What serving costs and what it bears, beside cache-dit's server and diffusers behind a lock.

Start: `triptych serve` until it is ready, beside a fresh process until diffusers has loaded the same model. Overhead:
one picture by HTTP and by the Engine behind it in turns. Load: 8 clients, each with its next request as its last is
answered; then requests of mixed sizes that arrive by a Poisson process, the same for all, whether the last was answered
or not; then 64 clients that follow their jobs' events while every worker is busy, and how long `/health` takes
meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import operator
import os
import random
import selectors
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: the repository's root is not on the path then
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks import Row, report  # noqa: E402
from benchmarks.serving_contenders import (  # noqa: E402
    Connection,
    Server,
    cache_dit,
    diffusers_loading,
    locked_diffusers,
    served_engine,
    triptych,
)

MODEL = "emoji"
FIELDS: dict[str, Any] = {
    "prompt": "a red apple on the left, blue background", "width": 64, "height": 64, "num_inference_steps": 4,
    "guidance_scale": 1.0, "seed": 5,
}  # fmt: skip
"""Without a second branch of guidance, which cache-dit's API cannot ask of this pipeline."""
SIZES = {(64, 64): 5, (96, 64): 2, (96, 96): 2, (128, 128): 1}
"""How often each size is asked for."""
CLIENTS, HELD = 8, 64
READY_LIMIT, OVERHEAD_LIMIT, HEALTH_LIMIT = 1.3, 5.0, 50.0
LOADED = 0.7
"""Arrivals, as a share of what the slowest of the servers manages with 8 clients."""
SLO_FACTOR = 5.0
"""A request is in time if it takes at most so many times what diffusers takes for one of its size alone."""
PROBES_PER_SECOND = 50
LONG_STEPS = 100
WARM = 3
TURNS, IN_A_TURN = 6, 6
"""of the overhead's contenders, each time that they are opened; and requests in each"""


@dataclass
class Served:
    """What one server did: requests per second of every turn, and the seconds of every request."""

    rates: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    arrived: list[float] = field(default_factory=list)
    in_time: int = 0


@dataclass(frozen=True)
class Arrival:
    """A request that comes so many seconds after the first one could."""

    seconds: float
    size: tuple[int, int]
    seed: int

    @property
    def fields(self) -> dict[str, Any]:
        """The request's body."""
        return {**FIELDS, "width": self.size[0], "height": self.size[1], "seed": self.seed}


def arrivals(rate: float, count: int, seed: int) -> list[Arrival]:
    """Independent requests of mixed sizes, `rate` of them a second on average."""
    drawn = random.Random(seed)
    moment, made = 0.0, []
    for _ in range(count):
        moment += drawn.expovariate(rate)
        (size,) = drawn.choices(list(SIZES), list(SIZES.values()))
        made.append(Arrival(moment, size, drawn.randrange(2**31)))
    return made


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of all does not exceed."""
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1]


def start_rows(folder: str, starts: int) -> list[Row]:
    """In turns, so that neither has the warmer files."""
    ready, loaded = [], []
    for _ in range(starts):
        loaded.append(diffusers_loading(folder))
        with triptych(MODEL) as server:
            ready.append(server.seconds)
    ratio = statistics.median(map(operator.truediv, ready, loaded))
    return [
        Row.at_most("start to ready / diffusers' loading", ratio, READY_LIMIT),
        Row("start, seconds", f"{statistics.median(ready):.2f}, diffusers {statistics.median(loaded):.2f}"),
    ]


def overhead_rows(openings: int) -> list[Row]:
    """One Engine by HTTP and without it: the same worker in both, since where its weights lie makes a process faster
    or slower for its life; opened anew a few times for that. And an Engine that has its stages in this process."""
    taken: dict[str, list[float]] = {}
    for _ in range(openings):
        _take_turns(taken)
    served = taken["by HTTP"]

    def beyond(name: str) -> float:
        return 1000 * statistics.median(map(operator.sub, served, taken[name]))

    what = "one 64×64 picture by HTTP takes more than"
    return [
        Row.at_most(f"{what} by the same Engine", beyond("by the same Engine"), OVERHEAD_LIMIT, "ms", 2),
        Row(f"{what} by an Engine without a worker process", f"{beyond('in one process'):.2f} ms"),
        Row("one 64×64 picture", ", ".join(f"{k} {1000 * statistics.median(v):.1f} ms" for k, v in taken.items())),
    ]


def _take_turns(taken: dict[str, list[float]]) -> None:
    """Adds the median of each turn's requests, by contender. The first of a turn finds others' data in the caches, and
    does not count."""
    from triptych import Engine, Request
    from triptych.config import Layout

    request = Request.parse(**FIELDS)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(served_engine(MODEL, FIELDS))
        connection = stack.enter_context(contextlib.closing(server.connect()))
        layout = Layout.fused().overridden(threads=1)
        engine = stack.enter_context(Engine.open(MODEL, layout=layout, device="cpu"))

        def alone() -> object:
            job = engine.submit(request, files=True)
            job.result()
            return [file.data or file.path for file in engine.result_files(job.id)]

        runs: list[tuple[str, Callable[[], list[float]]]] = [
            ("by HTTP", lambda: [seconds_of(lambda: connection.generate(FIELDS)) for _ in range(IN_A_TURN)]),
            ("by the same Engine", lambda: server.make(IN_A_TURN)),
            ("in one process", lambda: [seconds_of(alone) for _ in range(IN_A_TURN)]),
        ]
        for number in range(TURNS):
            for name, run in runs[number % len(runs) :] + runs[: number % len(runs)]:
                taken.setdefault(name, []).append(statistics.median(run()[1:]))


def seconds_of(run: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def closed_loop(server: Server, clients: int, count: int) -> tuple[float, list[float]]:
    """Requests per second and the seconds of each, while every client always has one under way."""
    took: list[float] = []
    left = iter(range(count))
    lock = threading.Lock()

    def work() -> None:
        with contextlib.closing(server.connect()) as connection:
            while True:
                with lock:
                    number = next(left, None)
                if number is None:
                    return
                seconds = seconds_of(lambda seed=number: connection.generate({**FIELDS, "seed": seed}))
                with lock:
                    took.append(seconds)

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for done in [pool.submit(work) for _ in range(clients)]:
            done.result()
    return count / (time.perf_counter() - began), took


def open_loop(server: Server, planned: Sequence[Arrival]) -> list[float]:
    """The seconds of each request, from the moment at which it was to be sent."""
    own = threading.local()
    connections: list[Connection] = []

    def send(arrival: Arrival, due: float) -> float:
        if not hasattr(own, "connection"):
            own.connection = server.connect()
            connections.append(own.connection)
        own.connection.generate(arrival.fields)
        return time.perf_counter() - due

    began = time.perf_counter()
    with ThreadPoolExecutor(len(planned)) as pool:
        sent = []
        for arrival in planned:
            due = began + arrival.seconds
            time.sleep(max(0.0, due - time.perf_counter()))
            sent.append(pool.submit(send, arrival, due))
        took = [one.result() for one in sent]
    for connection in connections:
        connection.close()
    return took


def load_rows(folder: str, rounds: int, count: int, seed: int) -> list[Row]:
    """All servers at once, each under load in its turn."""
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(triptych(MODEL, "--layout", str(stack.enter_context(small_requests()))))
        servers = [ours, stack.enter_context(locked_diffusers(folder))]
        rows: list[Row] = []
        try:
            servers.append(stack.enter_context(cache_dit(folder)))
        except RuntimeError as error:
            print(error, file=sys.stderr)
            rows.append(Row("cache-dit's server", "not there", "measured too", False))
        rows += same_rows(servers)
        alone = {size: _alone(servers[1], size) for size in SIZES}
        done = {server.name: Served() for server in servers}
        for number in range(rounds):
            for server in _rotated(servers, number):
                rate, took = closed_loop(server, CLIENTS, count)
                done[server.name].rates.append(rate)
                done[server.name].busy += took
        rate = LOADED * min(statistics.median(one.rates) for one in done.values())
        for number in range(rounds):
            planned = arrivals(rate, count, seed + number)
            for server in _rotated(servers, number):
                took = open_loop(server, planned)
                done[server.name].arrived += took
                limits = [SLO_FACTOR * alone[one.size] for one in planned]
                done[server.name].in_time += sum(map(operator.le, took, limits))
        rows += compared(ours.name, done, rate)
        return rows + held_rows(ours)


def _rotated(servers: Sequence[Server], number: int) -> list[Server]:
    at = number % len(servers)
    return [*servers[at:], *servers[:at]]


def _alone(server: Server, size: tuple[int, int]) -> float:
    with contextlib.closing(server.connect()) as connection:
        fields = Arrival(0.0, size, 1).fields
        return statistics.median(seconds_of(lambda: connection.generate(fields)) for _ in range(5))


@contextlib.contextmanager
def small_requests() -> Iterator[Path]:
    """The layout for many small requests: a whole model on each processor."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with tempfile.TemporaryDirectory(prefix="triptych-serving-") as place:
        path = Path(place, "small.yaml")
        path.write_text(f"name: small\nworkers:\n  - stages: all\n    replicas: {count}\n    threads: 1\n")
        yield path


def same_rows(servers: Sequence[Server]) -> list[Row]:
    """Whether all do the same work: their pictures; and a warm-up of every size."""
    pictures = []
    for server in servers:
        with contextlib.closing(server.connect()) as connection:
            pictures.append(connection.picture(FIELDS))
            for size in SIZES:
                for _ in range(WARM):
                    connection.generate(Arrival(0.0, size, 1).fields)
        closed_loop(server, CLIENTS, CLIENTS)
    first, *others = (np.asarray(picture).astype(int) for picture in pictures)
    largest = max(int(abs(first - other).max()) for other in others)
    return [Row("pictures of all servers, largest difference of a byte", f"{largest}", "≤ 1", largest <= 1)]


def compared(ours: str, done: dict[str, Served], rate: float) -> list[Row]:
    """Ours against the best of the others in each respect, and everyone's figures."""
    others = [one for name, one in done.items() if name != ours]
    own = done[ours]
    throughput = statistics.median(own.rates) / max(statistics.median(one.rates) for one in others)
    busy = percentile(own.busy, 0.99) / min(percentile(one.busy, 0.99) for one in others)
    arrived = percentile(own.arrived, 0.99) / min(percentile(one.arrived, 0.99) for one in others)
    in_time = own.in_time / max(one.in_time for one in others) if any(one.in_time for one in others) else 1.0
    at = f"{CLIENTS} clients"
    poisson = f"Poisson, {rate:.1f} requests a second of mixed sizes"
    rows = [
        Row.at_least(f"{at}: throughput / the best other's", throughput, 1.0),
        Row.at_most(f"{at}: p99 / the best other's", busy, 1.0),
        Row.at_most(f"{poisson}: p99 / the best other's", arrived, 1.0),
        Row.at_least(f"{poisson}: in time / the best other's", in_time, 1.0),
    ]
    for name, one in done.items():
        figures = f"{statistics.median(one.rates):.1f} a second, {_percentiles(one.busy)}"
        rows.append(Row(f"{at}: {name}", figures))
    for name, one in done.items():
        share = 100 * one.in_time / len(one.arrived)
        rows.append(Row(f"{poisson}: {name}", f"{share:.1f} % in time, {_percentiles(one.arrived)}"))
    return rows


def _percentiles(seconds: Sequence[float]) -> str:
    return ", ".join(f"p{100 * share:g} {1000 * percentile(seconds, share):.0f} ms" for share in (0.5, 0.9, 0.99))


def held_rows(server: Server, seconds: float = 10.0) -> list[Row]:
    """`/health` while clients follow more jobs than there are workers."""
    body = {**FIELDS, "num_inference_steps": LONG_STEPS}
    took: list[float] = []
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(contextlib.closing(server.connect()))
        jobs = [json.loads(connection.ask("POST", "/v1/jobs", body))["id"] for _ in range(HELD)]
        followers = stack.enter_context(Followers(server, jobs))
        began = time.perf_counter()
        for number in range(int(PROBES_PER_SECOND * seconds)):
            time.sleep(max(0.0, began + number / PROBES_PER_SECOND - time.perf_counter()))
            took.append(seconds_of(lambda: connection.ask("GET", "/health")))
        cluster = json.loads(connection.ask("GET", "/v1/cluster"))
        busy = [worker["state"] == "busy" for worker in cluster["workers"]]
        open_still = followers.open
        for job in jobs:
            connection.ask("DELETE", f"/v1/jobs/{job}")
    p99 = 1000 * percentile(took, 0.99)
    held = f"{open_still} held, {sum(busy)} of {len(busy)} workers busy to the end"
    return [
        Row.at_most(f"{HELD} connections: p99 of /health", p99, HEALTH_LIMIT, "ms", 1),
        Row(f"{HELD} connections", held, f"{HELD} held, all busy", open_still == HELD and all(busy)),
    ]


class Followers:
    """Clients that each follow one job's events, and read what comes."""

    def __init__(self, server: Server, jobs: Sequence[str]) -> None:
        self._selector = selectors.DefaultSelector()
        self._ended = threading.Event()
        self._sockets: list[socket.socket] = []
        for job in jobs:
            sock = socket.create_connection(server.address)
            sock.sendall(f"GET /v1/jobs/{job}/events HTTP/1.1\r\nHost: {server.address[0]}\r\n\r\n".encode())
            self._sockets.append(sock)
            self._selector.register(sock, selectors.EVENT_READ)
        self._heard: set[int] = set()
        self._closed: set[int] = set()
        self._thread = threading.Thread(target=self._read, name="followers")

    @property
    def open(self) -> int:
        """How many have heard something and are still connected."""
        return len(self._heard - self._closed)

    def __enter__(self) -> Followers:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._selector.close()
        for sock in self._sockets:
            sock.close()

    def _read(self) -> None:
        while not self._ended.is_set():
            for key, _ in self._selector.select(0.1):
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                (self._heard if sock.recv(1 << 16) else self._closed).add(key.fd)
                if key.fd in self._closed:
                    self._selector.unregister(sock)


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """All that was asked for."""
    from triptych.model import open_model

    folder = open_model(MODEL).folder
    if "start" in options.parts:
        yield from start_rows(folder, options.starts)
    if "overhead" in options.parts:
        yield from overhead_rows(options.openings)
    if "load" in options.parts:
        yield from load_rows(folder, options.rounds, options.count, options.seed)


def main() -> int:
    """Runs all of it; 1 if a target was missed."""
    parts = ["start", "overhead", "load"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=7, help="of each server and process (default 7)")
    parser.add_argument("--openings", type=int, default=5, help="of the server and engines compared (default 5)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each server under load (default 3)")
    parser.add_argument("--count", type=int, default=200, help="requests per turn (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals (default 0)")
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/serving.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    return report("serving", list(rows(options)), options.save)


if __name__ == "__main__":
    raise SystemExit(main())

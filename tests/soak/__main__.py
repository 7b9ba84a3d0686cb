"""`python -m tests.soak`: thousands of one-step requests through a real server; prints a table and exits 1 on a
miss."""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import psutil

from benchmarks import Row, report
from tests.e2e.commands import Command, short_folder
from tests.families import FAMILIES, folder
from tests.soak.load import Load

FAMILY = "flux"
WARM_UP = 0.05
"""of the requests come before those that are measured"""
CLIENTS = 8
QUARTERS = 4
GROWTH_LIMIT = 1.02
SAMPLE_SECONDS = 1.0
REST_SECONDS = 30.0
"""within which an idle server is back at what it holds: threads end when nothing was there for them for a while"""
MIB = 1 << 20
LAYOUT = """
name: soak
workers:
  - stages: each
    threads: 1
limits:
  retention_seconds: {retention}
serve:
  port: 0
"""
"""What ended is soon forgotten: what is kept for a day on purpose would be taken for a leak."""


@dataclass(frozen=True)
class Holding:
    """What an idle process holds."""

    files: int
    threads: int

    @classmethod
    def of(cls, process: psutil.Process) -> Holding:
        """Looks at a process."""
        return cls(process.num_fds(), process.num_threads())

    def least(self, other: Holding) -> Holding:
        """The less of each of two."""
        return Holding(min(self.files, other.files), min(self.threads, other.threads))


class Watch:
    """The resident memory of every process, looked at again and again while requests run."""

    def __init__(self, processes: dict[str, psutil.Process]) -> None:
        self._processes = processes
        self._ended = threading.Event()
        self.seen: dict[str, list[int]] = {name: [] for name in processes}

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._run, name="watch")
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            for name, process in self._processes.items():
                self.seen[name].append(process.memory_info().rss)
            if self._ended.wait(SAMPLE_SECONDS):
                return

    def median(self, name: str) -> float:
        """Bytes of a process."""
        return statistics.median(self.seen[name])


def main() -> int:
    """Runs it; 1 if a target was missed."""
    given = _arguments()
    family = FAMILIES[FAMILY]
    fields = {**family.fields, "num_inference_steps": 1, "width": 32, "height": 32}
    rows: list[Row] = []
    with short_folder() as place:
        (place / "soak.yaml").write_text(LAYOUT.format(retention=given.retention))
        words = ("--layout", "soak.yaml", "--device", "cpu")
        server = Command(place, "serve", str(folder(FAMILY)), *words)
        try:
            url = urlsplit(server.line().removeprefix("ready: "))
            assert url.hostname is not None and url.port is not None, server.said
            load = Load((url.hostname, url.port), fields, CLIENTS, given.seed)
            rows = soak(server, load, given.requests)
            server.signal()
            code = server.end()
            rows.append(Row("exit code after SIGTERM", str(code), "= 0", code == 0))
        finally:
            server.close()
    return report("soak", rows, save=given.save)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000, help="in four quarters (20000)")
    parser.add_argument("--retention", type=float, default=20.0, help="seconds that an ended job is kept (20)")
    parser.add_argument("--seed", type=int, default=0, help="of what the clients do (0)")
    parser.add_argument("--save", action="store_true", help="keep the table in benchmarks/results")
    return parser.parse_args()


def soak(server: Command, load: Load, requests: int) -> list[Row]:
    """All the requests, and what the processes hold on the way."""
    account = Account(load)
    load.run(max(CLIENTS, int(WARM_UP * requests)))
    processes = _processes(server, account)
    seconds = 0.0
    memory: list[Watch] = []
    at_rest: dict[str, Holding] = {}
    for number in range(QUARTERS):
        began = time.monotonic()
        with Watch(processes) as watch:
            load.run(requests // QUARTERS)
        seconds += time.monotonic() - began
        memory.append(watch)
        shown = ", ".join(f"{name} {watch.median(name) / MIB:.1f}" for name in processes)
        _tell(f"quarter {number + 1}: {seconds:.0f} s, MiB: {shown}")
        if number == 1:
            at_rest = account.rest(processes)
    after = account.rest(processes, at_rest)
    said = account.ask()
    for text in load.wrong[:20]:
        _tell(f"NO   {text}")
    did = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in load.asked.most_common())
    return [
        Row("requests", f"{sum(load.asked.values())} ({did})"),
        Row("requests per second", f"{requests / seconds:.1f}"),
        Row("not answered or ended as it should", str(len(load.wrong)), "= 0", not load.wrong),
        *account.rows(said),
        *(_memory_row(name, memory) for name in processes),
        *(_rest_row(name, at_rest[name], after[name]) for name in processes),
    ]


def _memory_row(name: str, memory: list[Watch]) -> Row:
    second, last = memory[1].median(name), memory[-1].median(name)
    what = f"{name}: memory, last quarter / second ({second / MIB:.1f} MiB)"
    return Row.at_most(what, last / second, GROWTH_LIMIT)


def _rest_row(name: str, before: Holding, after: Holding) -> Row:
    figure = f"{after.files}, {after.threads}"
    what = f"{name}: descriptors, threads at rest after the last quarter"
    return Row(what, figure, f"= {before.files}, {before.threads}, as after the second", before == after)


class Account:
    """What the server itself says of all that it was asked for."""

    def __init__(self, load: Load) -> None:
        self._load = load

    def ask(self) -> dict[str, Any]:
        """Asks for it."""
        return self._load.ask("/v1/cluster")

    def is_idle(self) -> bool:
        """Whether nothing runs, waits or is kept."""
        said = self.ask()
        held = sum(worker["tasks"] + worker["kept"] for worker in said["workers"])
        return not held and not any(stage["running"] + stage["waiting"] for stage in said["stages"])

    def rest(
        self, processes: dict[str, psutil.Process], wanted: dict[str, Holding] | None = None
    ) -> dict[str, Holding]:
        """The least that the processes hold while nothing is under way, within a while; with `wanted`, no longer than
        until that is reached."""
        least: dict[str, Holding] = {}
        began = time.monotonic()
        while time.monotonic() - began < (REST_SECONDS if wanted is None else 2 * REST_SECONDS):
            if self.is_idle():
                found = {name: Holding.of(process) for name, process in processes.items()}
                least = {name: one.least(least.get(name, one)) for name, one in found.items()}
                if least == wanted:
                    break
            time.sleep(1.0)
        return least

    def rows(self, said: dict[str, Any]) -> list[Row]:
        """What was accepted, against what it ended as."""
        totals = said["totals"]
        ended = {state: totals[state] for state in ("done", "failed", "cancelled")}
        lost = totals["submitted"] - sum(ended.values())
        died = totals["workers_lost"]
        return [
            Row("jobs accepted", f"{totals['submitted']} ({', '.join(f'{n} {state}' for state, n in ended.items())})"),
            Row("jobs lost", str(lost), "= 0", lost == 0),
            Row("workers lost, damaged payloads", f"{died}, {totals['digest_failures']}", "= 0, 0",
                not died and not totals["digest_failures"]),
        ]  # fmt: skip


def _processes(server: Command, account: Account) -> dict[str, psutil.Process]:
    """The server's process and its workers', by name."""
    workers = {worker["name"]: psutil.Process(worker["pid"]) for worker in account.ask()["workers"]}
    return {"server": psutil.Process(server.process.pid), **workers}


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tests.chaos`: the fault matrix, a storm, and jobs after it; prints a table and exits 1 on a miss."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from benchmarks import Row, report
from tests.chaos.cluster import Cluster, Wanted
from tests.chaos.leaks import MIB, Holding, Leaks, holdings
from tests.chaos.matrix import CELLS, Cell, run_cell
from tests.chaos.storm import Outcome, Weather, run_jobs

PROMPTS = ("a red apple on the left, blue background", "a yellow star, green background", "a cat and a dog")
SEEDS = 4
INNOCENT = {"deaths_alone": 1000, "own_errors": 100, "damages": 100, "losses": 1000}
"""In a storm a job can be hit again and again by no fault of its own, which these limits are not made for."""


def main() -> int:
    """Runs what was asked for."""
    given = _arguments()
    rows: list[Row] = []
    if given.only != "storm":
        rows += matrix([cell for cell in CELLS if all(word in str(cell) for word in given.cells)])
    if given.only != "matrix":
        rows += storm(given.jobs, given.more, given.seed)
    return report("chaos", rows, save=given.save)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--jobs", type=int, default=300, help="under random faults, exact (300)")
    parser.add_argument("--more", type=int, default=100, help="after it, in default mode (100)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (0)")
    parser.add_argument("--only", choices=("matrix", "storm"), help="one half of it")
    parser.add_argument(
        "--cells", nargs="*", default=(), metavar="WORD", help="of the matrix those with all these words"
    )
    parser.add_argument("--save", action="store_true", help="keep the table in benchmarks/results")
    return parser.parse_args()


def matrix(cells: Sequence[Cell]) -> list[Row]:
    """Every cell, on one cluster with the default limits of what a job may suffer."""
    missed: list[str] = []
    retries = resumes = damaged = jobs = 0
    with Cluster() as cluster:
        before, reference = _undisturbed(cluster)
        for cell in cells:
            try:
                seen = run_cell(cluster, cell, reference)
            except (AssertionError, TimeoutError) as error:
                missed.append(str(cell))
                _tell(f"NO   {cell}: {error}")
                cluster.heal()
                continue
            _tell(f"yes  {cell}: {seen.retries} retries, {seen.resumes} resumes, {seen.seconds:.1f} s")
            jobs, retries, resumes = jobs + seen.jobs, retries + seen.retries, resumes + seen.resumes
            damaged += seen.damaged
        leaks = Leaks.of(cluster, before)
    return [
        Row("matrix: cells met", f"{len(cells) - len(missed)}", f"= {len(cells)}", not missed),
        Row("matrix: jobs, retries, resumes, damage noticed", f"{jobs}, {retries}, {resumes}, {damaged}"),
        *_leaks("matrix", leaks),
        _left("matrix", cluster),
    ]


def storm(jobs: int, more: int, seed: int) -> list[Row]:
    """Random faults every second while jobs run exactly; then jobs in default mode, undisturbed."""
    with Cluster(INNOCENT, routes=("memfd", "tcp")) as cluster:
        before, reference = _undisturbed(cluster)
        known = list(reference)
        weather = Weather(cluster, seed)
        outcome = run_jobs(cluster, [known[number % len(known)] for number in range(jobs)], reference)
        weather.stop()
        _tell(f"storm over after {outcome.seconds:.0f} s; the coordinator was restarted {cluster.restarts} times")
        leaks = Leaks.of(cluster, before)
        plain = [replace(known[number % len(known)], exact=False) for number in range(more)]
        after = run_jobs(cluster, plain, {replace(one, exact=False): digest for one, digest in reference.items()})
        leaks_after = Leaks.of(cluster, before)
    faults = ", ".join(f"{count} {fault}" for fault, count in sorted(weather.faults.items()))
    return [
        Row("storm: jobs, seconds", f"{outcome.jobs}, {outcome.seconds:.0f}"),
        Row("storm: faults", f"{weather.faults.total()} ({faults})"),
        Row(
            "storm: coordinator restarts, retries, resumes", f"{cluster.restarts}, {outcome.retries}, {outcome.resumes}"
        ),
        *_jobs("storm", outcome),
        *_leaks("storm", leaks),
        _none(f"then {after.jobs} jobs in default mode: lost", len(after.lost)),
        Row("then: largest error of a pixel in 0…1", f"{after.error:g}", "≤ 1e-05", after.error <= 1e-5),
        *_leaks("then", leaks_after),
        _left("storm", cluster),
    ]


def _undisturbed(cluster: Cluster) -> tuple[dict[str, Holding], dict[Wanted, bytes]]:
    """What the pictures are when nothing goes wrong, and what processes hold that have worked."""
    began = time.monotonic()
    cluster.whole()
    wanted = [Wanted(prompt, seed) for seed in range(SEEDS) for prompt in PROMPTS]
    jobs = [cluster.submit(one) for one in wanted * 2]
    pictures = [cluster.result(job) for job in jobs]
    assert pictures[: len(wanted)] == pictures[len(wanted) :], "a request gave two pictures without any fault"
    cluster.whole()
    _tell(f"undisturbed: {len(jobs)} jobs, {time.monotonic() - began:.0f} s with the start of the cluster")
    return holdings(cluster), dict(zip(wanted, pictures, strict=False))


def _jobs(when: str, outcome: Outcome) -> list[Row]:
    return [
        _none(f"{when}: jobs lost", len(outcome.lost), "; ".join(outcome.lost)),
        _none(f"{when}: results not bit-equal to the undisturbed run", len(outcome.different)),
    ]


def _leaks(when: str, leaks: Leaks) -> list[Row]:
    return [
        _none(f"{when}: slots leaked", leaks.slots + leaks.credits),
        _none(f"{when}: buffers leaked", leaks.buffers),
        _none(f"{when}: file descriptors leaked", leaks.files, leaks.who),
        _none(f"{when}: MiB leaked", -(-leaks.bytes // MIB), leaks.who),
    ]


def _left(when: str, cluster: Cluster) -> Row:
    what = "processes, sockets, temporary files, shared memory left behind"
    return _none(f"{when}: {what}", len(cluster.left), ", ".join(cluster.left))


def _none(what: str, count: int, more: str = "") -> Row:
    if count and more:
        _tell(f"NO   {what}: {more}")
    return Row(what, str(count), "= 0", count == 0)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

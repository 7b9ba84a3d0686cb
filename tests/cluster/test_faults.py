"""What dies, stops or lies costs no job and changes no picture: a few cells of the fault matrix (`make chaos` runs all
of it, and a storm), and a job that kills its workers. Real processes, sockets and signals."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.chaos.cluster import Cluster, Wanted
from tests.chaos.matrix import CELLS, Cell, run_cell
from tests.chaos.remote import Puppet

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs two addresses on the loopback device")

QUICK = (
    Cell("encode", "computing", "SIGKILL"),
    Cell("denoise", "computing", "partition"),
    Cell("decode", "computing", "SIGKILL"),
    Cell("denoise", "sending", "corrupted byte"),
    Cell("decode", "computing", "exception"),
    Cell("denoise", "computing", "SIGKILL"),
    Cell("coordinator", "computing", "SIGKILL"),
)
APPLE = "a red apple on the left, blue background"
Undisturbed = tuple[Cluster, dict[Wanted, bytes]]


@pytest.fixture(scope="module")
def undisturbed() -> Iterator[Undisturbed]:
    """A cluster, and what two requests give when nothing goes wrong."""
    with Cluster() as cluster:
        cluster.whole()
        wanted = [Wanted(APPLE, seed) for seed in (1, 2)]
        jobs = [cluster.submit(one) for one in wanted]
        yield cluster, {one: cluster.result(job) for one, job in zip(wanted, jobs, strict=True)}
    assert not cluster.left


@pytest.mark.parametrize("cell", QUICK, ids=str)
def test_a_fault_costs_no_job_and_changes_no_picture(undisturbed: Undisturbed, cell: Cell) -> None:
    cluster, reference = undisturbed
    assert cell in CELLS
    evidence = run_cell(cluster, cell, reference)
    assert evidence.jobs == 2


def test_a_job_that_kills_its_workers_is_put_away_and_the_others_go_on(undisturbed: Undisturbed) -> None:
    cluster, reference = undisturbed
    innocent = next(iter(reference))
    cluster.whole()
    cluster.panel.forget()
    armed: list[Puppet] = []
    killed: list[Puppet] = []

    def victim() -> Puppet | None:
        for puppet in cluster.of("encode"):
            if puppet not in armed:
                puppet.arm("computing", "wait")
                armed.append(puppet)
        return cluster.panel.at("computing", [puppet for puppet in armed if puppet not in killed])

    victim()
    poison = cluster.submit(Wanted("a poisonous mushroom", 3))
    for _ in range(3):  # the first time it is nobody's fault; twice it is alone
        killed.append(cluster.panel.wait(victim, "the job to be at another worker"))
        killed[-1].kill()
    found = cluster.ended(poison)
    assert found["state"] == "failed" and found["error"]["code"] == "quarantined"
    for puppet in cluster.of("encode"):
        puppet.disarm()
        puppet.go()
    assert cluster.result(cluster.submit(innocent)) == reference[innocent]

"""What is counted of jobs on their way."""

from __future__ import annotations

import logging

import pytest

from tests.cluster.toy import STAGES, ToyCluster
from triptych.cluster.measures import BOUNDS, MAX_ABSENT, Counters, Measures, Spread
from triptych.cluster.observers import Observer
from triptych.messages import PROTOCOL, Hello


def measures(cluster: ToyCluster) -> Measures:
    return cluster.coordinator.status().measures


def count(spread: Spread) -> int:
    return sum(spread.counts)


def one_job(cluster: ToyCluster, job: str = "a", rows: int = 1) -> None:
    cluster.submit(job, rows=rows)
    (worker,) = cluster.workers
    for seconds in (1.0, 4.0, 2.0):
        cluster.clock.now += seconds
        worker.step(job, 1, seconds=0.5)
        worker.step(job, 2, seconds=0.75)
        worker.done(job, fetched_by="tcp", fetched_bytes=100, fetched_seconds=0.25)


def test_waits_steps_tasks_transfers_and_jobs_are_measured() -> None:
    cluster = ToyCluster()
    cluster.clock.now += 5.0
    cluster.submit("early")
    cluster.coordinator.cancel("early")
    cluster.worker()
    one_job(cluster, rows=3)
    found = measures(cluster)
    assert [round(found.tasks[stage].seconds, 6) for stage in STAGES] == [1.0, 4.0, 2.0]
    assert [count(found.units[stage]) for stage in STAGES] == [2, 2, 2]
    assert found.units["denoise"].seconds == pytest.approx(0.75), "0.5 s, then 0.25 s more"
    assert found.rows == 2 * 3, "two denoising steps of three pictures"
    assert found.transfers["tcp"].bytes == 300 and found.transfers["tcp"].spread.seconds == pytest.approx(0.75)
    assert [count(found.jobs[state]) for state in ("done", "failed", "cancelled")] == [1, 0, 1]
    assert found.jobs["done"].seconds == pytest.approx(7.0)


def test_a_wait_is_counted_when_it_ends() -> None:
    cluster = ToyCluster()
    cluster.submit("a")
    assert count(measures(cluster).waits["encode"]) == 0
    cluster.clock.now += 0.3
    cluster.worker()
    wait = measures(cluster).waits["encode"]
    assert count(wait) == 1 and wait.seconds == pytest.approx(0.3)
    assert wait.counts[BOUNDS.index(0.5)] == 1, "above 0.25 s, at most 0.5 s"


def test_what_takes_longer_than_the_last_bound_is_counted_too() -> None:
    cluster = ToyCluster()
    cluster.worker()
    cluster.submit("a")
    cluster.clock.now += 10_000.0
    cluster.workers[0].done("a")
    assert measures(cluster).tasks["encode"].counts[-1] == 1


def test_a_lost_worker_is_named_until_it_is_back() -> None:
    cluster = ToyCluster()
    cluster.worker("encode", slot="one")
    other = cluster.worker("denoise", "decode")
    other.die()
    assert measures(cluster).absent == {"w1": ("denoise", "decode")}
    other.alive = True
    other.join()
    assert measures(cluster).absent == {}
    cluster.workers[0].leave()
    assert measures(cluster).absent == {}, "it left of its own will"


def test_names_of_lost_workers_are_bounded() -> None:
    counters = Counters(STAGES)
    for number in range(3 * MAX_ABSENT):
        hello = Hello(
            protocol=PROTOCOL, name=f"w{number}", incarnation=str(number), stages=("encode",), model_digest="",
            versions={}, device="cpu", pid=1, host="h",
        )  # fmt: skip
        counters.went(hello, "gone", "", 0.0)
    assert list(counters.measures().absent) == [f"w{number}" for number in range(2 * MAX_ABSENT, 3 * MAX_ABSENT)]


def test_an_observer_that_fails_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Observer):
        def unit(self, *_: object, **__: object) -> None:
            raise ValueError("of its own")

        ended = came = unit

    cluster = ToyCluster(observers=[Failing()])
    cluster.worker()
    with caplog.at_level(logging.ERROR):
        one_job(cluster)
    assert cluster.outcome("a").state == "done" and count(measures(cluster).jobs["done"]) == 1
    assert "an observer failed" in caplog.text

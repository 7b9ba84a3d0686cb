"""A flush: who is asked, who answers, who is named because they did not."""

from __future__ import annotations

import threading

import pytest

from tests.cluster.toy import ToyCluster, ToyWorker
from triptych.cluster import FlushReport, WorkerFlush
from triptych.errors import QueueFull
from triptych.messages import Flush, Flushed, Goodbye
from triptych.request import StageName

PATIENCE = 30.0


class Flusher:
    """A flush that waits on a thread of its own."""

    def __init__(self, cluster: ToyCluster, timeout: float = PATIENCE) -> None:
        self.cluster, self.timeout = cluster, timeout
        self.reports: list[FlushReport] = []
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        self.reports.append(self.cluster.coordinator.flush(self.timeout))

    def report(self) -> FlushReport:
        self.thread.join(PATIENCE)
        return self.reports[0]


def number_of(worker: ToyWorker, count: int = 1) -> int:
    """The number of the `count`-th flush that a worker is told, once it is."""
    end = threading.Event()
    for _ in range(3000):
        told = [message for message in worker.told_of if isinstance(message, Flush)]
        if len(told) >= count:
            return told[count - 1].number
        end.wait(0.01)
    raise AssertionError("it is not told to flush")


def answer(worker: ToyWorker, freed: int, count: int = 1) -> None:
    stages: dict[StageName, dict[str, int]] = {stage: {"prompts": freed} for stage in worker.stages}
    worker.say(Flushed(number=number_of(worker, count), stages=stages, process={"transfer": 1}))


def test_everybody_is_asked_and_the_answers_are_gathered() -> None:
    cluster = ToyCluster()
    first, second = cluster.worker("encode", "denoise"), cluster.worker("decode")
    loading = cluster.worker("decode", join=False).join(ready=False)
    flush = Flusher(cluster)
    answer(second, 5)
    answer(first, 100)
    report = flush.report()
    assert report == FlushReport(
        workers=(
            WorkerFlush(worker="w1", stages={"decode": {"prompts": 5}}, process={"transfer": 1}, failed={}),
            WorkerFlush(
                worker="w0",
                stages={"encode": {"prompts": 100}, "denoise": {"prompts": 100}},
                process={"transfer": 1},
                failed={},
            ),
        )
    )
    assert report.freed_bytes == 207
    assert not any(isinstance(message, Flush) for message in loading.told_of)


def test_who_does_not_answer_in_time_is_named_and_its_late_answer_is_nothing() -> None:
    cluster = ToyCluster()
    quick, slow = cluster.worker(), cluster.worker()
    flush = Flusher(cluster, 0.2)
    answer(quick, 1)
    assert [one.worker for one in flush.report().workers] == ["w0"]
    assert flush.report().unanswered == ("w1",)
    answer(slow, 1000)
    again = Flusher(cluster)
    answer(quick, 0, count=2)
    slow.say(Flushed(number=number_of(slow, 1), stages={}))
    assert again.thread.is_alive(), "an answer to the first flush is none to the second"
    answer(slow, 7, count=2)
    assert again.report().unanswered == () and again.report().freed_bytes == 7 * 3 + 2


def test_nobody_waits_for_who_has_left() -> None:
    cluster = ToyCluster()
    stays, leaves, dies = cluster.worker(), cluster.worker(), cluster.worker()
    flush = Flusher(cluster)
    for worker in (leaves, dies):
        number_of(worker)
    leaves.say(Goodbye(reason="enough"))
    answer(stays, 1)
    assert flush.thread.is_alive()
    dies.die()
    assert flush.report().unanswered == ("w1", "w2")


def test_one_at_a_time_and_closing_ends_it() -> None:
    cluster = ToyCluster()
    worker = cluster.worker()
    flush = Flusher(cluster)
    number_of(worker)
    with pytest.raises(QueueFull, match="under way"):
        cluster.coordinator.flush(1.0)
    cluster.coordinator.close()
    assert flush.report().unanswered == ("w0",)


def test_without_workers_there_is_nothing_to_wait_for() -> None:
    assert ToyCluster().coordinator.flush(PATIENCE) == FlushReport()

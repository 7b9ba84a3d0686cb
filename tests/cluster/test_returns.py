"""Workers that go and come back: what they dropped is handed out again, what they keep stays, and others are told when
they are gone for good."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cluster.toy import STAGES, ToyCluster, ToyWorker
from triptych.cluster import Coordinator
from triptych.errors import NotEnoughMemory, WrongPayload
from triptych.messages import Draining, PeerGone


def told_gone(worker: ToyWorker) -> list[str]:
    return [message.owner for message in worker.told_of if isinstance(message, PeerGone)]


def test_a_task_that_was_spoken_of_and_then_dropped_is_handed_out_again() -> None:
    cluster = ToyCluster()
    encode, denoise, _ = (cluster.worker(stage) for stage in STAGES)
    cluster.submit("a")
    encode.done("a")
    denoise.cut = True
    denoise.checkpoint("a", 2)  # heard by the next coordinator, before the worker drops what it was at
    denoise.held.clear()
    cluster.restart()
    assert denoise.attempt("a") == 2 and cluster.keeper.kept["a"] == {"checkpoint"}
    cluster.pass_time(6.0)
    cluster.finish()
    assert cluster.outcome("a").state == "done" and cluster.leaks() == []
    record = cluster.coordinator.job("a")
    assert record is not None and not record.failures and not record.alone


def test_of_two_processes_in_one_slot_the_older_does_not_come_back() -> None:
    cluster = ToyCluster()
    older = cluster.worker("encode", slot="encode-0")
    cluster.worker("encode", slot="encode-0")
    assert older.refused is not None and not older.refused.again, "or they would oust each other for ever"


def test_what_a_worker_keeps_is_not_made_again_when_it_takes_its_own_place() -> None:
    cluster = ToyCluster()
    encode = cluster.worker("encode")
    cluster.submit("a")
    encode.done("a")
    encode.join()
    record = cluster.coordinator.job("a")
    assert record is not None and record.stage == 1 and cluster.coordinator.status().totals.remade == 0
    cluster.worker("denoise", "decode")
    cluster.finish()
    assert cluster.outcome("a").state == "done" and cluster.leaks() == []


def test_a_draining_worker_that_comes_back_still_gets_no_more() -> None:
    cluster = ToyCluster()
    worker = cluster.worker("encode", join=False).join(ready=False)
    worker.say(Draining())
    worker.ready()
    cluster.submit("a")
    assert not worker.held
    assert cluster.coordinator.status().workers[0].state == "draining"


@pytest.mark.parametrize("how", ["left", "process", "absence"])
def test_the_others_are_told_once_nothing_of_a_worker_can_come_any_more(how: str) -> None:
    gone: list[str] = []
    cluster = ToyCluster(gone=gone.append)
    worker, other = cluster.worker("encode", slot="encode-0"), cluster.worker("denoise")
    if how == "left":
        worker.leave()
    else:
        worker.cut = True
        cluster.pass_time(6.0)
        assert cluster.dismissed == [("w0", "silent")]
        assert gone == told_gone(other) == [], "it may only be cut off, and still be writing"
    if how == "process":
        cluster.coordinator.left_slot("encode-0", "killed", pid=12)
        assert gone == [], "that was another one"
        cluster.coordinator.left_slot("encode-0", "killed")
    elif how == "absence":
        cluster.pass_time(60.0)
    assert gone == told_gone(other) == [worker.owner]
    cluster.pass_time(70.0)
    assert gone == [worker.owner]


def test_a_process_that_ends_while_it_is_in_is_gone_at_once() -> None:
    gone: list[str] = []
    cluster = ToyCluster(gone=gone.append)
    worker, other = cluster.worker("encode", slot="encode-0"), cluster.worker("denoise")
    worker.die(notice=False)
    cluster.coordinator.left_slot("encode-0", "killed")
    assert gone == told_gone(other) == [worker.owner]


def test_who_comes_back_is_not_gone() -> None:
    gone: list[str] = []
    cluster = ToyCluster(gone=gone.append)
    worker, other = cluster.worker("encode"), cluster.worker("denoise")
    worker.cut = True
    cluster.pass_time(6.0)
    worker.cut = False
    worker.join()
    worker.join()  # and takes its own place
    cluster.pass_time(70.0)
    assert gone == told_gone(other) == []


@pytest.mark.parametrize("error", [NotEnoughMemory("no room"), WrongPayload("damaged"), OSError("disk")])
def test_what_the_keeper_cannot_offer_holds_no_worker_up(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = ToyCluster()
    encode, denoise = cluster.worker("encode"), cluster.worker("denoise", "decode")
    for job in ("a", "b"):
        cluster.keeper.kept[job] = {"pictures"}
    cluster.submit("a", pictures="a/pictures")
    encode.done("a")
    denoise.checkpoint("a", 2)
    offer = cluster.keeper.offer

    def fail(kept: str) -> Any:
        raise error

    monkeypatch.setattr(cluster.keeper, "offer", fail)
    cluster.submit("b", pictures="b/pictures")
    assert str(error) in cluster.outcome("b").failures[-1].message and not encode.held
    denoise.die()
    fresh = cluster.worker("denoise", "decode")
    assert fresh.held["a"].checkpoint is None, "from the beginning, rather than not at all"
    monkeypatch.setattr(cluster.keeper, "offer", offer)
    cluster.finish()
    assert cluster.outcome("a").state == "done" and cluster.leaks() == []


def test_a_coordinator_needs_nobody_to_tell() -> None:
    cluster = ToyCluster()
    cluster.coordinator = Coordinator(STAGES, store=cluster.store, keeper=cluster.keeper)
    worker, other = cluster.worker("encode"), cluster.worker("denoise")
    worker.leave()
    assert told_gone(other) == [worker.owner]

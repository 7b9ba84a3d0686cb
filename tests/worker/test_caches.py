"""What a worker lets go of when it is told to, and that it does so between units."""

from __future__ import annotations

import threading

import psutil
import torch

from tests.worker.fakes import TRANSFER, ToyStage, running, toy_opened, toy_result, toy_task
from triptych.messages import CacheUse, Flush, Flushed, Heartbeat, Release, TaskDone
from triptych.stage import Caches, Freed, Used
from triptych.stage import Flush as FlushOrder
from triptych.transfer import Exchange
from triptych.worker.caches import process_caches


class Store:
    """A cache that a test can look into."""

    def __init__(self, *sizes: int) -> None:
        self.kept = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
        self.threads: list[str] = []

    def flush(self) -> int:
        freed = sum(tensor.nbytes for tensor in self.kept)
        self.kept.clear()
        self.threads.append(threading.current_thread().name)
        return freed


def test_caches_that_come_later_take_part_and_one_that_fails_keeps_none() -> None:
    def fail() -> int:
        raise OSError("stuck")

    caches, first, later = Caches(), Store(3, 4), Store(5)
    assert caches.flush() == Freed()
    caches.register("first", first.flush)
    caches.register("broken", fail)
    assert caches.flush() == Freed({"first": 7}, {"broken": "OSError: stuck"})
    caches.register("later", later.flush)
    caches.register("broken", lambda: 1)
    assert caches.flush() == Freed({"first": 0, "broken": 1, "later": 5})
    assert not first.kept and not later.kept


def test_those_that_count_tell_how_they_have_served() -> None:
    caches = Caches()
    caches.register("uncounted", lambda: 0)
    caches.register("counted", lambda: 0, lambda: Used(3, 1))
    caches.register("broken", lambda: 0, lambda: Used(1 // 0, 0))
    assert caches.used() == {"counted": Used(3, 1)}
    caches.register("counted", lambda: 0)
    assert caches.used() == {}, "the newer one of that name does not count"


def test_a_worker_tells_how_its_caches_have_served() -> None:
    stage = ToyStage()
    stage.caches.register("store", lambda: 0, lambda: Used(5, 2))
    with running(toy_opened(stage)) as own:
        for number, job in enumerate(("a", "b", "c"), 1):
            own.coordinator.run(toy_task(job, steps=1))
            own.read(own.coordinator.wait(TaskDone, job))
            beat = own.coordinator.wait(Heartbeat, count=len(own.coordinator.all(Heartbeat)) + 2)
            assert beat.caches == (
                CacheUse(stage="denoise", cache="store", hits=5, misses=2),
                CacheUse(stage="denoise", cache="previews", hits=0, misses=0),
                CacheUse(cache="transfer", hits=number - 1, misses=1),
            )


def test_a_stage_flushes_what_was_registered_with_it() -> None:
    stage, store = ToyStage(), Store(10)
    assert stage.control(FlushOrder()) == Freed()
    stage.caches.register("store", store.flush)
    assert stage.control(FlushOrder()) == Freed({"store": 10})


def test_a_worker_answers_after_the_unit_and_on_the_thread_that_drives_the_stage() -> None:
    stage, store = ToyStage(), Store(1000)
    stage.caches.register("store", store.flush)
    began, go_on = stage.toy.hold("job")
    with running(toy_opened(stage)) as own:
        own.coordinator.run(toy_task("job", steps=3, seed=5))
        assert began.wait(60)
        own.coordinator.send(Flush(number=4))
        own.has_heard(1)
        assert store.kept and not own.coordinator.all(Flushed), "in the middle of a unit"
        go_on.set()
        flushed = own.coordinator.wait(Flushed)
        done = own.coordinator.wait(TaskDone)
        assert torch.equal(own.read(done)["latents"], toy_result(stage, 3, 5)), "the task goes on unharmed"
        heard = [message for message in own.coordinator.heard if isinstance(message, Flushed | TaskDone)]
        assert heard == [flushed, done], "it did not wait for the task's end"
    assert (flushed.number, flushed.stages, flushed.failed) == (4, {"denoise": {"store": 1000, "previews": 0}}, {})
    assert flushed.process.keys() == {"transfer", "allocator"}
    assert store.threads == ["worker"]


def test_an_idle_worker_gives_up_its_pools_and_works_on() -> None:
    with running(toy_opened()) as own:
        for number, job in enumerate(("a", "b"), 1):
            own.coordinator.run(toy_task(job, steps=2))
            done = own.coordinator.wait(TaskDone, job)
            own.read(done)
            own.coordinator.send(Flush(number=number))
            assert own.coordinator.wait(Flushed, count=2 * number - 1).process["transfer"] == 0, "it is kept for others"
            own.coordinator.send(Release(payloads=(done.descriptor.payload,)))
            own.coordinator.send(Flush(number=number))
            assert own.coordinator.wait(Flushed, count=2 * number).process["transfer"] == TRANSFER.pool_bytes
            assert own.exchange.stats().pool_bytes == 0


def test_the_allocator_gives_freed_memory_back() -> None:
    with Exchange(TRANSFER) as exchange:
        caches = process_caches(exchange, torch.device("cpu"))
        caches.flush()
        # Pieces that the heap holds in itself, below what it would map; the last one keeps its end where it is.
        pieces = [torch.ones(1 << 12) for _ in range(4000)]
        end = torch.ones(1 << 12)
        resident = psutil.Process().memory_info().rss
        pieces.clear()
        freed = caches.flush()
        assert freed.failed == {} and freed.bytes["allocator"] > 32 << 20
        assert psutil.Process().memory_info().rss < resident - (32 << 20)
        assert end.sum() == 1 << 12

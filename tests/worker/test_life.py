"""How a worker leaves, and how it begins anew when its coordinator has lost sight of it."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from tests.worker.fakes import TRANSFER, FakeCoordinator, ToyStage, running, toy_opened, toy_result, toy_task
from triptych.errors import InvalidRequest, LoadError, Unsupported
from triptych.messages import (
    Drain,
    Draining,
    Goodbye,
    Heartbeat,
    PeerGone,
    Ready,
    Refused,
    Release,
    Stepped,
    Stop,
    TaskDone,
    ticket_for,
)
from triptych.stage import LoadProgress, StageInfo
from triptych.worker import WorkerSettings


def test_stop_hands_back_after_the_unit_that_runs() -> None:
    stage = ToyStage()
    began, go = stage.toy.hold("long")
    with running(toy_opened(stage)) as own:
        own.coordinator.run(toy_task("long", steps=1000))
        assert began.wait(30)
        own.coordinator.send(Stop())
        own.has_heard(1)
        go.set()
        own.join()
    assert own.coordinator.wait(Goodbye).reason == "it was told to stop"
    assert len(own.coordinator.all(Stepped)) < 10 and not own.coordinator.all(TaskDone)


@pytest.mark.parametrize("by_signal", [False, True], ids=["told", "signal"])
def test_drain_finishes_what_it_holds_and_waits_until_nobody_needs_it(by_signal: bool) -> None:
    stage = ToyStage()
    began, go = stage.toy.hold("job")
    with running(toy_opened(stage)) as own:
        own.coordinator.run(toy_task("job"))
        assert began.wait(30)
        own.worker.drain() if by_signal else own.coordinator.send(Drain())
        own.has_heard(1)
        go.set()
        done = own.coordinator.wait(TaskDone)
        own.coordinator.wait(Draining)
        assert torch.equal(own.read(done)["latents"], toy_result(stage, 3, 0)), "it is kept while it is needed"
        assert not own.coordinator.all(Goodbye)
        own.coordinator.send(Release(payloads=(done.descriptor.payload,)))
        own.join()
    assert own.coordinator.wait(Goodbye) == Goodbye(reason="it was drained")


def test_a_drained_worker_does_not_wait_for_ever() -> None:
    with running(toy_opened(), WorkerSettings("toy", transfer=TRANSFER, drain_seconds=0.1)) as own:
        own.coordinator.run(toy_task("job"))
        own.coordinator.wait(TaskDone)
        own.coordinator.send(Drain())
        own.join()
        assert own.exchange.stats().kept == 0


def test_a_drained_worker_that_is_sent_tasks_hands_them_back() -> None:
    with running(toy_opened()) as own:
        own.coordinator.run(toy_task("job"))
        own.coordinator.wait(TaskDone)
        own.worker.drain()
        own.coordinator.wait(Draining)
        own.coordinator.run(toy_task("late"))
        own.join()
    assert own.coordinator.all(Goodbye) and not own.coordinator.all(TaskDone, "late")


class SlowToLoad(ToyStage):
    """Reads one component after the other, until somebody has enough; or fails."""

    error: Exception | None = None

    def load(self, report):  # type: ignore[no-untyped-def]
        end = time.monotonic() + 30
        while time.monotonic() < end:
            if self.error is not None:
                raise self.error
            report(LoadProgress("part", 1, 0.0, 1, 2))
            time.sleep(0.01)
        return StageInfo(0, 1)


@pytest.mark.parametrize("how", ["drain", "stop", "order"])
def test_a_worker_that_loads_can_be_stopped(how: str) -> None:
    with running(toy_opened(SlowToLoad()), ready=False) as own:
        own.coordinator.wait(Heartbeat)
        own.coordinator.send(Stop()) if how == "order" else getattr(own.worker, how)()
        own.join()
    assert own.coordinator.all(Goodbye) and not own.coordinator.all(Ready)


def test_a_model_that_cannot_be_loaded_is_told_on_both_sides() -> None:
    stage = SlowToLoad()
    stage.error = LoadError("component 'vae': no weights")
    coordinator = FakeCoordinator()
    with pytest.raises(LoadError), running(toy_opened(stage), coordinator=coordinator, ready=False) as own:
        own.join()
    assert "no weights" in coordinator.wait(Goodbye).reason and coordinator.wait(Goodbye).failed


def test_a_worker_that_was_taken_for_dead_begins_anew_with_its_weights() -> None:
    stage = ToyStage()
    began, go = stage.toy.hold("job")
    with running(toy_opened(stage)) as own:
        own.coordinator.run(toy_task("before"))
        kept = own.coordinator.wait(TaskDone).descriptor
        own.coordinator.run(toy_task("job"))
        assert began.wait(30)
        own.coordinator.send(Refused(reason="it was silent", again=True))
        own.has_heard(1)
        go.set()
        assert own.coordinator.wait(Ready, count=2).kept == (kept.payload,), "which may be needed, or not"
        own.coordinator.send(Release(payloads=(kept.payload,)))
        assert len(own.coordinator.hellos) == 2
        assert own.coordinator.hellos[0].incarnation != own.coordinator.hellos[1].incarnation
        own.coordinator.run(toy_task("job", attempt=2))
        assert own.coordinator.wait(TaskDone, "job").attempt == 2
        own.coordinator.until(lambda: own.exchange.stats().kept == 1, "the end of what was kept before")


def test_what_was_kept_before_can_be_had_after_a_new_beginning() -> None:
    with running(toy_opened()) as own:
        own.coordinator.run(toy_task("job"))
        done = own.coordinator.wait(TaskDone)
        own.coordinator.send(Refused(reason="who are you", again=True))
        own.coordinator.wait(Ready, count=2)
        own.coordinator.run(toy_task("next", payload=own.give(start=torch.ones(4))))
        own.coordinator.wait(TaskDone, "next")
        assert torch.equal(
            own.other.fetch(ticket_for(done.descriptor, own.exchange.secret)).payload.values["latents"],
            toy_result(own.stage, 3, 0),
        )


def test_a_draining_worker_that_begins_anew_says_so_before_it_is_ready() -> None:
    with running(toy_opened()) as own:
        own.coordinator.run(toy_task("job"))
        kept = own.coordinator.wait(TaskDone).descriptor.payload
        own.worker.drain()
        own.coordinator.wait(Draining)
        own.coordinator.send(Refused(reason="who are you", again=True))
        assert own.coordinator.wait(Ready, count=2).kept == (kept,)
        own.coordinator.send(Release(payloads=(kept,)))
        own.join()
    order = [type(message) for message in own.coordinator.heard if isinstance(message, Ready | Draining | Goodbye)]
    assert order == [Ready, Draining, Draining, Ready, Goodbye]


def test_a_worker_that_cannot_hear_any_more_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(toy_opened()) as own:

        def fail(_: str) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(own.exchange, "release", fail)
        own.coordinator.send(Release(payloads=("any",)))
        own.join()
        monkeypatch.undo()
    assert own.coordinator.wait(Goodbye) == Goodbye(reason="RuntimeError: a bug", failed=True)


def test_what_is_mapped_of_a_peer_that_is_gone_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[str] = []
    with running(toy_opened()) as own:
        monkeypatch.setattr(own.exchange, "peer_gone", gone.append)
        own.coordinator.send(PeerGone(owner="other"))
        own.coordinator.until(lambda: gone == ["other"], "the news")


def test_a_final_refusal_ends_it_with_the_reason() -> None:
    coordinator = FakeCoordinator()
    with pytest.raises(Unsupported, match="its key"), running(toy_opened(), coordinator=coordinator) as own:
        own.coordinator.send(Refused(reason="its key is no longer on the list"))
        own.join()


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="capacity"):
        WorkerSettings("toy", capacity=0)
    with pytest.raises(InvalidRequest, match="threads"):
        WorkerSettings("toy", threads=0)
    with (
        pytest.raises(InvalidRequest, match="cpus"),
        running(toy_opened(), replace(WorkerSettings("toy", transfer=TRANSFER), cpus=(100_000,)), ready=False) as own,
    ):
        own.join()

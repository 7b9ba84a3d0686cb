"""A worker and what it says: its life, its tasks, what goes wrong with one of them, how it leaves."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from tests.worker.fakes import (
    REFERENCES,
    TRANSFER,
    FakeCoordinator,
    ToyStage,
    running,
    toy_opened,
    toy_result,
    toy_task,
)
from triptych.errors import InvalidRequest, Unsupported, WrongPayload
from triptych.messages import (
    Cancel,
    Drain,
    Draining,
    Expect,
    Failed,
    FromWorker,
    Goodbye,
    Heartbeat,
    Loading,
    Prove,
    Proved,
    Ready,
    Refused,
    Release,
    Stepped,
    TaskDone,
    Welcome,
)
from triptych.model import topology_from_bytes
from triptych.worker import WorkerSettings


def said(coordinator: FakeCoordinator) -> list[FromWorker]:
    return [message for message in coordinator.heard if not isinstance(message, Heartbeat)]


@pytest.mark.parametrize("transfer", [TRANSFER, REFERENCES], ids=["pool", "reference"])
def test_it_says_hello_loads_works_and_says_goodbye(transfer: object) -> None:
    stage = ToyStage()
    opened = toy_opened(stage)
    with running(opened, WorkerSettings("toy", name="me", transfer=transfer)) as own:  # type: ignore[arg-type]
        own.coordinator.run(toy_task("job", steps=3, seed=5))
        done = own.coordinator.wait(TaskDone)
        assert torch.equal(own.read(done)["latents"], toy_result(stage, 3, 5))
        hello = own.coordinator.hellos[0]
    assert (hello.name, hello.stages, hello.model_digest) == ("me", ("denoise",), "toy")
    assert hello.owner == own.exchange.owner and hello.secret == own.exchange.secret
    kinds = [type(message) for message in said(own.coordinator)]
    assert kinds == [Loading, Ready, Stepped, Stepped, Stepped, TaskDone, Goodbye]
    ready = own.coordinator.wait(Ready)
    assert topology_from_bytes(ready.topology) == opened.topology
    assert (ready.capacity, ready.credits) == ({"denoise": 4}, {"denoise": 5})
    steps = own.coordinator.all(Stepped, "job")
    assert [(step.step, step.steps, step.attempt) for step in steps] == [(1, 3, 1), (2, 3, 1), (3, 3, 1)]
    assert (done.attempt, done.steps, done.fetched_by) == (1, 3, None) and done.seconds > 0


def test_an_expected_task_is_begun_while_there_is_nothing_else_to_do() -> None:
    stage = ToyStage()
    with running(toy_opened(stage)) as own:
        own.coordinator.send(Expect(task=toy_task("a", steps=3, seed=5)))
        own.coordinator.until(lambda: stage.toy.begun == ["a"], "its beginning")
        own.coordinator.run(toy_task("a", steps=3, seed=5, payload=own.give(start=torch.zeros(1, 4))))
        assert torch.equal(own.read(own.coordinator.wait(TaskDone, "a"))["latents"], toy_result(stage, 3, 5))
        assert stage.toy.begun == ["a"], "it went on from there"

        own.coordinator.send(Expect(task=toy_task("b")))
        own.coordinator.until(lambda: stage.toy.begun == ["a", "b"], "its beginning")
        own.coordinator.send(Cancel(job="b"))
        own.coordinator.run(toy_task("b"))
        own.coordinator.wait(TaskDone, "b")
        assert stage.toy.begun == ["a", "b", "b"], "what was cancelled is begun anew"

        began, go = stage.toy.hold("c")
        own.coordinator.run(toy_task("c"))
        began.wait()
        own.coordinator.send(Expect(task=toy_task("d")))
        own.has_heard(1)
        go.set()
        own.coordinator.wait(TaskDone, "c")
        own.coordinator.run(toy_task("d"))
        own.coordinator.wait(TaskDone, "d")
        assert stage.toy.begun == ["a", "b", "b", "c", "d"], "who is at work prepares nothing"


@pytest.mark.parametrize("how", ["lost", "cancelled", "welcomed again", "refused", "proved"])
def test_nothing_expected_is_left_of_what_does_not_run(how: str) -> None:
    stage = ToyStage()
    with running(toy_opened(stage)) as own:
        own.coordinator.send(Expect(task=toy_task("a")))
        own.coordinator.until(lambda: bool(stage._expected), "its beginning")
        if how == "lost":
            ticket = own.give(start=torch.zeros(1, 4))
            own.other.release(ticket.descriptor.payload)
            own.coordinator.run(toy_task("a", payload=ticket))
            assert own.coordinator.wait(Failed, "a").lost == "payload"
        elif how == "cancelled":
            own.coordinator.send(Cancel(job="a"))
        elif how == "welcomed again":
            own.coordinator.send(Welcome(coordinator="second", heartbeat_seconds=0.05, lease_seconds=5.0))
        elif how == "refused":
            own.coordinator.send(Refused(reason="forgotten", again=True))
        else:
            own.coordinator.send(Prove())
        own.coordinator.until(lambda: not stage._expected, "its end")


def test_a_stage_that_cannot_prepare_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = ToyStage()

    def fail(task: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(stage, "expect", fail)
    with running(toy_opened(stage)) as own:
        own.coordinator.send(Expect(task=toy_task("a")))
        own.coordinator.run(toy_task("a", steps=3, seed=5))
        assert torch.equal(own.read(own.coordinator.wait(TaskDone, "a"))["latents"], toy_result(stage, 3, 5))


def test_a_refusal_is_told_with_its_reason() -> None:
    coordinator = FakeCoordinator(lambda _: Refused(reason="it holds another model"))
    with (
        pytest.raises(Unsupported, match="this worker cannot join: it holds another model"),
        running(toy_opened(), coordinator=coordinator, ready=False) as own,
    ):
        own.join()
    assert own.coordinator.gone == ["its thread has ended"]


def test_heartbeats_tell_what_it_is_at() -> None:
    stage = ToyStage()
    began, go = stage.toy.hold("slow")
    with running(toy_opened(stage)) as own:
        own.coordinator.run(toy_task("slow"))
        assert began.wait(30)
        seen = len(own.coordinator.all(Heartbeat))
        busy = own.coordinator.wait(Heartbeat, count=seen + 2).busy
        go.set()
        own.coordinator.wait(TaskDone)
        seen = len(own.coordinator.all(Heartbeat))
        idle = own.coordinator.wait(Heartbeat, count=seen + 2)
    assert busy is not None and (busy.job, busy.stage) == ("slow", "denoise") and busy.seconds > 0
    assert idle.busy is None and idle.memory_bytes > 1 << 20 and idle.free_bytes > 1 << 20
    assert idle.kept == 1 and idle.kept_bytes > 0


def test_heartbeats_tell_that_something_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    with running(toy_opened()) as own:
        ticket = own.give(start=torch.ones(4))
        for name in ("fetch", "publish"):
            wrapped = getattr(own.exchange, name)
            monkeypatch.setattr(
                own.exchange, name, lambda *given, wrapped=wrapped, **more: go.wait(30) and wrapped(*given, **more)
            )
        own.coordinator.run(toy_task("job", payload=ticket))
        own.coordinator.until(lambda: latest(own.coordinator).moving, "the fetch")
        assert latest(own.coordinator).busy is None
        go.set()
        own.coordinator.wait(TaskDone)
        own.coordinator.until(lambda: not latest(own.coordinator).moving, "the end of it")


def latest(coordinator: FakeCoordinator) -> Heartbeat:
    return coordinator.wait(Heartbeat, count=max(1, len(coordinator.all(Heartbeat))))


def test_inputs_come_from_where_they_are_kept() -> None:
    stage = ToyStage()
    with running(toy_opened(stage)) as own:
        own.coordinator.run(toy_task("job", payload=own.give(start=torch.ones(1000))))
        done = own.coordinator.wait(TaskDone)
        assert done.fetched_by == "memfd" and done.fetched_bytes >= 4000 and done.fetched_seconds > 0
        assert own.other.stats().kept == 1, "what it fetched is the giver's to let go"


def test_what_is_lost_is_told_apart_from_what_is_wrong() -> None:
    with running(toy_opened()) as own:
        lost = own.give(start=torch.ones(4))
        own.other.release(lost.descriptor.payload)
        own.coordinator.run(toy_task("lost", payload=lost))
        own.coordinator.run(toy_task("strange", payload=own.give(other=torch.ones(4))))
        own.coordinator.run(toy_task("unreadable", pictures=own.give(image=torch.zeros(9, dtype=torch.uint8))))
        failures = {job: own.coordinator.wait(Failed, job) for job in ("lost", "strange", "unreadable")}
    assert (failures["lost"].lost, failures["lost"].code, failures["lost"].damaged) == (
        "payload",
        "payload_lost",
        False,
    )
    assert (failures["strange"].lost, failures["strange"].code) == (None, "wrong_payload")
    assert (failures["unreadable"].code, failures["unreadable"].field) == ("invalid_media", "image")


def test_a_damaged_input_is_told_as_lost_and_damaged() -> None:
    # No other route damages: a reference is the thing itself.
    transfer = replace(TRANSFER, corrupt_every=1)
    with running(toy_opened(), WorkerSettings("toy", transfer=transfer)) as own:
        own.coordinator.run(toy_task("job", payload=own.give(start=torch.ones(64))))
        failed = own.coordinator.wait(Failed)
    assert (failed.lost, failed.damaged, failed.code) == ("payload", True, "payload_damaged")


@pytest.mark.parametrize("where", ["header", "resume"])
def test_a_checkpoint_that_does_not_fit_is_lost_and_costs_nothing_else(where: str) -> None:
    stage = ToyStage()
    error = WrongPayload("of another version", field="checkpoint.step")

    def refuse(_: object) -> None:
        raise error

    if where == "header":
        stage.expects_checkpoint = refuse  # type: ignore[method-assign]
    else:
        stage.toy.raises["job"] = error
    with running(toy_opened(stage)) as own:
        own.coordinator.run(toy_task("job", checkpoint=own.give(start=torch.ones(4))))
        failed = own.coordinator.wait(Failed)
    assert (failed.lost, failed.damaged, failed.code) == ("checkpoint", False, "wrong_payload")


def test_the_next_input_comes_while_this_task_computes() -> None:
    stage = ToyStage(capacity=1)
    began, go = stage.toy.hold("slow")
    with running(toy_opened(stage)) as own:
        own.coordinator.run(toy_task("slow"))
        assert began.wait(30)
        own.coordinator.run(toy_task("next", payload=own.give(start=torch.ones(100))))
        own.coordinator.until(lambda: own.exchange.stats().received.get("memfd", 0) == 1, "the input")
        assert not own.coordinator.all(TaskDone)
        go.set()
        own.coordinator.wait(TaskDone, "next")


def test_cancel_takes_effect_before_the_next_step_and_frees_everything() -> None:
    stage = ToyStage(capacity=1)
    began, go = stage.toy.hold("running")
    with running(toy_opened(stage)) as own:
        own.coordinator.run(toy_task("running", steps=1000))
        assert began.wait(30)
        own.coordinator.run(toy_task("waiting", payload=own.give(start=torch.ones(4))))
        own.coordinator.send(Cancel(job="waiting"))
        own.coordinator.send(Cancel(job="running"))
        own.coordinator.send(Cancel(job="unknown"))
        own.has_heard(4)
        go.set()
        own.coordinator.run(toy_task("after"))
        own.coordinator.wait(TaskDone, "after")
        assert len(own.coordinator.all(Stepped, "running")) <= 2
        assert not own.coordinator.all(TaskDone, "waiting")
        assert not own.coordinator.all(Failed)
        assert own.exchange.stats().open == 0
        assert own.exchange.stats().kept == 1, "the result of `after`"


@pytest.mark.parametrize(
    ("error", "code", "original"),
    [
        (ValueError("no"), "stage_failed", "ValueError"),
        (torch.OutOfMemoryError("full"), "not_enough_memory", "NotEnoughMemory"),
        (MemoryError(), "not_enough_memory", "NotEnoughMemory"),
        (InvalidRequest.of("prompt", 1, "text"), "invalid_request", "InvalidRequest"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_goes_wrong_with_one_task_is_its_own(error: Exception, code: str, original: str) -> None:
    stage = ToyStage()
    stage.toy.raises["bad"] = error
    with running(toy_opened(stage)) as own:
        for seed, job in enumerate(("first", "bad", "last")):
            own.coordinator.run(toy_task(job, steps=4, seed=seed))
        failed = own.coordinator.wait(Failed)
        for seed, job in ((0, "first"), (2, "last")):
            assert torch.equal(own.read(own.coordinator.wait(TaskDone, job))["latents"], toy_result(stage, 4, seed))
        own.coordinator.send(Prove())
        assert own.coordinator.wait(Proved).healthy
    assert (failed.job, failed.code, failed.original) == ("bad", code, original)
    assert "Traceback" not in failed.message


def test_a_stage_that_fails_as_a_whole_fails_what_it_runs_and_goes_on() -> None:
    stage = ToyStage()
    began, go = stage.toy.hold("first")
    step = stage.step
    with running(toy_opened(stage)) as own:
        own.coordinator.run(toy_task("first"))
        assert began.wait(30)

        def broken() -> list[object]:
            raise RuntimeError("the device went away")

        stage.step = broken  # type: ignore[method-assign]
        go.set()
        assert own.coordinator.wait(Failed, "first").original == "RuntimeError"
        stage.step = step  # type: ignore[method-assign]
        own.coordinator.run(toy_task("second"))
        own.coordinator.wait(TaskDone, "second")


def test_it_proves_itself_when_nothing_runs_and_notices_changed_weights() -> None:
    stage = ToyStage()
    began, go = stage.toy.hold("slow")
    with running(toy_opened(stage)) as own:
        own.coordinator.run(toy_task("slow"))
        assert began.wait(30)
        own.coordinator.send(Prove())
        go.set()
        assert own.coordinator.wait(Proved).healthy
        order = [type(message) for message in said(own.coordinator)]
        assert order.index(TaskDone) < order.index(Proved)
        stage.toy.network.linear.weight.data[0, 0] += 1
        own.coordinator.send(Prove())
        second = own.coordinator.wait(Proved, count=2)
    assert not second.healthy and "weights" in second.reason


def test_more_tasks_than_it_asked_for_are_refused() -> None:
    stage = ToyStage(capacity=1)
    began, go = stage.toy.hold("job0")
    with running(toy_opened(stage)) as own:
        for index in range(5):
            own.coordinator.run(toy_task(f"job{index}"))
        assert began.wait(30)
        go.set()
        assert "more than 4 tasks" in own.coordinator.wait(Failed, "job4").message
        own.coordinator.until(lambda: len(own.coordinator.all(TaskDone)) == 4, "the others")


def test_a_newer_attempt_takes_the_place_of_an_older_one() -> None:
    stage = ToyStage()
    began, go = stage.toy.hold("job")
    with running(toy_opened(stage)) as own:
        own.coordinator.run(toy_task("job", attempt=1))
        assert began.wait(30)
        own.coordinator.run(toy_task("job", attempt=2))
        own.has_heard(1)
        go.set()
        assert own.coordinator.wait(TaskDone).attempt == 2


def test_released_payloads_make_room() -> None:
    with running(toy_opened()) as own:
        own.coordinator.run(toy_task("job"))
        done = own.coordinator.wait(TaskDone)
        assert own.exchange.stats().kept == 1
        own.coordinator.send(Release(payloads=(done.descriptor.payload, "unknown")))
        own.coordinator.until(lambda: own.exchange.stats().kept == 0, "the room")


def test_a_task_says_what_is_released_even_to_a_worker_that_gives_it_back() -> None:
    with running(toy_opened()) as own:
        names: list[str] = []
        for job in ("a", "b"):
            own.coordinator.run(toy_task(job), *names)
            names = [own.coordinator.wait(TaskDone, job).descriptor.payload]
            own.coordinator.until(lambda: own.exchange.stats().kept == 1, "the room")
        own.coordinator.send(Drain())
        own.coordinator.wait(Draining)
        own.coordinator.run(toy_task("c"), *names)
        own.coordinator.until(lambda: own.exchange.stats().kept == 0, "the room")

"""What the scheduler decides: who is next, where, and what nobody needs any more."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest

from tests.cluster.toy import STAGES, ToyCluster
from triptych.cluster import Limits, Observer
from triptych.cluster.jobs import StageSpec
from triptych.errors import InvalidRequest, NoWorker, QueueFull
from triptych.messages import Cancel, Checkpointed, Ready, Release, Run, SetPreview, TaskDone


def test_a_job_goes_through_its_stages_and_nothing_is_kept() -> None:
    cluster = ToyCluster()
    encode, denoise, decode = (cluster.worker(stage) for stage in STAGES)
    cluster.submit("a")
    assert encode.attempt("a") == 1
    encode.done("a")
    assert denoise.held["a"].payload is not None
    denoise.done("a")
    decode.done("a")
    outcome = cluster.outcome("a")
    assert outcome.state == "done" and outcome.result is not None and outcome.result.name == "a/result"
    assert cluster.leaks() == []
    record = cluster.coordinator.job("a")
    assert record is not None and [stage.stage for stage in record.finished] == list(STAGES)


def test_an_idle_worker_is_told_what_will_come_to_it() -> None:
    cluster = ToyCluster()
    encode, denoise, decode = (cluster.worker(stage) for stage in STAGES)
    cluster.submit("a")
    foretold = denoise.expected["a"]
    assert foretold.stage == "denoise" and foretold.payload is None
    encode.done("a")
    assert not denoise.expected
    given = msgspec.structs.replace(denoise.held["a"], payload=None)
    assert given == foretold, "but for its input, the very task"
    assert not decode.expected, "there is time"
    for step in (1, 2, 3):
        denoise.step("a", step)
        assert list(decode.expected) == ["a"]
    denoise.done("a")
    assert not decode.expected and list(decode.held) == ["a"]
    decode.done("a")
    assert not any(isinstance(message, Cancel) for worker in cluster.workers for message in worker.told_of)


def test_what_comes_to_another_after_all_is_to_be_expected_no_more() -> None:
    cluster = ToyCluster()
    encode, denoise = cluster.worker("encode"), cluster.worker("denoise", credits=1)
    cluster.submit("a")
    cluster.submit("b")
    assert list(denoise.expected) == ["a", "b"]
    encode.done("b")  # the only credit is b's now
    assert list(denoise.held) == ["b"] and list(denoise.expected) == ["a"]
    other = cluster.worker("denoise")
    encode.done("a")
    assert list(other.held) == ["a"] and not denoise.expected and list(denoise.held) == ["b"]
    cluster.worker("decode")
    cluster.finish()
    assert cluster.leaks() == []


@pytest.mark.parametrize("how", ["cancel", "fail", "deadline"])
def test_of_a_job_that_has_ended_nothing_is_expected(how: str) -> None:
    cluster = ToyCluster()
    encode, denoise, _ = (cluster.worker(stage) for stage in STAGES)
    cluster.submit("a", deadline=5.0)
    assert denoise.expected
    if how == "cancel":
        cluster.coordinator.cancel("a")
    elif how == "fail":
        encode.fail("a", "invalid_request")
    else:
        cluster.pass_time(6.0)
    assert not denoise.expected and cluster.leaks() == []


def test_nothing_is_foretold_to_the_busy_or_to_the_worker_itself() -> None:
    cluster = ToyCluster()
    first, decode = cluster.worker("encode", "denoise"), cluster.worker("decode")
    cluster.submit("a")
    assert not first.expected, "it goes on where it is, most likely"
    first.done("a")
    first.done("a")
    cluster.submit("b")
    first.done("b")
    first.step("b")
    assert list(decode.held) == ["a"] and not decode.expected, "who is at work is not disturbed"
    decode.done("a")
    first.step("b", 2)
    assert list(decode.expected) == ["b"]


def test_nothing_of_a_suspect_is_begun_elsewhere() -> None:
    cluster = ToyCluster()
    encode, denoise, decode = (cluster.worker(stage) for stage in STAGES)
    cluster.submit("a")
    encode.done("a")
    denoise.die()
    again = cluster.worker("denoise")
    again.step("a")
    assert again.attempt("a") == 2 and not decode.expected, "it may have killed a worker"
    again.done("a")
    assert list(decode.held) == ["a"]


def test_a_worker_expects_a_job_once_at_most_and_the_lost_expect_nothing() -> None:
    cluster = ToyCluster()
    encode, denoise = cluster.worker("encode"), cluster.worker("denoise")
    cluster.submit("a")
    encode.done("a")
    both = cluster.worker("denoise", "decode")
    denoise.step("a")
    assert both.expected["a"].stage == "decode"
    encode.die()
    denoise.leave()  # and the input is gone: it begins anew
    cluster.worker("encode")
    assert both.expected["a"].stage == "decode"
    both.die()
    cluster.worker("denoise", "decode")
    cluster.finish()
    assert cluster.outcome("a").state == "done" and cluster.leaks() == []


def test_pictures_that_a_stage_takes_are_not_foretold_without() -> None:
    cluster = ToyCluster()
    for stage in STAGES:
        cluster.worker(stage)
    stages = tuple(StageSpec(stage=stage, fields={}, pictures=stage == "denoise") for stage in STAGES)
    cluster.submit("a", stages=stages)
    assert not any(worker.expected for worker in cluster.workers)


def test_a_crash_between_a_task_and_the_store_costs_a_retry() -> None:
    cluster = ToyCluster()
    encode, denoise, _ = (cluster.worker(stage) for stage in STAGES)
    cluster.submit("a")
    put, lost = cluster.store.put, []
    cluster.store.put = lost.append  # type: ignore[method-assign]
    encode.done("a")
    assert lost and list(denoise.held) == ["a"], "the next task is out, the store knows nothing of it"
    cluster.store.put = put  # type: ignore[method-assign]
    cluster.restart()
    denoise.step("a")
    assert not denoise.held, "it is told to let that be"
    cluster.pass_time(cluster.limits.lease_seconds + 1)
    assert list(encode.held) == ["a"]
    cluster.finish()
    assert cluster.outcome("a").state == "done" and cluster.leaks() == []


def test_the_next_task_is_out_before_the_store_and_observers_hear_of_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Noting(Observer):
        def done(self, worker: str, message: TaskDone, began: float, now: float) -> None:
            told.append(f"{message.stage} observed")

        def assigned(self, spec: Any, stage: str, attempt: int, worker: str, waited: float, now: float) -> None:
            told.append(f"{stage} observed to begin")

    cluster = ToyCluster(observers=[Noting()])
    encode, denoise, _ = (cluster.worker(stage) for stage in STAGES)
    cluster.submit("a")
    put, hear = cluster.store.put, denoise.told
    monkeypatch.setattr(cluster.store, "put", lambda record: (told.append("stored"), put(record)))
    monkeypatch.setattr(denoise, "told", lambda *what: (told.append("given"), hear(*what)))
    told.clear()
    encode.done("a")
    assert told == ["given", "stored", "encode observed", "denoise observed to begin"]


def test_an_input_is_kept_until_the_next_stage_has_answered() -> None:
    cluster = ToyCluster()
    encode, denoise, decode = (cluster.worker(stage) for stage in STAGES)
    cluster.submit("a")
    encode.done("a")
    denoise.done("a")
    assert len(encode.kept) == 1, "denoise may have to be done again"
    cluster.keeper.at_once = False
    decode.done("a")
    assert not encode.kept and len(denoise.kept) == 1, "decode may have to be done again"
    cluster.keeper.settle()
    assert not denoise.kept and not decode.kept


def test_no_worker_gets_more_than_its_credits_and_the_emptiest_gets_the_next() -> None:
    cluster = ToyCluster(Limits(ahead=100))
    first, second = cluster.worker("encode", credits=2), cluster.worker("encode", credits=3)
    for number in range(9):
        cluster.submit(f"j{number}")
        assert abs(len(first.held) - len(second.held)) <= 1
    assert (len(first.held), len(second.held)) == (2, 3)
    assert cluster.coordinator.position("j5") == 0 and cluster.coordinator.position("j8") == 3
    assert cluster.coordinator.position("j0") is None


def test_outputs_do_not_pile_up_before_a_stage_that_does_not_keep_up() -> None:
    cluster = ToyCluster(Limits(ahead=3))
    encode, denoise = cluster.worker("encode", credits=1), cluster.worker("denoise", credits=1)
    for number in range(20):
        cluster.submit(f"j{number}")
    while encode.held:
        encode.done(encode.next())
    assert len(encode.kept) == 6, "one at work, one credit, three ahead, and one that was under way"
    denoise.done(denoise.next())
    assert encode.held


def test_the_client_with_least_then_priority_then_deadline_then_age() -> None:
    cluster = ToyCluster(Limits(ahead=100))
    cluster.submit("other", client="a")
    cluster.submit("another", client="a", work=2.0)
    cluster.submit("big", client="b", work=10.0)
    cluster.submit("old", client="b")
    cluster.submit("soon", client="b", deadline=50.0)
    cluster.submit("sooner", client="b", deadline=20.0)
    cluster.submit("first", client="b", priority=1)
    foreseen = {job: cluster.coordinator.position(job) for job in cluster.submitted}
    worker = cluster.worker("encode", credits=1)
    order = []
    while worker.held:
        order.append(worker.next())
        worker.done(worker.next())
    assert order == ["other", "first", "another", "sooner", "soon", "big", "old"]
    assert foreseen == {job: place for place, job in enumerate(order)}, "it goes as it was told"


def test_a_client_that_asks_for_priority_does_not_keep_another_waiting() -> None:
    cluster = ToyCluster(Limits(ahead=1000))
    worker = cluster.worker("encode", credits=1)
    for number in range(3):
        cluster.submit(f"patient{number}", client="patient")
    order = []
    for number in range(12):
        # One job at a time: each time it comes back, and starts level with the others.
        cluster.submit(f"urgent{number}", client="urgent", priority=100, deadline=1.0)
        order.append(worker.next())
        worker.done(order[-1])
        if order[-1].startswith("urgent"):
            cluster.coordinator.cancel(order[-1])
    assert [job for job in order[:6] if job.startswith("patient")] == ["patient0", "patient1", "patient2"], order


def test_a_client_with_many_jobs_does_not_keep_another_waiting() -> None:
    cluster = ToyCluster(Limits(ahead=1000))
    for number in range(50):
        cluster.submit(f"many{number}", client="many")
    worker = cluster.worker("encode", credits=1)
    for _ in range(10):
        worker.done(worker.next())
    for number in range(5):
        cluster.submit(f"few{number}", client="few")
    order = []
    for _ in range(12):
        order.append(worker.next())
        worker.done(worker.next())
    few = [place for place, job in enumerate(order) if job.startswith("few")]
    assert len(few) == 5 and all(later - place == 2 for place, later in itertools.pairwise(few)), order


def test_a_client_that_comes_back_has_saved_up_nothing_and_owes_nothing() -> None:
    cluster = ToyCluster(Limits(ahead=1000))
    worker = cluster.worker("encode", credits=1)
    for number in range(20):
        cluster.submit(f"x{number}", client="x")
        worker.done(worker.next())
        cluster.coordinator.cancel(f"x{number}")
    for number in range(6):
        cluster.submit(f"y{number}", client="y")
    for number in range(6):
        cluster.submit(f"again{number}", client="x")
    order = []
    while worker.held:
        order.append(worker.next()[0])
        worker.done(worker.next())
    assert "".join(order).startswith("yyayayay"), "they take turns at once; the first began before x came back"


def test_a_full_queue_rejects_and_says_when_to_come_again() -> None:
    cluster = ToyCluster(Limits(max_queue=3, max_queue_per_client=2))
    cluster.submit("a", client="x")
    cluster.submit("b", client="x")
    with pytest.raises(QueueFull, match="2 jobs of this client"):
        cluster.submit("c", client="x")
    cluster.submit("c", client="y")
    with pytest.raises(QueueFull, match=r"3 jobs wait; allowed: 3") as caught:
        cluster.submit("d", client="z")
    assert caught.value.retry_after > 0 and cluster.coordinator.job("d") is None
    cluster.coordinator.cancel("a")
    cluster.submit("a2", client="x")
    cluster.worker()
    cluster.submit("d", client="z")
    cluster.finish()
    assert cluster.states() == {"done": 4, "cancelled": 1} and cluster.coordinator.status().totals.rejected == 2


def test_a_stage_without_a_worker_waits_or_fails_as_configured() -> None:
    cluster = ToyCluster(Limits(missing_worker="fail"))
    cluster.worker("encode")
    with pytest.raises(NoWorker, match="denoise, decode"):
        cluster.submit("a")
    waiting = ToyCluster()
    waiting.submit("a")
    assert waiting.coordinator.missing() == STAGES
    waiting.worker()
    waiting.finish()
    assert waiting.outcome("a").state == "done"


def test_the_release_of_little_is_told_with_the_next_task_or_tick() -> None:
    cluster = ToyCluster()
    encode, rest = cluster.worker("encode", credits=1), cluster.worker("denoise", "decode")
    encode.size = rest.size = 1000
    cluster.submit("a")
    cluster.submit("b")
    encode.done("a")
    rest.done("a")
    rest.done("a")
    (old,) = encode.kept  # nothing was said to it since
    encode.done("b")
    cluster.submit("c")
    assert len(encode.kept) == 1 and [one.released for one in encode.told_of if isinstance(one, Run)][-1] == (old,)
    cluster.finish()
    cluster.coordinator.tick()
    assert cluster.leaks() == []


def test_a_release_whose_task_could_not_be_sent_is_told_with_the_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = ToyCluster()
    encode, rest = cluster.worker("encode", credits=1), cluster.worker("denoise", "decode")
    encode.size = 1000
    cluster.submit("a")
    encode.done("a")
    rest.done("a")
    rest.done("a")
    assert len(encode.kept) == 1, "nothing was said to it since"
    with monkeypatch.context() as patch:

        def fail(*_: object) -> None:
            raise ValueError("cannot be encoded")

        patch.setattr(encode, "told", fail)
        cluster.submit("b")
    cluster.coordinator.tick()
    assert not encode.kept


def test_cancel_reaches_the_worker_and_frees_everything() -> None:
    cluster = ToyCluster()
    encode, denoise = cluster.worker("encode"), cluster.worker("denoise", credits=1)
    cluster.submit("a")
    cluster.submit("b")
    encode.done("a")
    encode.done("b")
    late = denoise.held["a"]
    assert cluster.coordinator.cancel("a") and not cluster.coordinator.cancel("a")
    assert any(isinstance(message, Cancel) for message in denoise.told_of)
    assert cluster.outcome("a").state == "cancelled" and list(denoise.held) == ["b"]
    denoise.say(
        TaskDone(
            job="a", stage="denoise", attempt=late.attempt, descriptor=denoise.publish(), seconds=1, steps=1,
            peak_bytes=0,
        )
    )  # fmt: skip
    denoise.say(
        Checkpointed(job="a", stage="denoise", attempt=late.attempt, step=1, descriptor=denoise.publish())
    )  # fmt: skip
    assert not denoise.kept and len(encode.kept) == 1
    cluster.worker("decode")
    cluster.finish()
    assert cluster.leaks() == [] and len(cluster.outcomes["a"]) == 1


def test_cancel_while_the_keeper_fetches_drops_what_it_fetched() -> None:
    cluster = ToyCluster()
    cluster.keeper.at_once = False
    worker = cluster.worker()
    cluster.submit("a")
    for _ in STAGES:
        worker.done("a")
    cluster.coordinator.cancel("a")
    assert len(worker.kept) == 1, "it is being read"
    cluster.keeper.settle()
    assert cluster.leaks() == [] and not cluster.keeper.kept.get("a")


def test_a_worker_at_work_on_what_nobody_wants_is_told_so() -> None:
    cluster = ToyCluster()
    worker = cluster.worker()
    cluster.submit("a")
    task = worker.held["a"]
    cluster.coordinator.cancel("a")
    worker.told_of.clear()
    worker.held["a"] = task
    worker.step("a")
    assert worker.told_of == [Cancel(job="a")] and not cluster.progress["a"]


def test_deadline_and_time_limit_end_a_job() -> None:
    cluster = ToyCluster(Limits(time_limit_seconds=20.0, stalled_seconds=1000))
    worker = cluster.worker("encode", credits=1)
    cluster.submit("running", deadline=8.0)
    cluster.submit("waiting", deadline=10.0)
    cluster.submit("slow")
    cluster.pass_time(9.0)
    assert cluster.outcome("running").failures[-1].code == "deadline"
    assert not cluster.outcomes["waiting"] and list(worker.held) == ["waiting"]
    cluster.pass_time(2.0)
    assert cluster.outcome("waiting").failures[-1].code == "deadline" and list(worker.held) == ["slow"]
    cluster.pass_time(21.0)
    assert cluster.outcome("slow").failures[-1].code == "time_limit"
    assert not worker.held and cluster.leaks() == []


def test_goodbye_hands_back_without_suspicion() -> None:
    cluster = ToyCluster()
    worker = cluster.worker("encode")
    cluster.submit("a")
    worker.leave()
    record = cluster.coordinator.job("a")
    assert record is not None and not record.alone
    assert "a" in cluster.worker("encode").held and cluster.dismissed == [("w0", "left")]


def test_a_worker_that_drains_gets_no_more() -> None:
    cluster = ToyCluster()
    worker = cluster.worker("encode")
    cluster.submit("a")
    assert cluster.coordinator.retire(worker.incarnation) and not cluster.coordinator.retire("nobody")
    cluster.submit("b")
    assert list(worker.held) == ["a"]
    other = cluster.worker("encode")
    other.say(Ready(topology=b"", capacity={}, credits={"encode": 0}, weights={}))
    cluster.submit("c")
    assert list(other.held) == ["b"], "it said itself that it takes no more"


def test_another_process_in_the_same_slot_takes_the_formers_place() -> None:
    cluster = ToyCluster()
    cluster.worker("encode", slot="encode-0")
    cluster.submit("a")
    fresh = cluster.worker("encode", slot="encode-0")
    assert cluster.dismissed == [("w0", "superseded")] and "a" in fresh.held


def test_a_worker_that_comes_anew_before_it_was_missed_takes_its_own_place_without_suspicion() -> None:
    cluster = ToyCluster()
    worker = cluster.worker("encode")
    cluster.submit("a")
    worker.held.clear()
    worker.join()
    record = cluster.coordinator.job("a")
    assert "a" in worker.held and record is not None and not record.alone


def test_a_preview_map_goes_to_those_who_cannot_make_one() -> None:
    cluster = ToyCluster()
    denoise, both = cluster.worker("denoise"), cluster.worker("denoise", "decode")
    cluster.worker("decode").ready(preview=b"map")
    late = cluster.worker("denoise")
    for worker in (denoise, late):
        assert [one.preview for one in worker.told_of if isinstance(one, SetPreview)] == [b"map"]
    assert not [one for one in both.told_of if isinstance(one, SetPreview)]


def test_what_was_let_go_while_a_worker_was_cut_off_is_said_when_it_comes_back() -> None:
    cluster = ToyCluster()
    encode = cluster.worker("encode")
    cluster.submit("a")
    encode.done("a")
    encode.cut = True
    cluster.pass_time(6.0)
    cluster.coordinator.cancel("a")
    assert encode.kept
    encode.cut = False
    encode.join()
    assert not encode.kept and any(isinstance(message, Release) for message in encode.told_of)


def test_wrong_limits_and_jobs_are_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match=r"limits.max_queue: given 0; allowed: at least 1"):
        Limits(max_queue=0)
    with pytest.raises(InvalidRequest, match=r"limits.failures_kept: given 0; allowed: at least 1$"):
        Limits(failures_kept=0)
    with pytest.raises(InvalidRequest, match=r"limits.lease_seconds"):
        Limits(lease_seconds=1.0)
    with pytest.raises(InvalidRequest, match=r"limits.missing_worker"):
        Limits(missing_worker="never")  # pyright: ignore[reportArgumentType]
    cluster = ToyCluster()
    cluster.submit("a")
    with pytest.raises(InvalidRequest, match="id"):
        cluster.submit("a")
    with pytest.raises(InvalidRequest, match="stages"):
        cluster.submit("b", stages=())

"""What follows when something goes wrong: which jobs go on, where, from what, and at whose cost."""

from __future__ import annotations

import pytest

from tests.cluster.toy import STAGES, ToyCluster, ToyWorker
from triptych.cluster import Limits
from triptych.errors import PayloadLost
from triptych.messages import Goodbye, Loading


def to(cluster: ToyCluster, *workers: ToyWorker) -> ToyWorker:
    """Works until a worker in this list has something, and returns it."""
    for _ in range(100):
        for worker in workers:
            if worker.held:
                return worker
        for worker in cluster.workers:
            if worker.alive and worker.held:
                worker.done(worker.next())
                break
    raise AssertionError("none of them was given anything")


def test_a_dead_workers_jobs_go_on_elsewhere_with_nothing_beside_them() -> None:
    cluster = ToyCluster(Limits(ahead=100))
    doomed = cluster.worker("encode", credits=2)
    cluster.submit("a")
    cluster.submit("b")
    doomed.die()
    cluster.submit("c")
    fresh = cluster.worker("encode", credits=2)
    assert list(fresh.held) == ["a"] and fresh.attempt("a") == 2
    fresh.done("a")
    assert list(fresh.held) == ["b"]
    fresh.done("b")
    assert list(fresh.held) == ["c"]
    for job in ("a", "b"):
        record = cluster.coordinator.job(job)
        assert record is not None and not record.alone and record.failures[0].code == "worker_lost"


def test_a_suspect_gets_a_worker_to_itself_even_where_others_keep_it_busy() -> None:
    cluster = ToyCluster(Limits(ahead=100))
    doomed = cluster.worker("encode", credits=1)
    cluster.submit("suspect")
    steady = cluster.worker("encode", credits=2)
    for number in range(10):
        cluster.submit(f"j{number}")
    doomed.die()
    assert "suspect" not in steady.held
    while "suspect" not in steady.held:
        steady.done(steady.next())
    assert list(steady.held) == ["suspect"], "the worker was emptied for it"
    last = cluster.coordinator.job("j9")
    assert last is not None and last.attempts == [0, 0, 0], "it was not kept waiting for all the others"


def test_a_poison_job_is_quarantined_and_the_others_are_done() -> None:
    cluster = ToyCluster(Limits(ahead=100))
    for stage in ("denoise", "decode"):
        cluster.worker(stage)
    for number in range(6):
        cluster.submit(f"j{number}")
    cluster.submit("poison")
    deaths = 0
    for _ in range(100):
        if cluster.outcomes["poison"]:
            break
        worker = cluster.worker("encode", credits=3)
        while worker.held:
            if "poison" in worker.held:
                worker.die()
                deaths += 1
            else:
                worker.done(worker.next())
    cluster.worker("encode")
    cluster.finish()
    outcome = cluster.outcome("poison")
    assert outcome.state == "failed" and deaths == 3
    assert [failure.code for failure in outcome.failures] == ["worker_lost"] * 3 + ["quarantined"]
    assert cluster.states() == {"failed": 1, "done": 6} and cluster.leaks() == []


def test_a_coordinator_that_is_cut_off_from_all_blames_no_job() -> None:
    cluster = ToyCluster()
    doomed = cluster.worker("encode")
    cluster.submit("a")
    doomed.die()
    workers = [cluster.worker(stage) for stage in STAGES for _ in range(2)]
    for _ in range(4):
        assert sum("a" in worker.held for worker in workers) == 1
        for worker in workers:
            worker.cut = True
        cluster.pass_time(7.0)
        assert {kind for _, kind in cluster.dismissed[-6:]} == {"silent"}
        for worker in workers:
            worker.cut = False
            worker.held.clear()
            worker.join()
    cluster.finish()
    assert cluster.outcome("a").state == "done" and cluster.leaks() == []


def test_progress_between_two_deaths_clears_a_job() -> None:
    cluster = ToyCluster()
    for stage in ("encode", "decode"):
        cluster.worker(stage)
    cluster.submit("a")
    for step in range(1, 8):
        worker = to(cluster, cluster.worker("denoise"))
        worker.checkpoint("a", step)
        worker.die()
    cluster.worker("denoise")
    cluster.finish()
    assert cluster.outcome("a").state == "done"


def test_a_worker_silent_for_a_lease_is_dead_and_its_late_answer_harmless() -> None:
    cluster = ToyCluster()
    silent = cluster.worker("encode")
    cluster.submit("a")
    silent.cut = True
    cluster.pass_time(4.5)
    assert cluster.dismissed == []
    fresh = cluster.worker("encode")
    assert not fresh.held
    cluster.pass_time(1.0)
    assert cluster.dismissed == [("w0", "silent")] and list(fresh.held) == ["a"]
    silent.done("a")
    silent.cut = False
    silent.join()
    assert not silent.kept, "its late output is let go"
    for stage in ("denoise", "decode"):
        cluster.worker(stage)
    cluster.finish()
    assert cluster.outcome("a").state == "done" and cluster.leaks() == []


def test_our_own_pause_is_nobodys_silence() -> None:
    cluster = ToyCluster()
    worker = cluster.worker("encode")
    cluster.clock.now += 60
    cluster.coordinator.tick()
    assert cluster.dismissed == []
    worker.cut = True
    cluster.pass_time(6.0)
    assert cluster.dismissed == [("w0", "silent")]


def test_a_unit_ten_times_its_measured_time_is_hung_unless_it_compiles() -> None:
    cluster = ToyCluster()
    worker = cluster.worker("encode")
    cluster.submit("a", work=4.0)
    worker.step("a", seconds=4.0)
    worker.done("a")
    cluster.submit("b", work=2.0)
    worker.say(Loading(what="compiling"))
    worker.beat("b", seconds=100.0)
    assert cluster.dismissed == []
    worker.step("b", seconds=2.0)
    worker.beat("b", seconds=19.0)
    assert cluster.dismissed == []
    worker.beat("b", seconds=21.0)
    assert cluster.dismissed == [("w0", "hung")]
    other = cluster.worker("encode", credits=1)
    other.done("a")
    assert list(other.held) == ["b"]


def test_loading_may_take_long_but_not_for_ever() -> None:
    cluster = ToyCluster(Limits(loading_seconds=100.0))
    loading = cluster.worker("encode", join=False).join(ready=False)
    cluster.pass_time(90.0)
    loading.say(Loading(what="transformer", done=1, total=2))
    cluster.pass_time(90.0)
    assert cluster.dismissed == []
    cluster.pass_time(11.0)
    assert cluster.dismissed == [("w0", "hung")]


def test_a_worker_that_holds_tasks_and_does_nothing_is_hung() -> None:
    cluster = ToyCluster(Limits(stalled_seconds=30.0))
    worker = cluster.worker("encode")
    cluster.submit("a")
    worker.moving = True
    cluster.pass_time(100.0)
    assert cluster.dismissed == [], "a large input may take its time"
    worker.moving = False
    cluster.pass_time(31.0)
    assert cluster.dismissed == [("w0", "hung")]


def test_an_error_of_its_own_is_retried_once_elsewhere_then_fails() -> None:
    cluster = ToyCluster()
    first, second = cluster.worker("encode"), cluster.worker("encode")
    cluster.submit("a")
    assert "a" in first.held
    first.fail("a", "not_enough_memory", original="OutOfMemoryError")
    assert list(second.held) == ["a"] and first.to_prove == 1
    cluster.submit("b")
    assert "b" in second.held, "the first one has not proved itself"
    second.fail("a", "error")
    outcome = cluster.outcome("a")
    assert [failure.code for failure in outcome.failures] == ["not_enough_memory", "error"]
    first.prove()
    cluster.submit("c")
    assert "c" in first.held
    second.prove(healthy=False)
    assert cluster.dismissed == [("w1", "unhealthy")] and second.refused is not None and not second.refused.again


def test_a_retry_is_at_the_same_worker_if_there_is_no_other_and_it_has_proved_itself() -> None:
    cluster = ToyCluster()
    worker = cluster.worker()
    cluster.submit("a")
    worker.fail("a")
    assert not worker.held
    worker.prove()
    assert worker.attempt("a") == 2
    cluster.finish()
    assert cluster.outcome("a").state == "done" and cluster.coordinator.status().totals.retries == 1


@pytest.mark.parametrize("code", ["invalid_request", "invalid_media", "unsupported"])
def test_an_error_that_comes_again_everywhere_is_not_retried(code: str) -> None:
    cluster = ToyCluster()
    worker = cluster.worker()
    cluster.submit("a")
    worker.fail("a", code, field="prompt")
    assert cluster.outcome("a").failures[0].field == "prompt" and not worker.to_prove


def test_a_worker_that_does_not_prove_itself_is_hung() -> None:
    cluster = ToyCluster(Limits(prove_seconds=10.0))
    worker = cluster.worker()
    cluster.submit("a")
    worker.fail("a")
    cluster.pass_time(11.0)
    assert cluster.dismissed == [("w0", "hung")]


def test_an_input_lost_with_its_producer_is_produced_again_from_the_kept_checkpoint() -> None:
    cluster = ToyCluster()
    encode, decode = cluster.worker("encode"), cluster.worker("decode")
    denoise = to(cluster, cluster.worker("denoise")) if cluster.submit("a") else encode
    denoise.checkpoint("a", 3)
    denoise.done("a")
    denoise.die()
    decode.fail("a", "payload_lost", lost="payload")
    again = cluster.worker("denoise")
    assert again.held["a"].checkpoint is not None and again.held["a"].payload is not None
    assert len(encode.kept) == 1, "encode was not done again"
    cluster.finish()
    assert cluster.outcome("a").state == "done" and cluster.leaks() == []
    totals = cluster.coordinator.status().totals
    assert (totals.remade, totals.resumes) == (1, 1)
    assert cluster.keeper.kept["a"] == {"result"}


def test_a_waiting_job_goes_back_at_once_when_its_input_dies() -> None:
    cluster = ToyCluster()
    encode = cluster.worker("encode")
    cluster.submit("a")
    encode.done("a")
    encode.die()
    assert cluster.worker("encode").attempt("a") == 2


def test_a_producer_that_lives_but_cannot_be_reached_is_asked_a_limited_number_of_times() -> None:
    cluster = ToyCluster(Limits(losses=3))
    encode, denoise = cluster.worker("encode"), cluster.worker("denoise")
    cluster.submit("a")
    for _ in range(4):
        to(cluster, denoise).fail("a", "payload_lost", lost="payload")
    outcome = cluster.outcome("a")
    assert outcome.failures[-1].code == "payload_lost" and not encode.kept


def test_a_damaged_fetch_is_repeated_then_the_input_is_made_anew_then_the_job_fails() -> None:
    cluster = ToyCluster(Limits(damages=5))
    cluster.worker("encode")
    denoise = cluster.worker("denoise")
    cluster.submit("a")
    seen = []
    for _ in range(5):
        worker = to(cluster, denoise)
        ticket = worker.held["a"].payload
        seen.append(ticket.descriptor.payload if ticket else None)
        worker.fail("a", "payload_damaged", lost="payload", damaged=True)
    assert seen[0] == seen[1] == seen[2] != seen[3]
    assert cluster.outcome("a").failures[-1].code == "payload_damaged"
    assert cluster.coordinator.status().totals.digest_failures == 5 and cluster.leaks() == []


def test_a_lost_checkpoint_costs_the_stage_from_its_beginning() -> None:
    cluster = ToyCluster()
    cluster.worker("encode")
    doomed = cluster.worker("denoise")
    cluster.submit("a")
    worker = to(cluster, doomed)
    worker.checkpoint("a", 2)
    worker.die()
    fresh = cluster.worker("denoise")
    assert fresh.held["a"].checkpoint is not None
    fresh.fail("a", "payload_lost", lost="checkpoint")
    assert fresh.held["a"].checkpoint is None and not fresh.to_prove


def test_only_one_checkpoint_of_a_job_is_fetched_at_a_time_and_none_is_kept_at_the_worker() -> None:
    cluster = ToyCluster()
    cluster.worker("encode")
    denoise = to(cluster, cluster.worker("denoise")) if cluster.submit("a") else None
    assert denoise is not None
    cluster.keeper.at_once = False
    denoise.checkpoint("a", 1)
    denoise.checkpoint("a", 2)
    assert len(denoise.kept) == 1 and len(cluster.keeper.waiting) == 1
    cluster.keeper.settle()
    record = cluster.coordinator.job("a")
    assert not denoise.kept and record is not None and record.checkpoint_step == 1


def test_a_result_that_is_damaged_or_lost_on_its_way_is_fetched_or_made_again() -> None:
    cluster = ToyCluster()
    cluster.keeper.at_once = False
    worker = cluster.worker()
    cluster.submit("a")
    for _ in STAGES:
        worker.done("a")
    cluster.keeper.damage = 1
    cluster.keeper.settle()
    assert cluster.outcome("a").state == "done" and cluster.leaks() == []

    cluster.submit("b")
    for _ in STAGES:
        worker.done("b")
    worker.die()
    cluster.keeper.settle()
    cluster.keeper.at_once = True
    cluster.worker()
    cluster.finish()
    assert cluster.outcome("b").state == "done"


def test_a_keeper_that_cannot_write_fails_the_job_after_two_tries() -> None:
    cluster = ToyCluster()
    cluster.keeper.refuse = OSError("no space left on device")
    cluster.worker()
    cluster.submit("a")
    cluster.finish()
    outcome = cluster.outcome("a")
    assert outcome.state == "failed" and "no space" in outcome.failures[-1].message and cluster.leaks() == []
    cluster.keeper.refuse = PayloadLost("cut off")
    cluster.submit("b")
    cluster.finish()
    assert cluster.outcome("b").failures[-1].code == "payload_lost" and cluster.leaks() == []


def test_a_worker_that_ends_by_an_error_has_died_and_its_job_is_a_suspect() -> None:
    cluster = ToyCluster()
    cluster.submit("a")
    for deaths in (1, 2, 3):
        worker = cluster.worker("encode")
        assert "a" in worker.held
        worker.say(Goodbye(reason="SystemError: oh", failed=True))
        worker.die(notice=False)
        assert cluster.coordinator.status().totals.workers_lost == deaths
    failure = cluster.outcome("a").failures[-1]
    assert failure.code == "quarantined" and "SystemError: oh" in failure.message


def test_a_failed_job_leaves_nothing_offered() -> None:
    cluster = ToyCluster()
    cluster.worker("encode").ready()
    worker = cluster.worker("denoise", "decode")
    cluster.keeper.kept["a"] = {"pictures"}
    cluster.submit("a", pictures="a/pictures")
    cluster.workers[0].done("a")
    worker.checkpoint("a", 2)
    worker.fail("a", "invalid_request")
    assert cluster.outcome("a").state == "failed"
    assert cluster.keeper.kept["a"] == {"input"}


def test_a_failed_jobs_input_is_kept_for_whoever_looks_into_it() -> None:
    tasks = []
    cluster = ToyCluster(failed=lambda record, task: tasks.append(task))
    cluster.worker("encode")
    denoise = to(cluster, cluster.worker("denoise")) if cluster.submit("a") else None
    assert denoise is not None
    denoise.fail("a", "unsupported")
    assert cluster.keeper.kept["a"] == {"input"} and cluster.leaks() == []
    assert tasks[0].stage == "denoise" and tasks[0].payload is None

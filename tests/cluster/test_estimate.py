"""When a job will start and end: what was measured, played forward."""

from __future__ import annotations

import time

import pytest

from tests.cluster.toy import STAGES, ToyCluster, ToyWorker
from triptych.cluster import Estimate, Limits, StageSpec
from triptych.cluster.scheduling.fleet import OCTAVES, Measures
from triptych.errors import QueueFull
from triptych.request import StageName

ENCODE, STEP, DECODE = 1.0, 2.0, 3.0
"""Seconds of a worker."""
WORK = 10.0


def spec(steps: int) -> tuple[StageSpec, ...]:
    return tuple(StageSpec(stage=stage, fields={"num_inference_steps": steps}) for stage in STAGES)


def submit(cluster: ToyCluster, job: str, steps: int = 4, **more: object) -> str:
    return cluster.submit(job, stages=spec(steps), **{"work": WORK, **more})


def step(cluster: ToyCluster, worker: ToyWorker, job: str, number: int, seconds: float) -> None:
    """A step of four ends, `seconds` after the one before."""
    cluster.pass_time(seconds)
    worker.step(job, number, number * seconds)


def end(worker: ToyWorker, job: str) -> None:
    """A stage without steps is one unit."""
    worker.step(job, 1, 1.0, steps=1)
    worker.done(job)


def work_off(cluster: ToyCluster, workers: dict[StageName, ToyWorker], job: str) -> None:
    """One job alone, through all stages."""
    cluster.pass_time(ENCODE)
    end(workers["encode"], job)
    for number in range(1, 5):
        step(cluster, workers["denoise"], job, number, STEP)
    workers["denoise"].done(job, steps=4)
    cluster.pass_time(DECODE)
    end(workers["decode"], job)


def split(limits: Limits | None = None, credits: int = 1) -> tuple[ToyCluster, dict[StageName, ToyWorker]]:
    cluster = ToyCluster(limits or Limits())
    return cluster, {stage: cluster.worker(stage, credits=credits) for stage in STAGES}


def close(found: Estimate, starts_in: float, done_in: float) -> None:
    assert (found.starts_in, found.done_in) == (pytest.approx(starts_in), pytest.approx(done_in))


def test_nothing_is_told_before_anything_was_measured() -> None:
    cluster, workers = split()
    submit(cluster, "a")
    submit(cluster, "b")
    assert cluster.coordinator.estimate("a") == Estimate(0.0, None)
    assert cluster.coordinator.estimate("b") == Estimate(None, None)
    assert cluster.coordinator.estimate("nobody's") == Estimate()
    work_off(cluster, workers, "a")
    assert cluster.coordinator.estimate("a") == Estimate(), "it has ended"
    assert cluster.coordinator.estimate("b").done_in is not None


def test_a_job_alone_takes_its_stages_one_after_the_other() -> None:
    cluster, workers = split()
    submit(cluster, "a")
    work_off(cluster, workers, "a")
    submit(cluster, "b")
    close(cluster.coordinator.estimate("b"), 0.0, ENCODE + 4 * STEP + DECODE)
    cluster.pass_time(0.5)
    close(cluster.coordinator.estimate("b"), 0.0, ENCODE + 4 * STEP + DECODE - 0.5)
    cluster.pass_time(0.5)
    end(workers["encode"], "b")
    step(cluster, workers["denoise"], "b", 1, STEP)
    close(cluster.coordinator.estimate("b"), 0.0, 3 * STEP + DECODE)


def test_steps_and_size_count() -> None:
    cluster, workers = split()
    submit(cluster, "a")
    work_off(cluster, workers, "a")
    submit(cluster, "few", steps=2, work=WORK / 2)
    close(cluster.coordinator.estimate("few"), 0.0, ENCODE + 2 * STEP / 2 + DECODE / 2)
    cluster.coordinator.cancel("few")
    submit(cluster, "large", work=WORK * 2)
    grown = 2 * 2  # larger than all that was measured: attention grows with the square
    close(cluster.coordinator.estimate("large"), 0.0, ENCODE + grown * (4 * STEP + DECODE))


def test_a_queue_waits_for_the_slowest_stage_and_the_stages_overlap() -> None:
    cluster, workers = split(Limits(ahead=0))
    submit(cluster, "a")
    work_off(cluster, workers, "a")
    for job in "bcde":
        submit(cluster, job)
    denoise = 4 * STEP
    close(cluster.coordinator.estimate("b"), 0.0, ENCODE + denoise + DECODE)
    # Two outputs may wait for denoise: c and d are encoded at once, e when c leaves for denoise.
    close(cluster.coordinator.estimate("c"), ENCODE, ENCODE + 2 * denoise + DECODE)
    close(cluster.coordinator.estimate("d"), 2 * ENCODE, ENCODE + 3 * denoise + DECODE)
    close(cluster.coordinator.estimate("e"), ENCODE + denoise, ENCODE + 4 * denoise + DECODE)


def test_tasks_at_one_worker_share_it_and_what_they_take_is_measured_all_the_same() -> None:
    cluster = ToyCluster()
    worker = cluster.worker(credits=2)
    for job in "ab":  # both run at once, each unit takes twice as long
        submit(cluster, job)
    for job in "ab":
        cluster.pass_time(ENCODE)
        end(worker, job)
    for number in range(1, 5):
        for job in "ab":
            cluster.pass_time(STEP)
            worker.step(job, number, number * 2 * STEP)
    for job in "ab":
        worker.done(job, steps=4)
    for job in "ab":
        cluster.pass_time(DECODE)
        end(worker, job)
    whole = ENCODE + 4 * STEP + DECODE
    for job in "cdef":
        submit(cluster, job)
    ends = [cluster.coordinator.estimate(job).done_in or 0.0 for job in "cdef"]
    assert 1.5 * whole < ends[0] < 3.5 * whole
    assert ends[-1] == pytest.approx(4 * whole, rel=0.1)


def test_two_workers_take_half_the_time() -> None:
    cluster, workers = split()
    submit(cluster, "a")
    work_off(cluster, workers, "a")
    for number in range(8):
        submit(cluster, f"j{number}")
    alone = cluster.coordinator.estimate("j7").done_in
    cluster.worker("denoise", credits=1)
    cluster.pass_time(0.5)
    beside = cluster.coordinator.estimate("j7").done_in
    assert alone is not None and beside is not None and 0.45 * alone < beside < 0.65 * alone


def test_without_a_worker_for_a_stage_the_end_cannot_be_told() -> None:
    cluster, workers = split()
    submit(cluster, "a")
    work_off(cluster, workers, "a")
    workers["decode"].leave()
    submit(cluster, "b")
    assert cluster.coordinator.estimate("b") == Estimate(0.0, None)


def test_who_goes_first_starts_first() -> None:
    cluster, workers = split(Limits(ahead=0))
    submit(cluster, "a")
    work_off(cluster, workers, "a")
    for job in ("b", "c", "late"):
        submit(cluster, job)
    submit(cluster, "urgent", priority=5)
    cluster.pass_time(0.5)
    urgent, late = cluster.coordinator.estimate("urgent"), cluster.coordinator.estimate("late")
    assert urgent.starts_in is not None and late.starts_in is not None and urgent.starts_in < late.starts_in


def test_a_full_queue_says_when_there_will_be_room() -> None:
    cluster, workers = split(Limits(ahead=0, max_queue=2))
    for job in "abc":
        submit(cluster, job)
    with pytest.raises(QueueFull) as caught:
        submit(cluster, "d")
    assert caught.value.retry_after == 5.0, "nothing was measured"
    work_off(cluster, workers, "a")
    for job in "bcd":  # b is denoised, two outputs wait
        if job == "d":
            submit(cluster, job)
        end(workers["encode"], job)
    for job in "ef":
        submit(cluster, job)
    with pytest.raises(QueueFull) as caught:
        submit(cluster, "g")
    assert caught.value.retry_after == pytest.approx(4 * STEP), "b leaves denoise, c goes there, e is encoded"
    assert cluster.coordinator.estimate("e").starts_in == pytest.approx(4 * STEP)


def test_a_long_queue_is_played_in_little_time() -> None:
    cluster, workers = split(Limits(max_queue=1000), credits=5)
    submit(cluster, "a")
    work_off(cluster, workers, "a")
    for number in range(256):
        submit(cluster, f"j{number}", client=f"client{number % 7}")
    cluster.pass_time(1.0)
    began = time.perf_counter()
    found = [cluster.coordinator.estimate(f"j{number}") for number in range(256)]
    assert time.perf_counter() - began < 0.25, "one play for all of them"
    ends = [one.done_in for one in found]
    assert None not in ends and max(end or 0.0 for end in ends) == pytest.approx(256 * 4 * STEP, rel=0.1)


def test_a_worker_that_is_leaving_is_given_nothing_more() -> None:
    cluster, workers = split()
    submit(cluster, "a")
    work_off(cluster, workers, "a")
    submit(cluster, "b")
    submit(cluster, "c")
    cluster.coordinator.retire(workers["encode"].incarnation)
    cluster.pass_time(0.5)
    assert cluster.coordinator.estimate("b").done_in is not None, "it has that one"
    assert cluster.coordinator.estimate("c") == Estimate(None, None)


def test_sizes_are_told_apart_since_a_unit_has_a_part_that_does_not_grow() -> None:
    cluster, workers = split()
    seconds = {1.0: 1.0, 100.0: 2.0}
    for number in range(4):
        for work in (1.0, 100.0):
            job = submit(cluster, f"{number}-{work}", work=work)
            cluster.pass_time(ENCODE)
            end(workers["encode"], job)
            for at in range(1, 5):
                step(cluster, workers["denoise"], job, at, seconds[work])
            workers["denoise"].done(job, steps=4)
            cluster.pass_time(DECODE)
            end(workers["decode"], job)
    for work, each in seconds.items():
        job = submit(cluster, f"last-{work}", work=work)
        close(cluster.coordinator.estimate(job), 0.0, ENCODE + 4 * each + DECODE)
        cluster.coordinator.cancel(job)
    near = submit(cluster, "near", work=50.0)  # twice as large takes 2 s at most
    close(cluster.coordinator.estimate(near), 0.0, ENCODE + 4 * 2.0 / 2 + DECODE / 2)


def test_calls_of_the_vae_by_itself_are_measured_apart() -> None:
    cluster, workers = split()
    submit(cluster, "a")
    work_off(cluster, workers, "a")
    alone = (StageSpec(stage="decode", fields={}),)
    call = cluster.submit("call", stages=alone, work=WORK, bare="vae.decode")
    assert cluster.coordinator.estimate(call).done_in is None, "none was measured"
    cluster.pass_time(60.0)
    workers["decode"].step(call, 1, 60.0, steps=1)
    workers["decode"].done(call)
    submit(cluster, "b")
    close(cluster.coordinator.estimate("b"), 0.0, ENCODE + 4 * STEP + DECODE)


def test_no_more_sizes_are_measured_apart_than_there_are_octaves() -> None:
    measures = Measures(0.1)
    for exponent in range(-80, 200):
        measures.add(("decode", "cpu", None), 1.0, 2.0**exponent)
    assert sum(map(len, measures._found.values())) == OCTAVES
    assert measures.expected(("denoise", "cpu", None), 1.0) is None

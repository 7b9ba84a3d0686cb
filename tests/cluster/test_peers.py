"""What is known to go wrong in other servers that split a model: each has a test that says how it goes here."""

from __future__ import annotations

import base64
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from tests.cluster.toy import ToyCluster, ToyWorker
from triptych.cluster import Limits
from triptych.errors import NotEnoughMemory, PayloadLost, TriptychError
from triptych.messages import (
    Busy,
    Checkpointed,
    Failed,
    Stepped,
    Task,
    TaskDone,
    decode_from_worker,
    ticket_for,
)
from triptych.transfer import Exchange, Payload, TransferSettings, payload_of

MIB = 2**20
ROWS = torch.arange(256, dtype=torch.uint8)


def settle(cluster: ToyCluster) -> None:
    """Everything else is done, and nothing is left anywhere."""
    cluster.finish()
    assert cluster.leaks() == []


def states(cluster: ToyCluster, *jobs: str) -> list[str]:
    return [cluster.outcome(job).state for job in jobs]


# A request that is lost, fails, or is cancelled is nobody else's trouble.


def test_an_input_that_never_comes_ends_its_job_and_holds_up_no_other() -> None:
    cluster = ToyCluster()
    worker = cluster.worker(credits=1)
    poor, *others = [cluster.submit(job) for job in ("poor", "a", "b")]
    tries = 0
    while cluster.coordinator.job(poor).state != "failed":  # type: ignore[union-attr]
        assert (tries := tries + 1) < 200, "it spins"
        job = worker.next()
        if job == poor and worker.held[job].stage == "denoise":
            worker.fail(job, "payload_lost", lost="payload")
        else:
            worker.done(job)
    settle(cluster)
    assert states(cluster, poor, *others) == ["failed", "done", "done"]
    assert cluster.outcome(poor).failures[-1].code == "payload_lost"


def test_a_lost_order_or_answer_delays_its_own_job_only() -> None:
    cluster = ToyCluster()
    deaf, good = cluster.worker(credits=1), cluster.worker(credits=1)
    jobs = [cluster.submit(f"job{number}") for number in range(6)]
    lost = deaf.next()
    deaf.cut = True
    cluster.finish()
    assert states(cluster, *[job for job in jobs if job != lost]) == ["done"] * 5
    cluster.pass_time(6, beating=[good])
    cluster.finish()
    assert cluster.outcome(lost).state == "done"
    deaf.done(lost)
    deaf.cut = False
    for late in deaf.unheard:
        deaf.say(late)
    assert [len(cluster.outcomes[job]) for job in jobs] == [1] * 6, "a late answer is no second one"


def test_every_message_of_a_task_says_whose_it_is() -> None:
    for kind in (Task, Stepped, Checkpointed, TaskDone, Failed):
        required = {field.name for field in msgspec.structs.fields(kind) if field.required}
        assert required >= {"job", "stage", "attempt"}, kind
    assert {field.name for field in msgspec.structs.fields(Busy) if field.required} >= {"job", "stage"}
    cluster = ToyCluster()
    worker = cluster.worker(credits=3)
    for job in ("a", "b"):
        cluster.submit(job)
    task = worker.held["a"]
    for changes in ({"attempt": task.attempt - 1}, {"stage": "decode"}, {"job": "nobody's"}):
        said = {"job": "a", "stage": task.stage, "attempt": task.attempt, **changes}
        worker.say(Failed(**said, code="error", message="of another time"))
    assert cluster.coordinator.job("a").failures == []  # type: ignore[union-attr]
    settle(cluster)
    assert states(cluster, "a", "b") == ["done", "done"]


def test_a_job_cancelled_while_it_runs_does_not_complete_and_ends_alone() -> None:
    cluster = ToyCluster()
    worker = cluster.worker(credits=5)
    jobs = [cluster.submit(f"job{number}") for number in range(5)]
    attempt = worker.held["job2"].attempt
    assert cluster.coordinator.cancel("job2")
    assert "job2" not in worker.held, "its worker is told at once"
    late = TaskDone(
        job="job2", stage="encode", attempt=attempt, descriptor=worker.publish(), seconds=1.0, steps=1, peak_bytes=1
    )
    worker.say(late)
    settle(cluster)
    assert states(cluster, *jobs) == ["done", "done", "cancelled", "done", "done"]


# A worker that dies, fails or runs out of memory.


def test_a_worker_that_goes_silent_is_noticed_in_seconds() -> None:
    cluster = ToyCluster()
    frozen, other = cluster.worker(credits=1), cluster.worker(credits=1)
    for job in ("a", "b"):
        cluster.submit(job)
    held = frozen.next()
    frozen.cut = True
    before = cluster.clock.now
    while not cluster.dismissed:
        cluster.pass_time(0.5, beating=[other])
    assert cluster.dismissed == [("w0", "silent")] and cluster.clock.now - before <= 6
    frozen.alive = False
    cluster.finish()
    assert cluster.outcome(held).state == "done"


def test_many_requests_that_fail_in_encode_leave_it_all_its_slots() -> None:
    cluster = ToyCluster(Limits(max_queue=300))
    worker = cluster.worker(credits=2)
    bad = [cluster.submit(f"bad{number}") for number in range(100)]
    good = cluster.submit("good")
    for _ in bad:
        worker.fail(worker.next(), "invalid_request", field="prompt")
    settle(cluster)
    assert states(cluster, *bad) == ["failed"] * 100 and cluster.outcome(good).state == "done"
    assert {failure.field for job in bad for failure in cluster.outcome(job).failures} == {"prompt"}


def test_a_failure_among_tasks_that_run_together_is_one_tasks() -> None:
    cluster = ToyCluster()
    worker = cluster.worker(credits=4)
    jobs = [cluster.submit(f"job{number}") for number in range(4)]
    worker.fail("job1", "error")
    assert set(worker.held) == {"job0", "job2", "job3"}
    worker.prove()
    assert set(worker.held) == set(jobs), "once more, as there is no other worker"
    worker.fail("job1", "error")
    worker.prove()
    settle(cluster)
    assert states(cluster, *jobs) == ["done", "failed", "done", "done"]
    for job in ("job0", "job2", "job3"):
        assert cluster.coordinator.job(job).attempts == [1, 1, 1]  # type: ignore[union-attr]


def test_out_of_memory_leaves_nobody_waiting_and_its_worker_proves_itself_before_it_gets_more() -> None:
    cluster = ToyCluster()
    worker = cluster.worker(credits=1)
    hungry, other = cluster.submit("hungry"), cluster.submit("other")
    for _ in range(2):
        worker.fail(hungry, "not_enough_memory")
        assert worker.held == {} and worker.to_prove == 1, "what it computes now may be wrong"
        worker.prove()
        while worker.held and worker.next() != hungry:
            worker.done(worker.next())
    settle(cluster)
    assert states(cluster, hungry, other) == ["failed", "done"]
    assert cluster.outcome(hungry).failures[-1].code == "not_enough_memory"


def test_a_worker_that_is_no_longer_sound_gets_nothing_more() -> None:
    cluster = ToyCluster()
    ill, sound = cluster.worker(credits=1), cluster.worker(credits=1)
    for job in ("a", "b", "c"):
        cluster.submit(job)
    ill.fail(ill.next(), "error")
    ill.prove(healthy=False)
    assert cluster.dismissed == [("w0", "unhealthy")]
    ill.alive = False
    settle(cluster)
    assert states(cluster, "a", "b", "c") == ["done"] * 3 and not sound.held


def test_jobs_run_in_parallel_on_replicas() -> None:
    cluster = ToyCluster()
    replicas = [cluster.worker("denoise", credits=4) for _ in range(3)]
    rest = cluster.worker("encode", "decode", credits=4)
    for number in range(3):
        cluster.submit(f"job{number}")
    while rest.held:
        rest.done(rest.next())
    assert [len(worker.held) for worker in replicas] == [1, 1, 1]
    settle(cluster)


def test_a_damaged_transfer_is_tried_again_and_counted() -> None:
    cluster = ToyCluster()
    worker: ToyWorker = cluster.worker(credits=1)
    job = cluster.submit("job")
    worker.done(job)
    worker.fail(job, "payload_damaged", lost="payload", damaged=True)
    settle(cluster)
    assert cluster.outcome(job).state == "done"
    totals = cluster.coordinator.status().totals
    assert (totals.digest_failures, totals.retries) == (1, 1) and worker.to_prove == 0


# Payloads.


@pytest.fixture(params=["memfd", "tcp"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[Exchange, Exchange]]:
    """A producer's exchange and a consumer's, with a pool of 1 MiB that may grow to 16."""
    settings = TransferSettings(pool_bytes=MIB, budget_bytes=16 * MIB, routes=(request.param,), stall_seconds=30.0)
    producer, consumer = Exchange(settings), Exchange(settings)
    yield producer, consumer
    consumer.close()
    producer.close()


def hand_over(producer: Exchange, consumer: Exchange, tensor: torch.Tensor) -> int:
    """Sends a tensor, sees that it arrived, releases it; returns the bytes that travelled."""
    kept = producer.publish(Payload({"x": tensor}))
    fetched = consumer.fetch(ticket_for(kept, producer.secret))
    assert torch.equal(fetched.payload.values["x"], tensor)
    travelled = fetched.bytes
    fetched.close()
    producer.release(kept.payload)
    return travelled


def test_only_used_bytes_travel_and_recycled_buffers_keep_their_size(ends: tuple[Exchange, Exchange]) -> None:
    whole = ROWS.repeat(4 * MIB // len(ROWS))
    assert hand_over(*ends, whole) >= 4 * MIB, "larger than the pool, and it passes"
    assert hand_over(*ends, whole[:1000]) < 4096, "a view's own bytes, not those that it looks at"
    assert hand_over(*ends, whole[::1024]) < 8192
    for _ in range(8):
        hand_over(*ends, whole)
        hand_over(*ends, whole[:10])
    stats = ends[0].stats()
    assert (stats.kept, stats.kept_bytes) == (0, 0) and stats.pool_bytes <= 16 * MIB


def test_what_could_not_be_sent_is_not_announced_and_stale_memory_is_never_read(
    ends: tuple[Exchange, Exchange],
) -> None:
    producer, consumer = ends
    with pytest.raises(NotEnoughMemory):
        producer.publish(Payload({"x": torch.zeros(32 * MIB, dtype=torch.uint8)}))
    assert producer.stats().kept == 0
    old = producer.publish(Payload({"x": torch.full((1000,), 1)}))
    ticket = ticket_for(old, producer.secret)
    producer.release(old.payload)
    new = producer.publish(Payload({"x": torch.full((1000,), 2)}))
    with pytest.raises(PayloadLost):
        consumer.fetch(ticket)
    forged = msgspec.structs.replace(new, payload=old.payload, generation=old.generation)
    with pytest.raises(TriptychError):
        consumer.fetch(ticket_for(forged, producer.secret))
    assert hand_over(producer, consumer, torch.full((1000,), 3)) > 0


def test_exchanges_never_share_a_port() -> None:
    settings = TransferSettings(pool_bytes=MIB, budget_bytes=MIB, routes=("tcp",))
    made = [Exchange(settings) for _ in range(12)]
    try:
        assert len({address.at for exchange in made for address in exchange.addresses}) == 12
    finally:
        for exchange in made:
            exchange.close()


def test_mooncake_is_not_needed() -> None:
    with_defaults = Exchange(TransferSettings(pool_bytes=MIB, budget_bytes=MIB))
    try:
        assert "mooncake" not in {address.route for address in with_defaults.addresses}
    finally:
        with_defaults.close()
    code = "import sys, triptych.transfer; sys.exit(any(name.startswith('mooncake') for name in sys.modules))"
    source = str(Path(__file__).resolve().parents[2] / "src")
    assert subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {source!r}); {code}"]).returncode == 0


class Bomb:
    """What would run, were it ever unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('unpickled')",))


def test_nothing_that_comes_over_a_wire_is_unpickled() -> None:
    data = pickle.dumps(Bomb())
    for wire in (data, base64.b64encode(data), b"\x80" + data):
        with pytest.raises(msgspec.DecodeError):
            decode_from_worker(wire)
        with pytest.raises(TriptychError):
            payload_of(memoryview(wire))

"""The coordinator: what it promises to clients, to workers and to whoever restarts it."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.toy import STAGES, ToyCluster, ToyKeeper, ToyWorker
from triptych.cluster import Coordinator, JobRecord, JobSpec, Kept, Limits, MemoryStore, Outcome, SqliteStore, StageSpec
from triptych.errors import InvalidRequest, NoWorker, QueueFull
from triptych.messages import (
    PROTOCOL,
    Checkpointed,
    Descriptor,
    Failed,
    Hello,
    Ready,
    Refused,
    Run,
    Stepped,
    Stop,
    Task,
    TaskDone,
    ToWorker,
    Welcome,
)

PATIENCE = 30.0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"protocol": 99}, "protocol 99"),
        ({"model_digest": "other"}, "another model"),
        ({"stages": ("upscale",)}, "upscale"),
        ({"stages": ()}, "none"),
    ],
)
def test_a_worker_that_does_not_fit_is_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    cluster = ToyCluster()
    worker = cluster.worker(join=False).join(**changes)
    assert worker.refused is not None and reason in worker.refused.reason and not worker.refused.again
    assert cluster.coordinator.missing(ready=False) == STAGES


def test_a_worker_is_welcomed_with_the_times_that_hold() -> None:
    cluster = ToyCluster(Limits(heartbeat_seconds=0.5, lease_seconds=2.0))
    worker = cluster.worker()
    assert worker.told_of[0] == Welcome(
        coordinator=cluster.coordinator.name, heartbeat_seconds=0.5, lease_seconds=2.0
    )  # fmt: skip
    assert cluster.coordinator.topology == b"topology"


def test_a_second_hello_of_a_ready_worker_means_that_its_line_was_lost() -> None:
    cluster = ToyCluster()
    worker = cluster.worker()
    cluster.submit("a")
    incarnation = worker.incarnation
    cluster.coordinator.hello(hello_of(worker), RecordingLink())
    assert cluster.dismissed == [("w0", "gone")]
    link = RecordingLink()
    cluster.coordinator.hello(hello_of(worker), link)
    assert isinstance(link.sent[0], Welcome), f"{incarnation} may come again"
    cluster.coordinator.hello(hello_of(worker), link)
    assert isinstance(link.sent[1], Welcome), "it repeats its hello until it hears us"


class RecordingLink:
    def __init__(self) -> None:
        self.sent: list[ToWorker] = []
        self.closed = False

    def send(self, message: ToWorker) -> None:
        self.sent.append(message)

    def close(self) -> None:
        self.closed = True


def hello_of(worker: ToyWorker) -> Hello:
    return Hello(
        protocol=PROTOCOL, name=worker.name, incarnation=worker.incarnation, stages=worker.stages,
        model_digest="digest", versions={}, device="cpu", pid=1, host="h", owner=worker.owner, secret=worker.secret,
    )  # fmt: skip


class BrittleStore(MemoryStore):
    """Takes nothing while `full`."""

    full = False

    def put(self, record: JobRecord) -> None:
        if self.full:
            raise OSError("no space left on device")
        super().put(record)


def test_what_the_store_does_not_take_was_not_accepted() -> None:
    store = BrittleStore()
    cluster = ToyCluster(store=store)
    worker = cluster.worker()
    store.full = True
    with pytest.raises(OSError, match="no space"):
        cluster.submit("a")
    assert not worker.held and cluster.coordinator.job("a") is None
    store.full = False
    cluster.submit("a")
    assert store.get("a") is not None


def test_a_job_that_ends_while_the_store_is_full_has_ended_and_is_written_later() -> None:
    store = BrittleStore()
    cluster = ToyCluster(store=store)
    cluster.worker()
    cluster.submit("a")
    store.full = True
    cluster.finish()
    record, stored = cluster.coordinator.job("a"), store.get("a")
    assert record is not None and record.state == "done" and stored is not None and stored.state == "queued"
    store.full = False
    cluster.pass_time(11.0)
    stored = store.get("a")
    assert stored is not None and stored.state == "done"


def test_a_restarted_coordinator_finishes_everything_and_takes_up_what_was_done_meanwhile() -> None:
    cluster = ToyCluster()
    encode, denoise, _ = (cluster.worker(stage, credits=1) for stage in STAGES)
    for job in ("a", "b", "c"):
        cluster.submit(job)
    encode.done("a")
    denoise.cut = True
    denoise.done("a")
    encode.held.clear()
    cluster.restart()
    record = cluster.coordinator.job("a")
    assert record is not None and record.stage == 2, "its denoising is not done again"
    cluster.pass_time(6.0)
    cluster.finish()
    assert cluster.states() == {"done": 3} and cluster.leaks() == []
    record = cluster.coordinator.job("a")
    assert record is not None and record.attempts == [1, 1, 1]


def test_a_file_carries_everything_over_a_restart(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "jobs.sqlite")
    cluster = ToyCluster(store=store)
    encode, denoise, _ = (cluster.worker(stage, credits=1) for stage in STAGES)
    cluster.submit("a", priority=3, client="x", request={"prompt": "a red apple"})
    encode.done("a")
    denoise.checkpoint("a", 2)
    denoise.die()
    before = cluster.coordinator.job("a")
    store.close()
    cluster.store = SqliteStore(tmp_path / "jobs.sqlite")
    cluster.restart()
    assert cluster.coordinator.job("a") == before and before is not None and before.alone
    cluster.pass_time(6.0)
    worker = cluster.worker("denoise")
    assert worker.held["a"].checkpoint is not None
    cluster.finish()
    assert cluster.outcome("a").state == "done" and cluster.leaks() == []
    cluster.store.close()


def test_a_restored_job_whose_worker_does_not_come_back_is_done_again() -> None:
    cluster = ToyCluster()
    encode = cluster.worker("encode")
    cluster.submit("a")
    encode.done("a")
    encode.die(notice=False)
    cluster.restart()
    cluster.worker()
    cluster.finish()
    assert not cluster.outcomes["a"], "its worker may come back"
    cluster.pass_time(6.0)
    cluster.finish()
    assert cluster.outcome("a").state == "done"


def test_a_restored_job_keeps_its_deadline_and_its_priority() -> None:
    cluster = ToyCluster()
    cluster.submit("a", deadline=20.0)
    cluster.submit("b", priority=5)
    cluster.clock.now += 10
    cluster.restart()
    cluster.pass_time(6.0)
    assert cluster.coordinator.position("b") == 0
    cluster.pass_time(5.0)
    assert cluster.outcome("a").failures[-1].code == "deadline"


def test_a_watcher_hears_each_unit_once_and_then_the_outcome() -> None:
    cluster = ToyCluster()
    worker = cluster.worker()
    cluster.submit("a")
    worker.step("a", 1)
    worker.fail("a")
    worker.prove()
    worker.step("a", 1)
    worker.step("a", 2)
    cluster.finish()
    assert [(event.stage, event.step) for event in cluster.progress["a"]] == [("encode", 1), ("encode", 2)]
    late: list[Stepped | Outcome] = []
    cluster.coordinator.watch("a", late.append)
    assert late == cluster.outcomes["a"]
    with pytest.raises(InvalidRequest, match="job"):
        cluster.coordinator.watch("unknown", late.append)


def test_a_watcher_may_call_the_coordinator_and_may_fail() -> None:
    cluster = ToyCluster()
    worker = cluster.worker()
    cluster.submit("a")
    heard: list[str] = []

    def watch(event: Stepped | Outcome) -> None:
        heard.append(type(event).__name__)
        cluster.coordinator.cancel("a")
        raise ValueError("a listener of no care")

    stop = cluster.coordinator.watch("a", watch)
    unheard = cluster.coordinator.watch("a", lambda event: heard.append("no"))
    unheard()
    worker.step("a")
    assert heard == ["Stepped", "Outcome"] and cluster.outcome("a").state == "cancelled"
    stop()


def test_whoever_is_told_of_a_lost_worker_may_ask_from_another_thread() -> None:
    cluster = ToyCluster()
    answers: queue.SimpleQueue[int] = queue.SimpleQueue()

    def ask(*_: object) -> None:
        thread = threading.Thread(target=lambda: answers.put(len(cluster.coordinator.status().workers)))
        thread.start()
        thread.join(PATIENCE)

    cluster.coordinator = Coordinator(STAGES, store=cluster.store, keeper=cluster.keeper, dismissed=ask)
    cluster.worker().die()
    assert answers.get(timeout=PATIENCE) == 0


def test_pictures_are_offered_with_the_task_and_their_loss_fails_the_job() -> None:
    cluster = ToyCluster()
    worker = cluster.worker()
    cluster.keeper.kept["a"] = {"pictures"}
    cluster.submit("a", pictures="a/pictures")
    assert worker.held["a"].pictures is not None
    worker.done("a")
    assert worker.held["a"].pictures is None, "only encode asked for them"
    cluster.submit("b", pictures="b/pictures")
    assert cluster.outcome("b").failures[-1].code == "payload_lost" and "b" not in worker.held
    cluster.finish()
    assert cluster.keeper.kept["a"] == {"result"}


def test_only_the_last_stage_is_told_of_the_files() -> None:
    cluster = ToyCluster()
    worker = cluster.worker()
    cluster.submit("a", raw=True, exact=True, preview=True)
    assert not worker.held["a"].raw and worker.held["a"].exact and worker.held["a"].preview
    worker.done("a")
    worker.done("a")
    assert worker.held["a"].raw


@pytest.mark.parametrize("keep", [False, True])
def test_jobs_that_are_given_up_fail_for_whoever_waits(keep: bool) -> None:
    cluster = ToyCluster()
    worker = cluster.worker("encode", credits=1)
    cluster.submit("running")
    cluster.submit("waiting")
    worker.die()
    cluster.coordinator.give_up("every process has ended", keep=keep)
    for job in cluster.submitted:
        (outcome,) = cluster.outcomes[job]
        assert (outcome.state, outcome.failures[-1].code) == ("failed", "no_worker")
    kept = {"running": 1, "queued": 1} if keep else {"failed": 2}
    assert {state: count for state, count in cluster.coordinator.status().jobs.items() if count} == kept


def test_who_asks_what_is_missing_waits_for_nobody() -> None:
    cluster = ToyCluster()
    cluster.worker("encode")
    with cluster.coordinator._lock, ThreadPoolExecutor(1) as pool:
        assert pool.submit(cluster.coordinator.missing).result(PATIENCE) == ("denoise", "decode")


def test_closing_ends_the_wait_for_jobs_that_will_not_end() -> None:
    cluster = ToyCluster()
    cluster.submit("a")
    done: queue.SimpleQueue[bool] = queue.SimpleQueue()
    waiter = threading.Thread(target=lambda: done.put(cluster.coordinator.drain(100 * PATIENCE)))
    waiter.start()
    cluster.coordinator.close()
    assert done.get(timeout=PATIENCE) is False
    waiter.join(PATIENCE)


def test_draining_takes_no_more_and_waits_for_what_there_is() -> None:
    cluster = ToyCluster()
    worker = cluster.worker()
    cluster.submit("a")
    assert not cluster.coordinator.drain(timeout=0.01)
    with pytest.raises(NoWorker, match="shutting down"):
        cluster.submit("b")
    done: queue.SimpleQueue[bool] = queue.SimpleQueue()
    waiter = threading.Thread(target=lambda: done.put(cluster.coordinator.drain(PATIENCE)))
    waiter.start()
    cluster.finish()
    assert done.get(timeout=PATIENCE)
    waiter.join(PATIENCE)
    cluster.coordinator.close()
    cluster.coordinator.close()
    assert isinstance(worker.told_of[-1], Stop)
    assert worker.join().refused is not None


def test_closing_leaves_unfinished_jobs_in_the_store() -> None:
    cluster = ToyCluster()
    worker = cluster.worker()
    cluster.submit("a")
    cluster.coordinator.close(stop_workers=False)
    worker.done("a")
    assert not any(isinstance(message, Stop) for message in worker.told_of)
    assert [record.spec.id for record in cluster.store.unfinished()] == ["a"]


def test_require_waits_until_the_stages_are_loaded() -> None:
    cluster = ToyCluster()
    assert cluster.coordinator.require(("encode", "denoise"), timeout=0.01) == ("encode", "denoise")
    loading = cluster.worker(join=False).join(ready=False)
    assert cluster.coordinator.missing() == STAGES and cluster.coordinator.missing(ready=False) == ()
    thread = threading.Thread(target=loading.ready)
    thread.start()
    assert cluster.coordinator.require(STAGES, PATIENCE) == ()
    thread.join(PATIENCE)


def test_old_jobs_expire_by_age_and_by_size_and_the_keeper_drops_them() -> None:
    cluster = ToyCluster(Limits(retention_seconds=60.0, retention_bytes=250))
    cluster.worker()
    for job in ("a", "b", "c", "d"):
        cluster.submit(job)
        cluster.finish()
        cluster.clock.now += 1
    cluster.pass_time(11.0)
    assert sorted(cluster.keeper.kept) == ["c", "d"] and cluster.coordinator.job("b") is None
    cluster.pass_time(61.0)
    assert not cluster.keeper.kept and cluster.coordinator.jobs() == []


def test_the_status_tells_what_there_is() -> None:
    cluster = ToyCluster()
    worker = cluster.worker("encode", credits=1, slot="encode-0")
    cluster.submit("a")
    cluster.submit("b")
    worker.step("a", seconds=0.25)
    worker.beat("a", seconds=0.5)
    cluster.clock.now += 2
    status = cluster.coordinator.status()
    encode, one = status.stages[0], status.workers[0]
    assert (encode.waiting, encode.running, encode.workers, encode.unit_seconds) == (1, 1, 1, 0.25)
    assert (one.name, one.slot, one.state, one.tasks, one.last_seen) == ("w0", "encode-0", "busy", 1, 2.0)
    assert status.missing == ("denoise", "decode") and status.jobs["queued"] == 1 and status.jobs["running"] == 1
    worker.done("a")
    assert cluster.coordinator.status().stages[0].per_minute == 1.0


def test_jobs_are_listed_newest_first_by_client_and_by_their_present_state() -> None:
    cluster = ToyCluster()
    cluster.submit("a", client="x")
    cluster.submit("b", client="y")
    worker = cluster.worker("encode", credits=1)
    cluster.coordinator.cancel("b")
    cluster.submit("c", client="x")

    def ids(**query: Any) -> list[str]:
        return [record.spec.id for record in cluster.coordinator.jobs(**query)]

    assert ids() == ["c", "b", "a"] and ids(limit=1) == ["c"] and ids(before="c") == ["b", "a"]
    assert ids(client="x") == ["c", "a"] and ids(states=["cancelled"]) == ["b"]
    assert ids(states=["running"]) == ["a"] and ids(states=["queued"]) == ["c"] and worker.held
    assert ids(states=["running"], limit=1) == ["a"], "the store has it as queued, like the younger one"


def test_a_record_once_given_does_not_change() -> None:
    cluster = ToyCluster()
    cluster.submit("a")
    before = cluster.coordinator.job("a")
    cluster.worker("encode").fail("a")
    assert before is not None and not before.failures and before.attempts == [0, 0, 0] and before.state == "queued"


def test_the_memory_store_is_bounded_and_says_what_it_let_go() -> None:
    store = MemoryStore(max_ended=2)
    for number in range(4):
        spec = JobSpec(id=f"j{number}", stages=(StageSpec(stage="encode", fields={}),), seed=1)
        store.put(JobRecord(spec=spec, state="done", submitted=number, ended=number))
    assert [record.spec.id for record in store.list()] == ["j3", "j2"]
    assert [record.spec.id for record in store.expire(3.0)] == ["j0", "j1", "j2"]
    assert store.unfinished() == [] and store.get("j3") is not None


class ThreadWorker:
    """A worker on a thread of its own, as in one process: three units per task."""

    def __init__(self, coordinator: Coordinator, name: str, owners: dict[str, set[str]]) -> None:
        self.inbox: queue.SimpleQueue[ToWorker] = queue.SimpleQueue()
        self.coordinator, self.name = coordinator, name
        self.kept = owners.setdefault(name, set())
        self.thread = threading.Thread(target=self.run, name=name)
        self.thread.start()

    def send(self, message: ToWorker) -> None:
        self.inbox.put(message)

    def close(self) -> None: ...

    def run(self) -> None:
        self.coordinator.hello(
            Hello(
                protocol=PROTOCOL, name=self.name, incarnation=self.name, stages=STAGES, model_digest="", versions={},
                device="cpu", pid=1, host="h", owner=self.name, secret=b"s" * 16,
            ),
            self,
        )  # fmt: skip
        each = dict.fromkeys(STAGES, 2)
        self.say(Ready(topology=b"", capacity=each, credits=each, weights={}))
        while not isinstance(message := self.inbox.get(timeout=PATIENCE), Stop | Refused):
            if isinstance(message, Run):
                self.do(message.task)

    def do(self, task: Task) -> None:
        here = {"job": task.job, "stage": task.stage, "attempt": task.attempt}
        for step in (1, 2, 3):
            self.say(Stepped(**here, step=step, steps=3, seconds=step * 0.001))
        payload = f"{self.name}/{task.job}/{task.stage}/{task.attempt}"
        descriptor = Descriptor(payload=payload, generation=1, head=1, body=1, owner=self.name, addresses=())
        self.say(TaskDone(**here, descriptor=descriptor, seconds=0.003, steps=3, peak_bytes=0))

    def say(self, message: Any) -> None:
        self.coordinator.hear(self.name, message)


class KeepAll(ToyKeeper):
    def keep(self, job: str, what: str, descriptor: Descriptor, secret: bytes, done: Any) -> None:
        done(Kept(name=f"{job}/{what}"))


def test_many_threads_at_once_lose_nothing_and_tell_everything_in_order() -> None:
    cluster = ToyCluster()
    coordinator = Coordinator(STAGES, store=MemoryStore(), keeper=KeepAll(cluster))
    owners: dict[str, set[str]] = {}
    workers = [ThreadWorker(coordinator, f"t{number}", owners) for number in range(3)]
    heard: dict[str, list[Stepped | Outcome]] = {}

    def submit(client: int) -> None:
        for number in range(40):
            job = f"c{client}-{number}"
            heard[job] = []
            stages = tuple(StageSpec(stage=stage, fields={}) for stage in STAGES)
            coordinator.submit(JobSpec(id=job, stages=stages, seed=1, client=str(client)))
            coordinator.watch(job, heard[job].append)

    clients = [threading.Thread(target=submit, args=(client,)) for client in range(3)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(PATIENCE)
    assert coordinator.drain(PATIENCE)
    coordinator.close()
    for worker in workers:
        worker.thread.join(PATIENCE)
    for events in heard.values():
        *steps, outcome = events
        assert isinstance(outcome, Outcome) and outcome.state == "done"
        places = [(STAGES.index(one.stage), one.step) for one in steps if isinstance(one, Stepped)]
        assert places == sorted(set(places)) and len(places) == len(steps)


def test_a_new_job_of_an_old_id_is_not_taken_for_it_by_late_messages() -> None:
    cluster = ToyCluster()
    worker = cluster.worker()
    cluster.submit("a", seed=1)
    old = worker.held["a"]
    assert cluster.coordinator.forget("a")
    cluster.submit("a", seed=2)
    late = {"job": "a", "stage": old.stage, "attempt": old.attempt}
    worker.say(Stepped(**late, step=1, steps=4, seconds=0.1))
    worker.say(Checkpointed(**late, step=1, descriptor=worker.publish()))
    worker.say(Failed(**late, code="error", message="of the old one"))
    worker.say(TaskDone(**late, descriptor=worker.publish(), seconds=1.0, steps=1, peak_bytes=0))
    record = cluster.coordinator.job("a")
    assert record is not None and (record.stage, record.finished, record.failures) == (0, [], [])
    assert worker.held["a"].seed == 2 and not cluster.progress["a"]
    cluster.finish()
    assert cluster.outcome("a").state == "done" and cluster.leaks() == []


def test_attempts_of_a_restored_job_count_on() -> None:
    cluster = ToyCluster()
    worker = cluster.worker()
    cluster.submit("a")
    task = worker.held["a"]
    worker.cut = True
    worker.done("a")
    cluster.restart()
    record = cluster.coordinator.job("a")
    assert record is not None and record.stage == 1 and record.attempts[0] == 1, "what it did meanwhile was taken up"
    assert record.mark + 1 == task.attempt


@pytest.mark.parametrize("ends", ["done", "failed"])
def test_an_id_is_free_once_nothing_of_the_old_job_is_being_fetched(ends: str) -> None:
    cluster = ToyCluster()
    encode, denoise, decode = (cluster.worker(stage) for stage in STAGES)
    cluster.keeper.at_once = False
    cluster.submit("a")
    encode.done("a")
    if ends == "done":
        denoise.done("a")
        decode.done("a")
    else:
        denoise.fail("a", "invalid_request")
    (what,) = (what for _, what, _, _ in cluster.keeper.waiting)
    assert what == ("result" if ends == "done" else "input")
    assert cluster.coordinator.forget("a")
    with pytest.raises(QueueFull, match="this id"):
        cluster.submit("a")
    cluster.keeper.settle()
    assert not cluster.keeper.kept.get("a"), "nobody asks for it any more"
    cluster.keeper.at_once = True
    cluster.submit("a")
    assert list(encode.held) == ["a"]
    cluster.finish()
    assert cluster.outcome("a").state == "done" and cluster.leaks() == []


def test_the_input_of_a_failed_job_stays_while_the_job_is_known() -> None:
    cluster = ToyCluster()
    encode, denoise, _ = (cluster.worker(stage) for stage in STAGES)
    cluster.keeper.at_once = False
    cluster.submit("a")
    encode.done("a")
    denoise.fail("a", "invalid_request")
    cluster.keeper.settle()
    assert cluster.keeper.kept["a"] == {"input"}


def test_what_the_store_does_not_remove_is_not_forgotten() -> None:
    class Stuck(BrittleStore):
        def remove(self, job: str) -> bool:
            if self.full:
                raise OSError("no space left on device")
            return super().remove(job)

    store = Stuck()
    cluster = ToyCluster(store=store)
    cluster.worker()
    cluster.submit("a")
    store.full = True
    cluster.finish()
    with pytest.raises(OSError, match="no space"):
        cluster.coordinator.forget("a")
    record = cluster.coordinator.job("a")
    assert record is not None and record.state == "done", "it does not run once more"
    store.full = False
    assert cluster.coordinator.forget("a") and cluster.coordinator.job("a") is None

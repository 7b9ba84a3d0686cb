"""Random clusters under random faults: whatever happens, every job ends once and nothing is left behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.cluster.toy import STAGES, ToyCluster, ToyWorker
from triptych.cluster import Limits
from triptych.errors import QueueFull

SHAPES = (STAGES, ("encode",), ("denoise",), ("decode",), ("encode", "denoise"), ("denoise", "decode"))
MAX_QUEUE = 12
POISON = "poison"


class Cluster(RuleBasedStateMachine):
    """Rules are what users, workers, the network and time do."""

    @initialize(at_once=st.booleans(), ahead=st.integers(0, 4))
    def begin(self, at_once: bool, ahead: int) -> None:
        self.cluster = ToyCluster(
            Limits(max_queue=MAX_QUEUE, ahead=ahead, stalled_seconds=40, prove_seconds=30, time_limit_seconds=1e6)
        )
        self.cluster.keeper.at_once = at_once
        self.deaths_by_poison: dict[str, int] = {}
        for stage in STAGES:
            self.cluster.worker(stage)

    # Users.

    @rule(client=st.sampled_from("xy"), priority=st.integers(0, 2), deadline=st.sampled_from([None, 30.0]))
    def submit(self, client: str, priority: int, deadline: float | None) -> None:
        job = f"j{next(self.cluster.numbers)}"
        try:
            self.cluster.submit(job, client=client, priority=priority, deadline=deadline)
        except QueueFull:
            waiting = [one for one in self.cluster.coordinator.jobs(limit=10_000) if one.started is None]
            assert sum(one.state == "queued" for one in waiting) >= MAX_QUEUE

    @precondition(lambda self: self.cluster.submitted)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.cluster.submitted))
        ended = bool(self.cluster.outcomes[job])
        assert self.cluster.coordinator.cancel(job) != ended

    @precondition(lambda self: sum(job.startswith(POISON) for job in self.cluster.submitted) < 2)
    @rule()
    def submit_poison(self) -> None:
        with contextlib.suppress(QueueFull):
            self.cluster.submit(f"{POISON}{next(self.cluster.numbers)}")

    # Workers.

    @precondition(lambda self: len(self.living()) < 6)
    @rule(stages=st.sampled_from(SHAPES), credits=st.integers(1, 3))
    def start_worker(self, stages: tuple, credits: int) -> None:
        self.cluster.worker(*stages, credits=credits)

    def living(self) -> list[ToyWorker]:
        return [worker for worker in self.cluster.workers if worker.alive]

    def working(self) -> list[ToyWorker]:
        return [worker for worker in self.living() if worker.held]

    def with_one(self, data: st.DataObject, act: Callable[[ToyWorker, str], None]) -> None:
        """Does something to a task that some worker holds."""
        worker = data.draw(st.sampled_from(self.working()))
        job = data.draw(st.sampled_from(sorted(worker.held)))
        if job.startswith(POISON):
            worker.die()
        else:
            act(worker, job)

    @precondition(lambda self: self.working())
    @rule(data=st.data())
    def work(self, data: st.DataObject) -> None:
        self.with_one(data, ToyWorker.done)

    @precondition(lambda self: self.working())
    @rule(data=st.data(), step=st.integers(1, 3))
    def work_a_little(self, data: st.DataObject, step: int) -> None:
        def act(worker: ToyWorker, job: str) -> None:
            worker.step(job, step)
            worker.checkpoint(job, step)

        self.with_one(data, act)

    @precondition(lambda self: self.working())
    @rule(data=st.data(), code=st.sampled_from(["error", "not_enough_memory", "invalid_request"]))
    def fail(self, data: st.DataObject, code: str) -> None:
        self.with_one(data, lambda worker, job: worker.fail(job, code))

    @precondition(lambda self: self.working())
    @rule(data=st.data(), damaged=st.booleans())
    def fetch_in_vain(self, data: st.DataObject, damaged: bool) -> None:
        def act(worker: ToyWorker, job: str) -> None:
            task = worker.held[job]
            lost = "checkpoint" if task.checkpoint else "payload" if task.payload else "pictures"
            worker.fail(job, "payload_damaged" if damaged else "payload_lost", lost=lost, damaged=damaged)

        self.with_one(data, act)

    @rule(healthy=st.sampled_from([True, True, False]))
    def prove(self, healthy: bool) -> None:
        for worker in self.living():
            if worker.to_prove and not worker.held:
                worker.prove(healthy)

    @precondition(lambda self: self.working())
    @rule(data=st.data())
    def hang(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(self.working()))
        worker.beat(worker.next(), seconds=1e5)

    @precondition(lambda self: self.living())
    @rule(data=st.data(), notice=st.booleans())
    def die(self, data: st.DataObject, notice: bool) -> None:
        data.draw(st.sampled_from(self.living())).die(notice)

    @precondition(lambda self: self.living())
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(self.living()))
        if not worker.cut:
            worker.leave()

    @precondition(lambda self: self.living())
    @rule(data=st.data())
    def cut(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.living())).cut = True

    @rule(keeps=st.booleans())
    def come_back(self, keeps: bool) -> None:
        for worker in self.living():
            dismissed = worker.cut and all(
                status.incarnation != worker.incarnation for status in self.cluster.coordinator.status().workers
            )
            if dismissed or worker.refused is not None:
                worker.cut = False
                worker.held.clear()
                if not keeps:
                    worker.kept.clear()
                worker.join()

    # Time, the keeper, and the coordinator itself.

    @rule(seconds=st.sampled_from([0.5, 3.0, 12.0]))
    def pass_time(self, seconds: float) -> None:
        self.cluster.pass_time(seconds)

    @rule()
    def settle(self) -> None:
        self.cluster.keeper.settle()

    @rule(damage=st.integers(0, 2))
    def damage_results(self, damage: int) -> None:
        self.cluster.keeper.damage = damage

    @rule(results=st.integers(0, 3), whole=st.booleans())
    def restart(self, results: int, whole: bool) -> None:
        for worker in self.living():
            if results and worker.held and not worker.next().startswith(POISON):
                worker.cut = True  # what it makes meanwhile it says to the next coordinator
                worker.done(worker.next()) if whole else worker.checkpoint(worker.next(), 3)
                results -= 1
            worker.held.clear()
        self.cluster.restart()

    # What always holds.

    @invariant()
    def nobody_is_told_nonsense(self) -> None:
        assert self.cluster.wrongs == []

    @invariant()
    def nobody_is_believed_to_have_what_it_has_not(self) -> None:
        believed = {status.incarnation: status.tasks for status in self.cluster.coordinator.status().workers}
        for worker in self.living():
            if not worker.cut and worker.incarnation in believed:
                assert believed[worker.incarnation] == len(worker.held)

    @invariant()
    def nobody_is_overloaded(self) -> None:
        for worker in self.living():
            for stage in worker.stages:
                assert sum(task.stage == stage for task in worker.held.values()) <= worker.credits

    @invariant()
    def nothing_ends_twice(self) -> None:
        assert all(len(outcomes) <= 1 for outcomes in self.cluster.outcomes.values())

    @invariant()
    def suspects_are_alone(self) -> None:
        for worker in self.living():
            records = [self.cluster.coordinator.job(job) for job in worker.held]
            present = [record for record in records if record is not None and record.state == "running"]
            if not worker.cut and worker.refused is None and any(record.alone for record in present):
                assert len(worker.held) == 1

    @invariant()
    def the_queue_is_bounded(self) -> None:
        assert self.cluster.coordinator.status().jobs["queued"] <= MAX_QUEUE

    def teardown(self) -> None:
        """Once the faults stop, everything ends, and nothing is left: no job, no task, no payload."""
        if not hasattr(self, "cluster"):
            return
        cluster = self.cluster
        cluster.keeper.damage, cluster.keeper.at_once = 0, True
        for worker in self.living():
            worker.cut = True
        cluster.pass_time(6.0)
        cluster.pass_time(45.0)
        for worker in self.living():
            worker.cut, worker.to_prove = False, 0
            worker.held.clear()
            worker.join()
        self.run_to_the_end()
        assert all(len(outcomes) == 1 for outcomes in cluster.outcomes.values()), cluster.states()
        assert cluster.leaks() == []
        for job in cluster.submitted:
            record = cluster.coordinator.job(job)
            assert record is not None and record.state == cluster.outcome(job).state
            if job.startswith(POISON):
                assert record.state != "done"

    def run_to_the_end(self) -> None:
        for _ in range(500):
            self.cluster.keeper.settle()
            for stage in STAGES:
                if not any(stage in worker.stages for worker in self.living()):
                    self.cluster.worker(stage)
            busy = self.working()
            if not busy:
                if all(self.cluster.outcomes.values()):
                    return
                self.cluster.pass_time(6.0)
            for worker in busy:
                if any(job.startswith(POISON) for job in worker.held):
                    worker.die()
                elif worker.held:
                    worker.done(worker.next())
        raise AssertionError(f"it does not come to an end: {self.cluster.leaks()}")


Cluster.TestCase.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)  # fmt: skip
TestCluster = Cluster.TestCase

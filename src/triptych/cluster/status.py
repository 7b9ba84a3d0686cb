"""What a cluster looks like at one moment, for people, metrics and tests."""

from __future__ import annotations

import msgspec

from triptych.cluster.measures import Measures
from triptych.cluster.scheduling.live import Member
from triptych.cluster.scheduling.scheduler import Scheduler
from triptych.messages import Busy, CacheUse
from triptych.request import StageName

__all__ = ["StageStatus", "Status", "Totals", "WorkerStatus", "take_status"]


class StageStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One stage: jobs that wait for it, tasks that workers hold, and what it does."""

    stage: StageName
    waiting: int
    running: int
    workers: int
    """that have loaded"""
    credits: int
    """tasks that they take together"""
    done: int
    per_minute: float
    """tasks done within the last 60 s"""
    unit_seconds: float
    """mean of a unit, the newest counting most; 0.0: none yet"""
    task_seconds: float
    """mean from assignment to output; 0.0: none yet"""


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One worker. `state`: loading, idle, busy, proving or draining; `last_seen`: seconds since its last sign of
    life."""

    name: str
    incarnation: str
    slot: str | None
    host: str
    pid: int
    device: str
    stages: tuple[StageName, ...]
    state: str
    tasks: int
    """that it holds now"""
    done: int
    failed: int
    memory_bytes: int
    free_bytes: int
    kept: int
    kept_bytes: int
    weights: dict[StageName, int]
    last_seen: float
    busy: Busy | None = None
    dtype: str = ""
    """what most of its weights are held in, as torch names it"""
    caches: tuple[CacheUse, ...] = ()


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """What has happened since the coordinator started."""

    submitted: int
    rejected: int
    done: int
    failed: int
    cancelled: int
    retries: int
    resumes: int
    remade: int
    workers_lost: int
    digest_failures: int
    quarantined: int


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """A whole cluster. `jobs`: by state, the ended ones since the coordinator started; `missing`: stages that no
    worker has loaded; `uptime`: seconds; `fetching`: payloads that the keeper is fetching."""

    coordinator: str
    uptime: float
    stages: tuple[StageStatus, ...]
    workers: tuple[WorkerStatus, ...]
    jobs: dict[str, int]
    totals: Totals
    missing: tuple[StageName, ...]
    fetching: int
    draining: bool
    measures: Measures = Measures()
    max_queue: int = 0
    """jobs that may wait to begin"""


def take_status(
    scheduler: Scheduler, name: str, started: float, now: float, draining: bool, measures: Measures
) -> Status:
    """The status of a scheduler at `now`, by its own clock."""
    counts = scheduler.counts
    jobs = {"queued": 0, "running": 0, "done": counts.done, "failed": counts.failed, "cancelled": counts.cancelled}
    for live in scheduler.jobs.values():
        jobs[live.record.state] += 1
    return Status(
        coordinator=name,
        uptime=now - started,
        stages=tuple(_stage(scheduler, stage, now) for stage in scheduler.stages),
        workers=tuple(_worker(member, now) for member in scheduler.fleet),
        jobs=jobs,
        totals=Totals(**{field: getattr(counts, field) for field in Totals.__struct_fields__}),
        missing=scheduler.missing(ready=True),
        fetching=scheduler.fetching(),
        draining=draining,
        measures=measures,
        max_queue=scheduler.limits.max_queue,
    )


def _stage(scheduler: Scheduler, stage: StageName, now: float) -> StageStatus:
    tally = scheduler.tallies[stage]
    return StageStatus(
        stage=stage,
        waiting=scheduler.waiting(stage),
        running=scheduler.running(stage),
        workers=sum(member.ready for member in scheduler.fleet.with_stage(stage)),
        credits=scheduler.fleet.credits(stage),
        done=tally.done,
        per_minute=tally.per_minute(now),
        unit_seconds=tally.unit_seconds,
        task_seconds=tally.task_seconds,
    )


def _worker(member: Member, now: float) -> WorkerStatus:
    hello, beat = member.hello, member.heartbeat
    return WorkerStatus(
        name=hello.name,
        incarnation=hello.incarnation,
        slot=hello.slot,
        host=hello.host,
        pid=hello.pid,
        device=hello.device,
        stages=hello.stages,
        state=member.state,
        tasks=len(member.running),
        done=member.done,
        failed=member.failed,
        memory_bytes=beat.memory_bytes if beat else 0,
        free_bytes=beat.free_bytes if beat else 0,
        kept=beat.kept if beat else 0,
        kept_bytes=beat.kept_bytes if beat else 0,
        weights=member.weights,
        last_seen=now - member.seen,
        busy=member.busy,
        dtype=hello.dtype,
        caches=beat.caches if beat else (),
    )

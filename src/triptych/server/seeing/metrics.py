"""The server's and its cluster's numbers, as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from triptych.cluster import BOUNDS
from triptych.server.door import Door

if TYPE_CHECKING:
    from triptych.cluster import Measures, Spread, Status, WorkerStatus

__all__ = ["Meters"]


class Meters:
    """One application's numbers: of its requests, counted here, and of its cluster, asked for when they are read."""

    def __init__(self, door: Door) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "triptych_requests", "HTTP requests answered.", ["method", "route", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "triptych_request_seconds", "Seconds from a request to the end of its answer.", ["method", "route"],
            buckets=BOUNDS, registry=self.registry,
        )  # fmt: skip
        self._errors = Counter(
            "triptych_request_errors", "HTTP requests refused or failed, by the error's code.", ["code"],
            registry=self.registry,
        )  # fmt: skip
        ProcessCollector(registry=self.registry)
        self.registry.register(_Cluster(door))

    def count(self, method: str, route: str, status: int, seconds: float, code: str) -> None:
        """A request was answered."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)
        if code:
            self._errors.labels(code).inc()


class _Cluster(Collector):
    def __init__(self, door: Door) -> None:
        self._door = door

    def describe(self) -> Iterable[Metric]:
        return ()  # or a registry would ask for the status to learn the names

    def collect(self) -> Iterator[Metric]:
        found: Status = self._door.status()
        yield from _jobs(found)
        yield from _stages(found)
        yield from _times(found.measures)
        yield from _transfers(found)
        yield from _workers(found)


def _jobs(found: Status) -> Iterator[Metric]:
    totals = found.totals
    states = GaugeMetricFamily("triptych_jobs", "Jobs that have not ended, by state.", labels=["state"])
    for state in ("queued", "running"):
        states.add_metric([state], found.jobs.get(state, 0))
    yield states
    ended = CounterMetricFamily("triptych_jobs_ended", "Jobs that have ended, by how.", labels=["state"])
    for state in ("done", "failed", "cancelled"):
        ended.add_metric([state], getattr(totals, state))
    yield ended
    yield CounterMetricFamily("triptych_jobs_submitted", "Jobs taken.", value=totals.submitted)
    yield CounterMetricFamily("triptych_jobs_rejected", "Jobs refused for want of room.", value=totals.rejected)
    yield CounterMetricFamily("triptych_retries", "Tasks handed out once more.", value=totals.retries)
    yield CounterMetricFamily("triptych_resumes", "Tasks that went on from a checkpoint.", value=totals.resumes)
    yield CounterMetricFamily("triptych_remade", "Inputs of stages produced again.", value=totals.remade)
    quarantined = "Jobs put away because workers died of them."
    yield CounterMetricFamily("triptych_quarantined", quarantined, value=totals.quarantined)
    yield CounterMetricFamily("triptych_workers_lost", "Workers that died or hung.", value=totals.workers_lost)
    yield GaugeMetricFamily("triptych_draining", "1 while no more jobs are taken.", value=found.draining)
    yield GaugeMetricFamily("triptych_uptime_seconds", "Since the coordinator started.", value=found.uptime)


def _stages(found: Status) -> Iterator[Metric]:
    waiting = GaugeMetricFamily("triptych_queue_length", "Jobs that wait for a stage.", labels=["stage"])
    running = GaugeMetricFamily("triptych_tasks_running", "Tasks that workers hold.", labels=["stage"])
    credits = GaugeMetricFamily("triptych_task_slots", "Tasks that workers take at once.", labels=["stage"])
    workers = GaugeMetricFamily("triptych_stage_workers", "Workers that have loaded a stage.", labels=["stage"])
    speed = GaugeMetricFamily(
        "triptych_steps_per_second", "Steps in a second of work of one worker, lately; 0 before the first.",
        labels=["stage"],
    )  # fmt: skip
    for stage in found.stages:
        waiting.add_metric([stage.stage], stage.waiting)
        running.add_metric([stage.stage], stage.running)
        credits.add_metric([stage.stage], stage.credits)
        workers.add_metric([stage.stage], stage.workers)
        speed.add_metric([stage.stage], 1 / stage.unit_seconds if stage.unit_seconds else 0.0)
    yield from (waiting, running, credits, workers, speed)


def _times(measures: Measures) -> Iterator[Metric]:
    waits = "Seconds that a job waited for a stage."
    yield _spreads("triptych_queue_wait_seconds", waits, "stage", measures.waits)
    tasks = "Seconds of a stage's task, from its assignment to its output."
    yield _spreads("triptych_stage_seconds", tasks, "stage", measures.tasks)
    steps = "Seconds of a step: a denoising step, or the whole of a stage that has none."
    yield _spreads("triptych_step_seconds", steps, "stage", measures.units)
    yield _spreads("triptych_job_seconds", "Seconds from submission to end.", "state", measures.jobs)
    rows = "Pictures or clips in denoising steps, a step counted for each: rows per step are these over the steps."
    yield CounterMetricFamily("triptych_step_rows", rows, value=measures.rows)


def _transfers(found: Status) -> Iterator[Metric]:
    transfers = found.measures.transfers
    carried = CounterMetricFamily("triptych_transfer_bytes", "Bytes of payloads fetched.", labels=["route"])
    for route, one in transfers.items():
        carried.add_metric([route], one.bytes)
    yield carried
    seconds = {route: one.spread for route, one in transfers.items()}
    yield _spreads("triptych_transfer_seconds", "Seconds of fetching a payload.", "route", seconds)
    failures = "Transfers whose digest did not match."
    yield CounterMetricFamily("triptych_digest_failures", failures, value=found.totals.digest_failures)
    yield GaugeMetricFamily("triptych_keeper_fetching", "Payloads that the keeper fetches now.", value=found.fetching)


def _workers(found: Status) -> Iterator[Metric]:
    up = GaugeMetricFamily(
        "triptych_worker_up", "1 for a worker that has loaded a stage; 0 while it loads, or once it was lost.",
        labels=["worker", "stage"],
    )  # fmt: skip
    values = {
        (worker.name, stage): float(worker.state != "loading") for worker in found.workers for stage in worker.stages
    }
    absent = {(name, stage): 0.0 for name, stages in found.measures.absent.items() for stage in stages}
    for labels, value in {**absent, **values}.items():
        up.add_metric(labels, value)
    yield up
    workers = {worker.name: worker for worker in found.workers}.values()
    yield _each("triptych_worker_memory_bytes", "Resident, or allocated on the device.", workers, "memory_bytes")
    yield _each("triptych_worker_free_bytes", "Free on the device.", workers, "free_bytes")
    yield _each("triptych_worker_kept_bytes", "Of payloads kept for others.", workers, "kept_bytes")
    yield _each("triptych_worker_tasks", "Tasks that a worker holds.", workers, "tasks")
    weights = GaugeMetricFamily("triptych_worker_weights_bytes", "Of a stage's weights.", labels=["worker", "stage"])
    for worker in workers:
        for stage, size in worker.weights.items():
            weights.add_metric([worker.name, stage], size)
    yield weights
    yield from _caches(workers)


def _caches(workers: Iterable[WorkerStatus]) -> Iterable[Metric]:
    labels = ["worker", "stage", "cache"]
    hits = CounterMetricFamily("triptych_cache_hits", "What was asked of a cache, and there.", labels=labels)
    misses = CounterMetricFamily("triptych_cache_misses", "What was asked of a cache, and not there.", labels=labels)
    for worker in workers:
        for use in worker.caches:
            hits.add_metric([worker.name, use.stage or "", use.cache], use.hits)
            misses.add_metric([worker.name, use.stage or "", use.cache], use.misses)
    return hits, misses


def _each(name: str, text: str, workers: Iterable[WorkerStatus], field: str) -> Metric:
    family = GaugeMetricFamily(name, text, labels=["worker"])
    for worker in workers:
        family.add_metric([worker.name], getattr(worker, field))
    return family


def _spreads(name: str, text: str, label: str, spreads: Mapping[Any, Spread]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=[label])
    for key, spread in spreads.items():
        total, buckets = 0, []
        for bound, count in zip((*map(str, BOUNDS), "+Inf"), spread.counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        family.add_metric([key], buckets, spread.seconds)
    return family

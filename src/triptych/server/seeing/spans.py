"""Jobs as OpenTelemetry traces: one for each job, with a span for each stage's task and each transfer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import Span, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from triptych.cluster import JobRecord, JobSpec, Kept, Observer
from triptych.messages import Failed, TaskDone
from triptych.request import StageName
from triptych.server.seeing.logs import MAX_PROMPT

__all__ = ["Spans", "provider_of", "spans_to"]

EXPORT_SECONDS = 5.0
"""That a collector may take for a batch, and what is left at the end; what it does not take is lost."""


def provider_of(version: str) -> TracerProvider:
    """Where spans are made. What a client's `traceparent` says of sampling is heeded; all else is sampled."""
    resource = Resource({"service.name": "triptych", "service.version": version})
    return TracerProvider(sampler=ParentBased(ALWAYS_ON), resource=resource, shutdown_on_exit=False)


def spans_to(url: str, version: str, model: str, prompts: bool) -> Spans:
    """Spans that go to a collector over HTTP; a URL without a path means its `/v1/traces`."""
    provider = provider_of(version)
    endpoint = url if urlsplit(url).path.strip("/") else url.rstrip("/") + "/v1/traces"
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=EXPORT_SECONDS)))
    return Spans(provider, model, prompts)


@dataclass
class _Job:
    span: Span
    inside: Context
    task: Span | None = None


class Spans(Observer):
    """Makes the spans of jobs from what happens to them, with the times at which it did."""

    def __init__(self, provider: TracerProvider, model: str, prompts: bool) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("triptych")
        self._model = model
        self._prompts = prompts
        self._jobs: dict[str, _Job] = {}

    def assigned(self, spec: JobSpec, stage: StageName, attempt: int, worker: str, waited: float, now: float) -> None:
        """See Observer."""
        job = self._jobs.get(spec.id) or self._begin(spec, _epoch(now - waited))
        self._end_task(job, now, "lost")
        about = {
            "triptych.job": spec.id, "triptych.model": self._model, "triptych.stage": stage,
            "triptych.worker": worker, "triptych.attempt": attempt, "triptych.waited_seconds": waited,
        }  # fmt: skip
        job.task = self._tracer.start_span(stage, job.inside, attributes=about, start_time=_epoch(now))

    def _begin(self, spec: JobSpec, at: int) -> _Job:
        parent = TraceContextTextMapPropagator().extract({"traceparent": spec.trace}, Context())
        about: dict[str, Any] = {
            "triptych.job": spec.id, "triptych.model": self._model, "triptych.workflow": spec.workflow,
        }  # fmt: skip
        if spec.client:
            about["triptych.client"] = spec.client
        if self._prompts:
            about["triptych.prompt"] = str(spec.request.get("prompt", ""))[:MAX_PROMPT]
        span = self._tracer.start_span("job", parent, attributes=about, start_time=at)
        made = self._jobs[spec.id] = _Job(span, set_span_in_context(span, parent))
        return made

    def done(self, worker: str, message: TaskDone, began: float, now: float) -> None:
        """See Observer."""
        job = self._jobs.get(message.job)
        if job is None or job.task is None:
            return
        job.task.set_attributes(
            {
                "triptych.steps": message.steps,
                "triptych.resumed_at": message.resumed_at,
                "triptych.peak_bytes": message.peak_bytes,
            }
        )
        if message.fetched_by is not None:
            about = {"triptych.route": message.fetched_by, "triptych.bytes": message.fetched_bytes}
            inside = set_span_in_context(job.task, job.inside)
            self._transfer(inside, message.job, about, began, began + message.fetched_seconds)
        job.task.end(_epoch(now))
        job.task = None

    def failed(self, worker: str, message: Failed, now: float) -> None:
        """See Observer."""
        if job := self._jobs.get(message.job):
            self._end_task(job, now, message.code)

    def kept(self, job: str, what: str, kept: Kept, now: float) -> None:
        """See Observer."""
        found = self._jobs.get(job)
        if found is not None and kept.fetched_by is not None:
            about = {"triptych.route": kept.fetched_by, "triptych.bytes": kept.fetched_bytes, "triptych.what": what}
            self._transfer(found.inside, job, about, now - kept.fetched_seconds, now)

    def _transfer(self, inside: Context, job: str, about: dict[str, Any], began: float, ended: float) -> None:
        span = self._tracer.start_span(
            "transfer", inside, attributes={"triptych.job": job, **about}, start_time=_epoch(began)
        )
        span.end(_epoch(ended))

    def ended(self, record: JobRecord, now: float) -> None:
        """See Observer."""
        seconds = max((record.ended or record.submitted) - record.submitted, 0.0)
        job = self._jobs.pop(record.spec.id, None) or self._begin(record.spec, _epoch(now - seconds))
        self._jobs.pop(record.spec.id, None)
        self._end_task(job, now, record.state)
        job.span.set_attribute("triptych.state", record.state)
        if record.state == "failed":
            job.span.set_status(StatusCode.ERROR, record.failures[-1].code if record.failures else "failed")
        job.span.end(_epoch(now))

    def _end_task(self, job: _Job, now: float, code: str) -> None:
        """Ends a task that has not ended well."""
        if job.task is not None:
            job.task.set_status(StatusCode.ERROR, code)
            job.task.end(_epoch(now))
            job.task = None

    def close(self) -> None:
        """Sends what is left."""
        self._provider.force_flush(round(EXPORT_SECONDS * 1000))
        self._provider.shutdown()


def _epoch(at: float) -> int:
    """A time of the coordinator's clock as nanoseconds since the epoch."""
    return round((time.time() - time.monotonic() + at) * 1e9)

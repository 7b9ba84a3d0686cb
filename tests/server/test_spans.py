"""Jobs as traces."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from fastapi.testclient import TestClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from tests.cluster.toy import STAGES, ToyCluster
from tests.server.fake import FakeEngine
from triptych.server.seeing.spans import Spans, provider_of, spans_to

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


def spans(exporter: InMemorySpanExporter, prompts: bool = False) -> Spans:
    provider = provider_of("1")
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Spans(provider, "toy", prompts)


def run(cluster: ToyCluster, job: str = "a", **more: Any) -> None:
    cluster.submit(job, client="ann", workflow="text2image", request={"prompt": "a heron"}, **more)
    for worker in cluster.workers:
        cluster.clock.now += 2
        worker.step(job, 1)
        worker.done(job, fetched_by="tcp", fetched_bytes=100, fetched_seconds=0.5, steps=4)


def cluster_of(observer: Spans) -> ToyCluster:
    cluster = ToyCluster(observers=[observer])
    for stage in STAGES:
        cluster.worker(stage)
    return cluster


def named(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name == name]


def about(span: ReadableSpan) -> dict[str, Any]:
    return {name.removeprefix("triptych."): value for name, value in (span.attributes or {}).items()}


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None and span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_a_job_is_one_trace_with_a_span_for_each_stage_and_transfer(exporter: InMemorySpanExporter) -> None:
    run(cluster_of(spans(exporter)))
    found = exporter.get_finished_spans()
    assert sorted(span.name for span in found) == sorted(["job", *STAGES, *["transfer"] * 3])
    assert len({span.context.trace_id for span in found if span.context}) == 1
    (job,) = named(exporter, "job")
    assert about(job) == {"job": "a", "model": "toy", "workflow": "text2image", "client": "ann", "state": "done"}
    assert seconds(job) == pytest.approx(6.0, abs=0.1) and job.status.status_code is StatusCode.UNSET
    (denoise,) = named(exporter, "denoise")
    expected = {"job": "a", "model": "toy", "stage": "denoise", "worker": "w1", "attempt": 1, "steps": 4}
    assert expected.items() <= about(denoise).items() and seconds(denoise) == pytest.approx(2.0, abs=0.1)
    assert denoise.parent is not None and job.context is not None and denoise.parent.span_id == job.context.span_id
    for stage, transfer in zip(STAGES, named(exporter, "transfer"), strict=True):
        (task,) = named(exporter, stage)
        assert transfer.parent is not None and task.context and transfer.parent.span_id == task.context.span_id
        assert about(transfer) == {"job": "a", "route": "tcp", "bytes": 100}
        assert seconds(transfer) == pytest.approx(0.5, abs=0.05) and task.start_time and transfer.start_time
        assert abs(transfer.start_time - task.start_time) < 1e8, "it fetched when it began"


@pytest.mark.parametrize("prompts", [False, True])
def test_prompts_are_in_it_if_the_deployment_says_so(exporter: InMemorySpanExporter, prompts: bool) -> None:
    run(cluster_of(spans(exporter, prompts)))
    said = [span for span in exporter.get_finished_spans() if "heron" in str(span.attributes)]
    assert [span.name for span in said] == (["job"] if prompts else [])


def test_the_requests_own_trace_goes_on(exporter: InMemorySpanExporter) -> None:
    run(cluster_of(spans(exporter)), trace=f"00-{TRACE}-{PARENT}-01")
    (job,) = named(exporter, "job")
    assert job.context and f"{job.context.trace_id:032x}" == TRACE
    assert job.parent and f"{job.parent.span_id:016x}" == PARENT


def test_what_a_client_does_not_sample_is_not_sent(exporter: InMemorySpanExporter) -> None:
    run(cluster_of(spans(exporter)), trace=f"00-{TRACE}-{PARENT}-00")
    assert not exporter.get_finished_spans()


def test_attempts_that_fail_and_are_lost_say_so(exporter: InMemorySpanExporter) -> None:
    observer = spans(exporter)
    cluster = ToyCluster(observers=[observer])
    first, second = cluster.worker(), cluster.worker()
    cluster.submit("a")
    next(worker for worker in (first, second) if worker.held).fail("a", "stage_failed")
    next(worker for worker in (first, second) if worker.held).die()
    left = next(worker for worker in (first, second) if worker.alive)
    left.prove()
    left.fail("a", "invalid_request")
    attempts = named(exporter, "encode")
    assert [(about(one)["attempt"], one.status.description) for one in attempts] == [
        (1, "stage_failed"),
        (2, "lost"),
        (3, "invalid_request"),
    ]
    (job,) = named(exporter, "job")
    assert (job.status.status_code, job.status.description) == (StatusCode.ERROR, "invalid_request")
    assert not observer._jobs, "an ended job is not remembered"


def test_a_job_cancelled_in_the_queue_is_a_trace_too(exporter: InMemorySpanExporter) -> None:
    observer = spans(exporter)
    cluster = ToyCluster(observers=[observer])
    cluster.submit("a")
    cluster.clock.now += 3
    cluster.coordinator.cancel("a")
    (job,) = exporter.get_finished_spans()
    assert about(job)["state"] == "cancelled" and seconds(job) == pytest.approx(3.0, abs=0.1)
    assert not observer._jobs


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-01"),
        (f"cc-{TRACE}-{PARENT}-01-more", f"cc-{TRACE}-{PARENT}-01"),
        (f"ff-{TRACE}-{PARENT}-01", ""),
        (f"00-{'0' * 32}-{PARENT}-01", ""),
        (f"00-{TRACE}-{'0' * 16}-01", ""),
        (f"00-{TRACE.upper()}-{PARENT}-01", ""),
        (f"00-{TRACE}-{PARENT}-0", ""),
        (f"00-{TRACE}-{PARENT}-01x", ""),
        ("x" * 5000, ""),
        ("", ""),
    ],
)
def test_traceparent_is_taken_if_it_is_one(client: TestClient, engine: FakeEngine, given: str, taken: str) -> None:
    answer = client.post("/v1/jobs", json={"prompt": "a"}, headers={"traceparent": given})
    assert answer.status_code == 202
    assert engine.submitted[0][1]["trace"] == taken


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """A little OpenTelemetry collector: its URL and what it was sent."""
    taken: list[tuple[str, bytes]] = []

    class Taker(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            taken.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Taker) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", taken
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("path", "asked"), [("", "/v1/traces"), ("/", "/v1/traces"), ("/otlp/in", "/otlp/in")])
def test_a_collector_gets_them_over_http(collector: tuple[str, list[tuple[str, bytes]]], path: str, asked: str) -> None:
    url, taken = collector
    observer = spans_to(url + path, "1.2", "toy", False)
    cluster = cluster_of(observer)
    run(cluster)
    cluster.coordinator.close()
    (where, body), *more = taken
    request = ExportTraceServiceRequest.FromString(body)
    names = [span.name for one in request.resource_spans for scope in one.scope_spans for span in scope.spans]
    assert where == asked and not more and sorted(names) == sorted(["job", *STAGES, *["transfer"] * 3])
    resource = {one.key: one.value.string_value for one in request.resource_spans[0].resource.attributes}
    assert resource["service.name"] == "triptych" and resource["service.version"] == "1.2"


def test_a_collector_that_is_not_there_delays_no_job() -> None:
    observer = spans_to("http://127.0.0.1:9", "1", "toy", False)
    cluster = cluster_of(observer)
    for number in range(20):
        run(cluster, f"job{number}")
    assert cluster.states() == {"done": 20}
    cluster.coordinator.close()

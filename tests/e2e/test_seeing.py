"""What an operator sees of a real server: metrics, traces, the log; and where results lie."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.commands import PROMPT, Server, run, short_folder, until
from triptych.decode import read_settings

TRACE = "0af7651916cd43dd8448eb211c80319c"
LAYOUT = """
name: seen
workers: [{name: all-of-it, stages: all, threads: 1}]
serve: {settings_in_files: true}
"""


class Collector(BaseHTTPRequestHandler):
    """Takes traces."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        taken: list[bytes] = self.server.taken  # type: ignore[attr-defined]
        taken.append(body)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def collector() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        server.taken = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def server(collector: ThreadingHTTPServer) -> Iterator[Server]:
    """After three jobs, one of them cancelled, and a request for nothing."""
    with short_folder() as folder:
        (folder / "layout.yaml").write_text(LAYOUT)
        words = ["--layout", "layout.yaml", "--log-format", "json", "--artifacts", (folder / "results").as_uri()]
        server = Server(folder, *words, "--otlp", f"http://127.0.0.1:{collector.server_port}")
        try:
            server.client.headers["traceparent"] = f"00-{TRACE}-{'1' * 16}-01"
            jobs = [server.submit(num_inference_steps=2, num_outputs=count)["id"] for count in (1, 2)]
            del server.client.headers["traceparent"]
            left = server.submit(num_inference_steps=50)["id"]
            server.client.delete(f"/v1/jobs/{left}")
            server.jobs = [server.ended(job) for job in [*jobs, left]]  # type: ignore[attr-defined]
            server.client.get("/nowhere?api_key=of-nobody")
            yield server
        finally:
            server.close()


def jobs_of(server: Server) -> list[dict[str, Any]]:
    return server.jobs  # type: ignore[attr-defined]


def test_metrics_after_real_jobs(server: Server) -> None:
    text = server.client.get("/metrics").raise_for_status().text
    found = {
        (sample.name.removeprefix("triptych_"), *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert (found["jobs_ended_total", "done"], found["jobs_ended_total", "cancelled"]) == (2, 1)
    assert found["requests_total", "/v1/jobs", "202", "POST"] == 3
    for stage in ("encode", "denoise", "decode"):
        assert found["stage_seconds_count", stage] >= 2 and found["stage_seconds_sum", stage] > 0
        assert found["worker_up", "all-of-it", stage] == 1
    assert found["step_seconds_count", "decode"] == 2, "one for each job that got there"
    assert found["step_rows_total",] >= 2 * 1 + 2 * 2 and found["steps_per_second", "denoise"] > 0
    assert sum(value for name, value in found.items() if name[0] == "transfer_bytes_total") > 1000
    assert found["worker_memory_bytes", "all-of-it"] > 1e8 and found["process_resident_memory_bytes",] > 1e7
    assert found["job_seconds_count", "done"] == 2


def test_results_lie_where_they_were_sent_and_say_how_they_were_made(server: Server, tmp_path: Path) -> None:
    job = jobs_of(server)[0]
    data = server.picture(job)
    assert data == (server.folder / "results" / job["id"] / "0.png").read_bytes()
    (tmp_path / "made.png").write_bytes(data)
    settings = read_settings(tmp_path / "made.png")
    assert settings.model == "emoji" and settings.request["prompt"] == PROMPT and settings.request["seed"] == 7
    code, _, said = run(server.folder, "generate", "--like", str(tmp_path / "made.png"), "-o", "again.png", "-q")
    assert code == 0, said
    again, made = (Image.open(file) for file in (server.folder / "again.png", io.BytesIO(data)))
    assert again.convert("RGB").tobytes() == made.convert("RGB").tobytes()


def test_ranges_of_what_lies_there(server: Server) -> None:
    where = jobs_of(server)[0]["results"][0]
    whole = server.client.get(where)
    part = server.client.get(where, headers={"range": "bytes=8-15"})
    assert (part.status_code, part.content) == (206, whole.content[8:16])


def test_the_log_is_json_and_tells_no_prompt_and_no_query(server: Server) -> None:
    events = [json.loads(line) for line in server.said.splitlines()]
    assert all({"time", "level", "event", "logger"} <= set(event) for event in events)
    first = jobs_of(server)[0]["id"]
    posted = next(one for one in events if one.get("job") == first and one["event"] == "request")
    assert (posted["method"], posted["route"], posted["status"]) == ("POST", "/v1/jobs", 202)
    (ended,) = [one for one in events if one.get("job") == first and one["event"] == "job ended"]
    assert ended["state"] == "done" and ended["seconds"] > 0
    said = [one["event"] for one in events if one.get("worker") == "all-of-it" and one["logger"] == "triptych.workers"]
    assert any(line.startswith("ready: encode") for line in said)
    assert PROMPT not in server.said and "of-nobody" not in server.said


def spans(collector: ThreadingHTTPServer) -> list[Any]:
    requests = [ExportTraceServiceRequest.FromString(body) for body in list(collector.taken)]  # type: ignore[attr-defined]
    return [
        span
        for request in requests
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def test_the_collector_has_a_trace_of_each_job(server: Server, collector: ThreadingHTTPServer) -> None:
    def about(span: Any) -> dict[str, Any]:
        return {one.key.removeprefix("triptych."): one.value.string_value for one in span.attributes}

    def jobs() -> dict[str, Any]:
        return {about(span)["job"]: span for span in spans(collector) if span.name == "job"}

    wanted = {job["id"] for job in jobs_of(server)}
    until(lambda: wanted <= set(jobs()), lambda: jobs())
    first, second, left = (jobs()[job["id"]] for job in jobs_of(server))
    assert first.trace_id.hex() == second.trace_id.hex() == TRACE != left.trace_id.hex()
    assert about(left)["state"] == "cancelled" and about(first)["state"] == "done"
    inside = [span for span in spans(collector) if about(span).get("job") == jobs_of(server)[0]["id"]]
    assert {"encode", "denoise", "decode", "transfer"} <= {span.name for span in inside}
    assert {about(span)["model"] for span in inside if span.name != "transfer"} == {"emoji"}
    assert all(
        span.end_time_unix_nano >= span.start_time_unix_nano >= first.start_time_unix_nano - 10**7 for span in inside
    )
    assert PROMPT not in str(inside)


def test_nothing_is_left_of_it_once_it_has_ended(server: Server) -> None:
    server.signal()
    assert server.end() == 0, server.said
    assert not list((server.folder / "results").rglob("*.png"))

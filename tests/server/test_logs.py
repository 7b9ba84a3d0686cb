"""The server's log: what is in it, and what never is."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.cluster.toy import ToyCluster
from tests.server.conftest import LOCAL
from tests.server.fake import FakeEngine
from triptych.cluster import Supervisor, WorkerSlot
from triptych.config import ServeSection
from triptych.server import JobLog, KeyRing, create_app, log_formatter
from triptych.server.locks.key_file import ApiKey

SECRET = "sk-0123456789-very-secret-0123456789"
PROMPT = "a heron nobody should read of"


class Lines(logging.Handler):
    """What a log in some format says."""

    def __init__(self, format: str) -> None:
        super().__init__()
        self.setFormatter(log_formatter(format))
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("triptych"):  # the test's own client has things to say, too
            self.lines.append(self.format(record))

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.INFO)
    made: list[Lines] = []

    def start(format: str) -> Lines:
        handler = Lines(format)
        logging.getLogger().addHandler(handler)
        made.append(handler)
        return handler

    yield start
    for handler in made:
        logging.getLogger().removeHandler(handler)


Start = Callable[[str], Lines]


def requests(lines: Lines) -> list[dict[str, Any]]:
    return [event for event in lines.events if event["logger"] == "triptych.access"]


def test_every_request_has_one_line(client: TestClient, log: Start) -> None:
    lines = log("json")
    job = client.post("/v1/jobs", json={"prompt": PROMPT}).json()["id"]
    client.get(f"/v1/jobs/{job}?api_key={SECRET}")
    client.get(f"/v1/jobs/{'0' * 32}")
    client.get(f"/{SECRET}")
    found = requests(lines)
    seen = [(one["method"], one["route"], one["status"], one.get("job"), one.get("code")) for one in found]
    assert seen == [
        ("POST", "/v1/jobs", 202, job, None),
        ("GET", "/v1/jobs/{job}", 200, job, None),
        ("GET", "/v1/jobs/{job}", 404, None, "job_not_found"),
        ("GET", "unknown", 404, None, "not_found"),
    ]
    assert all(one["level"] == "info" and one["event"] == "request" and one["ms"] >= 0 for one in found)
    assert SECRET not in "".join(lines.lines) and PROMPT not in "".join(lines.lines)


def test_what_the_guard_refuses_is_in_it(engine: FakeEngine, log: Start) -> None:
    lines = log("json")
    client = TestClient(create_app(engine, ServeSection(), version="1"), "http://evil.example")
    status = client.get("/health").status_code
    assert status >= 400 and [one["status"] for one in requests(lines)] == [status]


def test_keys_are_told_by_name_alone(engine: FakeEngine, log: Start) -> None:
    lines = log("json")
    keys = KeyRing([ApiKey.of("ann", SECRET, False)])
    client = TestClient(create_app(engine, ServeSection(), version="1", keys=keys), LOCAL)
    client.post("/v1/jobs", json={"prompt": PROMPT}, headers={"authorization": f"Bearer {SECRET}"})
    client.post("/v1/jobs", json={"prompt": PROMPT}, headers={"authorization": f"Bearer {SECRET}x"})
    first, second = requests(lines)
    assert (first["client"], first["status"]) == ("ann", 202)
    assert "client" not in second and (second["status"], second["code"]) == (401, "not_authenticated")
    assert SECRET not in "".join(lines.lines)


def test_wrong_fields_and_bugs_leave_no_prompt(client: TestClient, engine: FakeEngine, log: Start) -> None:
    lines = log("json")
    client.post("/v1/jobs", json={"prompt": PROMPT, "width": PROMPT})
    client.post("/v1/jobs", content=PROMPT, headers={"content-type": "application/json"})
    engine.refuse = ZeroDivisionError("a bug")
    assert client.post("/v1/jobs", json={"prompt": PROMPT}).status_code == 500
    assert [one["status"] for one in requests(lines)] == [422, 422, 500]
    assert PROMPT not in "".join(lines.lines)


def test_the_text_names_the_same(client: TestClient, log: Start) -> None:
    lines = log("text")
    job = client.post("/v1/jobs", json={"prompt": PROMPT}).json()["id"]
    (line,) = [line for line in lines.lines if "triptych.access" in line]
    assert " INFO triptych.access: POST /v1/jobs 202 " in line and line.endswith(f" ms job={job}")


def test_what_comes_from_outside_begins_no_line_of_its_own(log: Start) -> None:
    text, structured = log("text"), log("json")
    try:
        raise ValueError("beneath")
    except ValueError:
        logging.getLogger("triptych.test").exception("one\n2026 ERROR forged\x1b[31m: %s", "two\r\nthree")
    (line,) = text.lines
    first, *rest = line.splitlines()
    assert first.endswith(r"one\n2026 ERROR forged\x1b[31m: two\r\nthree") and rest[0].startswith("Traceback")
    (line,) = structured.lines
    assert "\n" not in line and "ValueError: beneath" in json.loads(line)["traceback"]


@pytest.mark.parametrize("prompts", [False, True])
def test_jobs_ends_and_workers_are_told(log: Start, prompts: bool) -> None:
    lines = log("json")
    cluster = ToyCluster(observers=[JobLog(prompts)])
    worker = cluster.worker("encode", "denoise")
    for job in ("a", "b"):
        cluster.submit(job, client="ann", request={"prompt": PROMPT})
    cluster.clock.now += 2.5
    cluster.coordinator.cancel("a")
    worker.fail("b", "invalid_request")
    worker.die()
    events = lines.events
    assert [one["event"] for one in events] == ["worker in", "job ended", "job ended", "worker out"]
    assert events[0]["worker"] == "w0" and events[3]["worker"] == "w0" and events[3]["reason"] == "gone: killed"
    ended = {one["job"]: one for one in events[1:3]}
    assert (ended["a"]["state"], ended["a"]["client"], ended["a"]["seconds"]) == ("cancelled", "ann", 2.5)
    assert (ended["b"]["state"], ended["b"]["code"], ended["b"]["stage"]) == ("failed", "invalid_request", "encode")
    assert [one.get("prompt") for one in ended.values()] == [PROMPT if prompts else None] * 2
    assert (PROMPT in "".join(lines.lines)) == prompts


def test_workers_lines_come_through_with_their_name(log: Start, tmp_path: Any) -> None:
    lines = log("json")
    folder = tmp_path / "workers"
    supervisor = Supervisor([WorkerSlot("painter", ["/bin/echo", 'loaded "all" in 1.0 s'])], folder)
    supervisor.start()
    try:
        for _ in range(1000):
            if any(one["logger"] == "triptych.workers" for one in lines.events):
                break
            supervisor._stopping.wait(0.01)
    finally:
        supervisor.stop(1.0)
    said = [one for one in lines.events if one["logger"] == "triptych.workers"]
    assert (said[0]["event"], said[0]["worker"]) == ('loaded "all" in 1.0 s', "painter")

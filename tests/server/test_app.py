"""The application around its routes: health, status, and what becomes of errors."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.server.fake import FakeEngine
from tests.server.test_jobs import refused, submitted
from triptych.config import ServeSection
from triptych.errors import LoadError, ModelNotFound, NotEnoughMemory, NoWorker, QueueFull, TriptychError, Unsupported
from triptych.server import create_app


def test_health_tells_which_stages_are_missing(client: TestClient, engine: FakeEngine) -> None:
    assert (client.get("/health").status_code, client.get("/health").json()) == (200, {"status": "ok", "missing": []})
    engine.missing = ("denoise",)
    answer = client.get("/health")
    assert (answer.status_code, answer.json()) == (503, {"status": "unavailable", "missing": ["denoise"]})


def test_status_is_the_engines(client: TestClient) -> None:
    submitted(client)
    assert client.get("/v1/cluster").json()["jobs"] == {"queued": 1}


def test_a_client_that_hangs_up_in_the_middle_is_no_bug_of_ours(engine: FakeEngine) -> None:
    parts = [{"type": "http.request", "body": b'{"pro', "more_body": True}, {"type": "http.disconnect"}]
    sent: list[Any] = []

    async def receive() -> Any:
        return parts.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/jobs", "raw_path": b"/v1/jobs", "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")], "http_version": "1.1",
        "scheme": "http",
    }  # fmt: skip
    asyncio.run(create_app(engine, ServeSection(max_body=100_000), version="1")(scope, receive, send))
    assert sent[0]["status"] == 499 and b"client_closed_request" in sent[1]["body"] and not engine.submitted


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (QueueFull("256 jobs wait", retry_after=3.2), 429),
        (NotEnoughMemory("too large", field="width, height"), 429),
        (NoWorker("denoise has no worker"), 503),
        (Unsupported("cannot"), 400),
        (ModelNotFound("gone"), 404),
        (LoadError("damaged"), 500),
        (TriptychError("something"), 500),
    ],
    ids=lambda value: getattr(value, "code", value),
)
def test_an_engines_error_has_one_status(
    client: TestClient, engine: FakeEngine, error: TriptychError, status: int
) -> None:
    engine.refuse = error
    answer = client.post("/v1/jobs", json={"prompt": "a"})
    assert refused(answer, status, error.code, error.field) == error.message
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    if isinstance(error, QueueFull):
        assert answer.headers["retry-after"] == "4"


def test_a_bug_of_ours_is_500_without_a_word_of_it(client: TestClient, engine: FakeEngine) -> None:
    engine.refuse = ZeroDivisionError("a secret path")
    message = refused(client.post("/v1/jobs", json={"prompt": "a"}), 500, "internal", None)
    assert "secret" not in message


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("PUT", "/v1/jobs/a", 405),
        ("GET", "/v1/jobs/a/results", 404),
        ("POST", "/health", 405),
    ],
)
def test_other_routes_and_methods(client: TestClient, method: str, path: str, status: int) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status and answer.json()["error"]["code"] in {"not_found", "method_not_allowed"}


def test_the_openapi_page_describes_the_body(client: TestClient) -> None:
    page = client.get("/openapi.json").json()
    schema = page["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"prompt", "images", "exact", "deadline", "output_format"} <= schema["properties"].keys()
    assert {"202", "413", "422", "429"} <= page["paths"]["/v1/jobs"]["post"]["responses"].keys()
    assert client.get("/docs").status_code == 200

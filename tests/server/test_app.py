"""The native job routes as a client meets them: shapes, statuses, and wrong input of every kind."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.server.fake import FakeEngine, File
from triptych.cluster.jobs import Failure, StageRecord
from triptych.config import ServeSection
from triptych.errors import LoadError, ModelNotFound, NotEnoughMemory, NoWorker, QueueFull, TriptychError, Unsupported
from triptych.server import create_app


def data_url(picture: Image.Image, format: str = "PNG") -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format=format)
    return f"data:image/{format.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def submitted(client: TestClient, **fields: Any) -> str:
    answer = client.post("/v1/jobs", json={"prompt": "a cat", **fields})
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def refused(answer: Any, status: int, code: str, field: str | None) -> str:
    """The message of an error, whose shape is the same everywhere."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"code", "message", "field"}
    assert (body["error"]["code"], body["error"]["field"]) == (code, field)
    assert "Traceback" not in answer.text
    return body["error"]["message"]


def test_health_tells_which_stages_are_missing(client: TestClient, engine: FakeEngine) -> None:
    assert (client.get("/health").status_code, client.get("/health").json()) == (200, {"status": "ok", "missing": []})
    engine.missing = ("denoise",)
    answer = client.get("/health")
    assert (answer.status_code, answer.json()) == (503, {"status": "unavailable", "missing": ["denoise"]})


def test_a_job_is_taken_at_once_and_seen_from_then_on(client: TestClient, engine: FakeEngine) -> None:
    answer = client.post(
        "/v1/jobs",
        json={"prompt": ["a", "b"], "width": 64, "sigmas": [1, 0.5], "preview": True, "priority": 2, "deadline": 60,
              "exact": True, "output_format": "webp", "extra": {"size": 3}},
    )  # fmt: skip
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    request, options = engine.submitted[0]
    assert (request.prompt, request.width, request.sigmas) == (("a", "b"), 64, (1.0, 0.5))
    assert (request.output_format, request.extra) == ("webp", {"size": 3})
    assert options == {"client": "", "preview": True, "priority": 2, "deadline": 60.0, "exact": True}
    assert (job["state"], job["position"], job["stage"], job["priority"]) == ("queued", 0, "encode", 2)
    assert (job["model"], job["workflow"], job["object"]) == ("toy", "text2image", "job")
    assert (job["results"], job["error"], job["times"]) == ([], None, [])
    assert job["request"] == {"prompt": ["a", "b"], "seed": 7} and job["warnings"] == ["a word it was never taught"]
    assert abs(job["created"] - time.time()) < 60
    assert client.get(f"/v1/jobs/{job['id']}").json() == job


def test_pictures_come_as_data_urls(client: TestClient, engine: FakeEngine) -> None:
    picture, mask = Image.new("RGB", (8, 8), "red"), Image.new("L", (8, 8), 255)
    submitted(client, images=[data_url(picture), data_url(picture, "WEBP")], mask=data_url(mask))
    request, _ = engine.submitted[0]
    assert [image.size for image in request.images] == [(8, 8), (8, 8)]
    assert request.images[0].getpixel((0, 0)) == (255, 0, 0)
    assert request.mask is not None and request.mask.mode == "L"


def test_a_running_job_tells_its_step(client: TestClient, engine: FakeEngine) -> None:
    job = submitted(client)
    engine.put(job, "running", stage=1, started=5.0, attempts=[1, 2, 0])
    engine.views[job] = type(engine.views[job])(engine.views[job].record, None, 3, 8)
    found = client.get(f"/v1/jobs/{job}").json()
    assert (found["state"], found["stage"], found["step"], found["steps"]) == ("running", "denoise", 3, 8)
    assert (found["started"], found["retries"], found["position"]) == (5.0, 1, None)


def test_a_failed_job_says_why_and_what_came_before(client: TestClient, engine: FakeEngine) -> None:
    job = submitted(client)
    failures = [
        Failure(stage="denoise", worker="w1", code="error", message="first"),
        Failure(stage="denoise", worker="w2", code="not_enough_memory", message="second", field="width"),
    ]
    engine.put(job, "failed", stage=1, ended=9.0, failures=failures)
    found = client.get(f"/v1/jobs/{job}").json()
    wanted = {"code": "not_enough_memory", "message": "second", "field": "width", "stage": "denoise"}
    assert found["error"] == wanted
    assert [failure["message"] for failure in found["failures"]] == ["first", "second"]
    assert (found["state"], found["ended"], found["stage"]) == ("failed", 9.0, None)
    refused(client.get(f"/v1/jobs/{job}/results/0"), 409, "not_done", None)


def test_results_are_files_with_their_type_and_ranges(client: TestClient, engine: FakeEngine, tmp_path: Path) -> None:
    job = submitted(client)
    path = tmp_path / "anything.bin"
    path.write_bytes(b"0123456789")
    engine.files[job] = [File(path=path), File(data=b"clip", media_type="video/mp4")]
    times = StageRecord(stage="encode", worker="w", seconds=1.5, waited=0.5, fetched=0.1, steps=1, peak_bytes=10)
    engine.put(job, "done", ended=9.0, stage=2, finished=[times])
    found = client.get(f"/v1/jobs/{job}").json()
    assert found["results"] == [f"/v1/jobs/{job}/results/0", f"/v1/jobs/{job}/results/1"]
    assert found["times"] == [
        {
            "stage": "encode",
            "seconds": 1.5,
            "waited": 0.5,
            "fetched": 0.1,
            "steps": 1,
            "peak_bytes": 10,
            "resumed_at": 0,
        }
    ]
    picture, clip = (client.get(url) for url in found["results"])
    assert (picture.content, picture.headers["content-type"]) == (b"0123456789", "image/png")
    assert picture.headers["content-disposition"] == f'inline; filename="{job}-0.png"'
    assert picture.headers["x-content-type-options"] == "nosniff"
    assert (clip.content, clip.headers["content-type"]) == (b"clip", "video/mp4")
    part = client.get(found["results"][0], headers={"Range": "bytes=2-4"})
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, b"234", "bytes 2-4/10")
    refused(client.get(f"/v1/jobs/{job}/results/2"), 404, "result_not_found", "number")
    refused(client.get(f"/v1/jobs/{job}/results/-1"), 404, "result_not_found", "number")
    refused(client.get(f"/v1/jobs/{job}/results/x"), 422, "invalid_request", "number")
    path.unlink()
    refused(client.get(f"/v1/jobs/{job}/results/0"), 410, "result_gone", None)
    engine.files.clear()
    refused(client.get(f"/v1/jobs/{job}/results/0"), 410, "result_gone", None)


def test_cancel_ends_a_job_and_leaves_an_ended_one(client: TestClient, engine: FakeEngine) -> None:
    job = submitted(client)
    answer = client.delete(f"/v1/jobs/{job}")
    assert (answer.status_code, answer.json()["state"], answer.json()["error"]) == (200, "cancelled", None)
    engine.put(job, "done")
    assert client.delete(f"/v1/jobs/{job}").json()["state"] == "done"


@pytest.mark.parametrize("job", ["nope", "a" * 65, "..%2F..%2Fetc", "%00", "jób", "%F0%9F%98%80"])
def test_an_unknown_job_is_404(client: TestClient, job: str) -> None:
    for answer in (client.get(f"/v1/jobs/{job}"), client.delete(f"/v1/jobs/{job}")):
        assert answer.status_code == 404 and answer.json()["error"]["code"] in {"job_not_found", "not_found"}
    assert client.get(f"/v1/jobs/{job}/results/0").status_code == 404


def test_status_is_the_engines(client: TestClient) -> None:
    submitted(client)
    assert client.get("/v1/cluster").json() == {"jobs": {"queued": 1}}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": "a", "width": "64"}, "width"),
        ({"prompt": "a", "width": 64.5}, "width"),
        ({"prompt": "a", "width": 0}, "width"),
        ({"prompt": "a", "width": True}, "width"),
        ({"prompt": "a", "width": 10**30}, "width"),
        ({"prompt": "a", "num_inference_steps": 100000}, "num_inference_steps"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "stepz": 3}, "stepz"),
        ({"prompt": "a", "output_format": "../../etc/passwd"}, "output_format"),
        ({"prompt": "a", "aspect_ratio": "16:9", "width": 64}, "aspect_ratio"),
        ({"prompt": "a", "priority": 1000}, "priority"),
        ({"prompt": "a", "deadline": 0}, "deadline"),
        ({"prompt": "a", "preview": "yes"}, "preview"),
        ({"prompt": "a", "images": ["/etc/passwd"]}, "images"),
        ({"prompt": "a", "images": ["https://example.com/a.png"]}, "images[0]"),
        ({"prompt": "a", "images": "data:image/png;base64,AAAA"}, "images"),
        ({"prompt": "a", "images": ["data:image/png;base64,A"]}, "images[0]"),
        ({"prompt": "a", "images": ["data:image/png;base64,AAAA"] * 17}, "images"),
        ({"prompt": "a", "mask": "data:text/html;base64,AAAA"}, "mask"),
    ],
)
def test_a_wrong_field_is_named(client: TestClient, engine: FakeEngine, fields: dict[str, Any], field: str) -> None:
    message = refused(client.post("/v1/jobs", json=fields), 422, "invalid_request", field)
    assert "given" in message and "allowed" in message
    assert not engine.submitted


def test_a_picture_that_is_none_is_400(client: TestClient) -> None:
    wrong = base64.b64encode(b"<svg xmlns='x'/>").decode()
    answer = client.post("/v1/jobs", json={"prompt": "a", "images": [f"data:image/png;base64,{wrong}"]})
    assert "SVG" in refused(answer, 400, "invalid_media", "images[0]")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b"3", b"\xff\xfe", b'{"prompt": NaN}', b'{"prompt": "a", "fps": 1e999}',
        b'{"prompt": "\\ud800"}', b"[" * 50_000, b'{"prompt": "a", "extra": {"x": ' + b"9" * 5000 + b"}}",
        b'{"prompt": "a", "extra": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}",
    ],
    ids=range(12),
)  # fmt: skip
def test_bodies_that_are_no_job_are_422(client: TestClient, engine: FakeEngine, body: bytes) -> None:
    answer = client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    refused(answer, 422, "invalid_request", "body")
    assert not engine.submitted


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_form_of_some_web_page_cannot_make_a_job(client: TestClient, kind: str) -> None:
    answer = client.post("/v1/jobs", content=b'{"prompt": "a"}', headers={"Content-Type": kind})
    refused(answer, 415, "wrong_media_type", "content-type")


def test_a_large_body_is_413_whether_it_is_announced_or_not(client: TestClient, engine: FakeEngine) -> None:
    whole = json.dumps({"prompt": "a" * 100_000}).encode()
    json_type = {"Content-Type": "application/json"}
    refused(client.post("/v1/jobs", content=whole, headers=json_type), 413, "body_too_large", "body")
    parts = (whole[at : at + 10_000] for at in range(0, len(whole), 10_000))
    refused(client.post("/v1/jobs", content=parts, headers=json_type), 413, "body_too_large", "body")
    assert not engine.submitted


def test_a_client_that_hangs_up_in_the_middle_is_no_bug_of_ours(engine: FakeEngine) -> None:
    parts = [{"type": "http.request", "body": b'{"pro', "more_body": True}, {"type": "http.disconnect"}]
    sent: list[Any] = []

    async def receive() -> Any:
        return parts.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/jobs", "raw_path": b"/v1/jobs", "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http",
    }  # fmt: skip
    asyncio.run(create_app(engine, ServeSection(max_body=100_000), version="1")(scope, receive, send))
    assert sent[0]["status"] == 422 and not engine.submitted


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

"""The native job routes as a client meets them: shapes, statuses, and wrong input of every kind."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.server.conftest import LOCAL
from tests.server.fake import TOPOLOGY, FakeEngine, File, Taken
from triptych.cluster import Estimate
from triptych.cluster.jobs import Failure, StageRecord
from triptych.config import ServeSection
from triptych.errors import QueueFull
from triptych.server import create_app
from triptych.server.locks.keys import ApiKey, KeyRing
from triptych.server.routes import jobs


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
    assert options == {"client": "", "preview": True, "priority": 2, "deadline": 60.0, "exact": True, "trace": ""}
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
    times = StageRecord(
        stage="encode", worker="w", seconds=1.5, waited=0.5, fetched=0.1, steps=1, peak_bytes=10, ran=1.25
    )
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
            "ran": 1.25,
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


def test_estimates_are_told_with_the_job(client: TestClient, engine: FakeEngine) -> None:
    job = submitted(client)
    assert client.get(f"/v1/jobs/{job}").json()["done_in"] is None
    engine.estimates[job] = Estimate(1.5, 4.0)
    found = client.get(f"/v1/jobs/{job}").json()
    assert (found["starts_in"], found["done_in"]) == (1.5, 4.0)


def test_jobs_are_listed_newest_first_in_pages(client: TestClient, engine: FakeEngine) -> None:
    made = [submitted(client) for _ in range(5)]
    page = client.get("/v1/jobs", params={"limit": 2}).json()
    assert (page["object"], page["has_more"]) == ("list", True)
    assert [job["id"] for job in page["data"]] == made[:-3:-1]
    assert page["data"][0] == client.get(f"/v1/jobs/{made[-1]}").json()
    rest = client.get("/v1/jobs", params={"limit": 3, "before": made[3]}).json()
    assert ([job["id"] for job in rest["data"]], rest["has_more"]) == (made[2::-1], False)
    assert client.get("/v1/jobs", params={"before": made[0]}).json()["data"] == []


def test_jobs_are_listed_by_state(client: TestClient, engine: FakeEngine) -> None:
    first, second, third = (submitted(client) for _ in range(3))
    engine.put(second, "done", ended=2.0)
    engine.put(third, "cancelled", ended=3.0)
    assert [job["id"] for job in client.get("/v1/jobs?state=done").json()["data"]] == [second]
    both = client.get("/v1/jobs?state=queued&state=cancelled").json()["data"]
    assert [job["id"] for job in both] == [third, first]


@pytest.mark.parametrize(
    ("query", "status", "code", "field"),
    [
        ("limit=0", 422, "invalid_request", "limit"),
        ("limit=101", 422, "invalid_request", "limit"),
        ("limit=x", 422, "invalid_request", "limit"),
        ("state=waiting", 422, "invalid_request", "state"),
        ("before=unknown", 404, "job_not_found", "before"),
        ("before=" + "a" * 65, 422, "invalid_request", "before"),
    ],
)
def test_a_wrong_list_is_refused(client: TestClient, query: str, status: int, code: str, field: str) -> None:
    refused(client.get(f"/v1/jobs?{query}"), status, code, field)


@pytest.fixture
def keyed(engine: FakeEngine) -> TestClient:
    """With two API keys."""
    keys = KeyRing([ApiKey(name, sha256(name.encode()).digest()) for name in ("first", "second")])
    return TestClient(create_app(engine, ServeSection(), version="1", keys=keys), base_url="http://localhost")


def as_(name: str, **more: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}", **more}


def test_another_keys_jobs_are_not_there(keyed: TestClient) -> None:
    job = keyed.post("/v1/jobs", json={"prompt": "a"}, headers=as_("first")).json()["id"]
    assert [one["id"] for one in keyed.get("/v1/jobs", headers=as_("first")).json()["data"]] == [job]
    assert keyed.get("/v1/jobs", headers=as_("second")).json()["data"] == []
    for path in (f"/v1/jobs/{job}", f"/v1/jobs/{job}/events", f"/v1/jobs/{job}/results/0"):
        refused(keyed.get(path, headers=as_("second")), 404, "job_not_found", "job")
    refused(keyed.delete(f"/v1/jobs/{job}", headers=as_("second")), 404, "job_not_found", "job")
    refused(keyed.get(f"/v1/jobs?before={job}", headers=as_("second")), 404, "job_not_found", "before")
    refused(keyed.get("/v1/jobs"), 401, "not_authenticated", None)


def test_the_same_key_and_body_give_the_same_job(client: TestClient, engine: FakeEngine) -> None:
    key = {"Idempotency-Key": "order-17"}
    first = client.post("/v1/jobs", json={"prompt": "a"}, headers=key)
    again = client.post("/v1/jobs", json={"prompt": "a"}, headers=key)
    assert first.status_code == again.status_code == 202 and first.json()["id"] == again.json()["id"]
    assert "idempotent-replayed" not in first.headers and again.headers["idempotent-replayed"] == "true"
    assert again.headers["location"] == f"/v1/jobs/{first.json()['id']}" and len(engine.submitted) == 1
    message = refused(client.post("/v1/jobs", json={"prompt": "b"}, headers=key), 409, "conflict", "idempotency-key")
    assert "another body" in message and len(engine.submitted) == 1
    engine.put(first.json()["id"], "done", ended=1.0)
    ended = client.post("/v1/jobs", json={"prompt": "a"}, headers=key)
    assert (ended.status_code, ended.json()["state"]) == (200, "done")
    assert client.post("/v1/jobs", json={"prompt": "a"}).json()["id"] != first.json()["id"]


def test_a_refused_submission_leaves_its_key_free(client: TestClient, engine: FakeEngine) -> None:
    key = {"Idempotency-Key": "order-17"}
    engine.refuse = QueueFull("256 jobs wait")
    refused(client.post("/v1/jobs", json={"prompt": "a"}, headers=key), 429, "queue_full", None)
    engine.refuse = None
    again = client.post("/v1/jobs", json={"prompt": "b"}, headers=key)
    assert again.status_code == 202 and "idempotent-replayed" not in again.headers


def test_the_same_submission_twice_at_once_makes_one_job(client: TestClient, engine: FakeEngine) -> None:
    def late(request: Any, **options: Any) -> Taken:
        FakeEngine.submit(engine, request, **options)  # the other one is quicker
        return FakeEngine.submit(engine, request, **options)

    engine.submit = late  # pyright: ignore[reportAttributeAccessIssue]
    answer = client.post("/v1/jobs", json={"prompt": "a"}, headers={"Idempotency-Key": "order-17"})
    assert answer.status_code == 202 and answer.headers["idempotent-replayed"] == "true"
    assert len(engine.views) == 1


def test_keys_of_two_callers_do_not_meet(keyed: TestClient) -> None:
    jobs = [
        keyed.post("/v1/jobs", json={"prompt": name}, headers=as_(name, **{"Idempotency-Key": "1"})).json()["id"]
        for name in ("first", "second")
    ]
    assert jobs[0] != jobs[1]


@pytest.mark.parametrize("key", ["", "a b", "a" * 256, "schlüssel"])
def test_a_key_that_is_none_is_refused(client: TestClient, engine: FakeEngine, key: str) -> None:
    headers = {b"Idempotency-Key": key.encode()}
    answer = client.post("/v1/jobs", json={"prompt": "a"}, headers=headers)
    refused(answer, 422, "invalid_request", "idempotency-key")
    assert not engine.submitted


def test_a_submission_waits_as_long_as_it_prefers(client: TestClient, engine: FakeEngine) -> None:
    def end() -> None:
        until(lambda: engine.views)
        engine.put(next(iter(engine.views)), "done", ended=1.0)

    ending = threading.Thread(target=end)
    ending.start()
    done = client.post("/v1/jobs", json={"prompt": "a"}, headers={"Prefer": "respond-async, wait=60"})
    ending.join()
    assert (done.status_code, done.json()["state"], done.headers["preference-applied"]) == (200, "done", "wait=60")
    began = time.monotonic()
    late = client.post("/v1/jobs", json={"prompt": "a"}, headers={"Prefer": "wait=1"})
    assert (late.status_code, late.json()["state"]) == (202, "queued") and time.monotonic() - began >= 1
    assert engine.views[late.json()["id"]].record.state == "queued", "it goes on"
    for preference in ("return=minimal", "", "wait=0"):
        assert client.post("/v1/jobs", json={"prompt": "a"}, headers={"Prefer": preference}).status_code == 202


def test_a_long_wait_is_cut(client: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "MAX_WAIT", 1)
    answer = client.post("/v1/jobs", json={"prompt": "a"}, headers={"Prefer": "wait=86400"})
    assert (answer.status_code, answer.headers["preference-applied"]) == (202, "wait=1")


@pytest.mark.parametrize("preference", ["wait", "wait=x", "wait=-1", "wait=1.5"])
def test_a_wait_that_is_no_time_is_refused(client: TestClient, engine: FakeEngine, preference: str) -> None:
    answer = client.post("/v1/jobs", json={"prompt": "a"}, headers={"Prefer": preference})
    assert "wait=600" in refused(answer, 422, "invalid_request", "prefer") and not engine.submitted


def until(holds: Callable[[], Any]) -> None:
    give_up = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < give_up
        time.sleep(0.01)


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/images/generations", "/generate", "/v1/tasks/image/", "/v1/videos"])
@pytest.mark.parametrize("part", [b"[],", b"{},", b"1,", b"[", b'{"a":'])
def test_json_of_too_many_values_is_refused_unread(path: str, part: bytes) -> None:
    """What is read takes a hundred times the memory, and seconds in which nobody else is answered."""
    engine = FakeEngine(topology=replace(TOPOLOGY, makes="video" if path == "/v1/videos" else "image"))
    client = TestClient(create_app(engine, ServeSection(), version="1"), LOCAL)
    body = b'{"prompt":"a","extra":[' + part * (2**24 // len(part)) + b"1]}"
    began = time.monotonic()
    answer = client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422) and "at most 100000 commas" in answer.text
    assert time.monotonic() - began < 2 and not engine.submitted


def test_many_values_are_fine(client: TestClient, engine: FakeEngine) -> None:
    answer = client.post("/v1/jobs", json={"prompt": "a, [b] {c}" * 100, "extra": {"numbers": [1] * 1000}})
    assert answer.status_code in (202, 422) and "commas" not in answer.text

"""LightX2V's API as its users call it: tasks taken, looked at, fetched, cancelled; its fields in its own words."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.server.conftest import LOCAL
from tests.server.fake import TOPOLOGY, FakeEngine, File
from tests.server.test_cachedit import Quick, calling, refused
from tests.server.test_jobs import data_url
from triptych.cluster.jobs import Failure
from triptych.config import ServeSection
from triptych.errors import InvalidRequest, QueueFull
from triptych.request import Request
from triptych.server import create_app
from triptych.server.locks.keys import ApiKey, KeyRing

WARNED = "a word it was never taught"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def clips() -> FakeEngine:
    return FakeEngine(topology=replace(TOPOLOGY, makes="video"))


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[TestClient]:
    with calling(engine) as client:
        yield client


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_task_goes_from_pending_to_its_result(client: TestClient, engine: FakeEngine, slash: str) -> None:
    answer = client.post(f"/v1/tasks/image{slash}", json={"prompt": "a cat"})
    assert answer.status_code == 200, answer.text
    assert answer.json() == {
        "task_id": "job1", "task_status": "pending", "save_result_path": "job1.png", "warnings": [WARNED],
    }  # fmt: skip
    assert engine.submitted[0][0] == Request.parse(prompt="a cat")

    def status() -> dict[str, Any]:
        return client.get(f"/v1/tasks/job1/status{slash}").raise_for_status().json()

    assert (status()["status"], status()["end_time"], status()["error"]) == ("pending", None, None)
    refused(client.get(f"/v1/tasks/job1/result{slash}"), 404, "result_not_found", None)
    engine.put("job1", "running", started=1000.0)
    assert (status()["status"], status()["start_time"]) == ("processing", "1970-01-01T00:16:40Z")
    engine.files["job1"] = [File(data=b"made")]
    engine.put("job1", "done", ended=1001.5)
    assert status() == {
        "task_id": "job1", "status": "completed", "start_time": "1970-01-01T00:16:40Z",
        "end_time": "1970-01-01T00:16:41.500000Z", "error": None, "save_result_path": "job1.png", "warnings": [WARNED],
    }  # fmt: skip
    result = client.get(f"/v1/tasks/job1/result{slash}")
    assert (result.content, result.headers["content-type"]) == (b"made", "image/png")
    assert client.delete(f"/v1/tasks/job1{slash}").json()["stop_status"] == "do_nothing"


def test_every_field_of_a_picture_reaches_the_request(client: TestClient, engine: FakeEngine) -> None:
    fields = {"prompt": "a", "negative_prompt": "dull", "infer_steps": 4, "seed": 9, "target_shape": [64, 128]}
    client.post("/v1/tasks/image/", json=fields).raise_for_status()
    assert engine.submitted[-1][0] == Request.parse(
        prompt="a", negative_prompt="dull", num_inference_steps=4, seed=9, height=64, width=128
    )
    client.post("/v1/tasks/image/", json={"prompt": "a", "aspect_ratio": "4:3"}).raise_for_status()
    assert engine.submitted[-1][0] == Request.parse(prompt="a", aspect_ratio="4:3")
    url, area = (data_url(Image.new("RGB", size, "red")) for size in ((16, 8), (8, 8)))
    edit = {"prompt": "a", "image_path": url, "image_mask_path": area, "i2i_denoise_strength": 0.5}
    client.post("/v1/tasks/image/", json=edit).raise_for_status()
    request = engine.submitted[-1][0]
    assert [picture.size for picture in request.images] == [(16, 8)] and request.strength == 0.5
    assert request.mask is not None and request.mask.mode == "L"


def test_every_field_of_a_clip_reaches_the_request(clips: FakeEngine) -> None:
    with calling(clips) as client:
        fields = {"prompt": "a", "target_video_length": 17, "target_fps": 8, "infer_steps": 4}
        answer = client.post("/v1/tasks/video/", json=fields)
    assert answer.json()["save_result_path"] == "job1.mp4"
    assert clips.submitted[-1][0] == Request.parse(prompt="a", num_frames=17, fps=8, num_inference_steps=4)


def test_what_has_no_effect_is_named(client: TestClient, engine: FakeEngine, clips: FakeEngine) -> None:
    useless = {
        "task_id": "mine", "save_result_path": "cat.png", "use_prompt_enhancer": True, "reuse": True,
        "lora_strength": 0.5, "sr_ratio": 3.0, "data_bootstrap_room": 7,
    }  # fmt: skip
    taken = client.post("/v1/tasks/image/", json={"prompt": "a", **useless}).json()
    assert [text.partition(" has no effect: ")[0] for text in taken["warnings"]] == [*useless, WARNED]
    assert (taken["task_id"], taken["save_result_path"]) == ("job1", "job1.png")
    assert engine.submitted[0][0] == Request.parse(prompt="a")
    both = {"prompt": "a", "target_shape": [64, 64], "aspect_ratio": "1:1"}
    taken = client.post("/v1/tasks/image/", json=both).json()
    assert taken["warnings"] == ["aspect_ratio has no effect: target_shape says the size", WARNED]
    defaults = {"use_prompt_enhancer": False, "lora_strength": 1.0, "save_result_path": "", "lora_name": None}
    assert client.post("/v1/tasks/image/", json={"prompt": "a", **defaults}).json()["warnings"] == [WARNED]
    with calling(clips) as client:
        more = {"num_fragments": 2, "reuse_prefix_segments": 1, "video_duration": 6, "resize_mode": "fixed_shape"}
        taken = client.post("/v1/tasks/video/", json={"prompt": "a", **more}).json()
        assert {text.partition(" ")[0] for text in taken["warnings"][:-1]} == more.keys()


@pytest.mark.parametrize(
    ("path", "fields", "status", "field"),
    [
        ("image/", {"prompt": 3}, 422, "prompt"),
        ("image/", {"infer_steps": 0}, 422, "infer_steps"),
        ("image/", {"seed": -1}, 422, "seed"),
        ("image/", {"target_shape": [64]}, 422, "target_shape"),
        ("image/", {"target_shape": [64, 64, 3]}, 422, "target_shape"),
        ("image/", {"target_shape": [0, 64]}, 422, "target_shape"),
        ("image/", {"aspect_ratio": "wide"}, 422, "aspect_ratio"),
        ("image/", {"aspect_ratio": "0:1"}, 422, "aspect_ratio"),
        ("image/", {"i2i_denoise_strength": 2}, 422, "i2i_denoise_strength"),
        ("image/", {"image_path": "/etc/passwd"}, 422, "image_path"),
        ("image/", {"image_path": "http://127.0.0.1/a.png"}, 422, "image_path"),
        ("image/", {"image_path": "file-" + "0" * 32}, 422, "image_path"),
        ("image/", {"image_path": "data:image/png;base64,AAAA"}, 400, "image_path"),
        ("image/", {"image_mask_path": "../mask.png"}, 422, "image_mask_path"),
        ("image/", {"save_result_path": "../../etc/passwd"}, 422, "save_result_path"),
        ("image/", {"save_result_path": "/etc/x.png"}, 422, "save_result_path"),
        ("image/", {"save_result_path": "a\\b.png"}, 422, "save_result_path"),
        ("image/", {"lora_name": "style"}, 400, "lora_name"),
        ("image/", {"presigned_url": "http://example.com/put"}, 400, "presigned_url"),
        ("image/", {"last_frame_path": "data:image/png;base64,AAAA"}, 400, "last_frame_path"),
        ("image/", {"target_video_length": 81}, 422, "target_video_length"),
        ("image/sync", {"stepz": 1}, 422, "stepz"),
        ("image/sync?timeout_seconds=0", {}, 422, "timeout_seconds"),
        ("image/sync?poll_interval_seconds=0", {}, 422, "poll_interval_seconds"),
        ("video/", {}, 400, "body"),
    ],
)
def test_a_wrong_field_is_named(
    client: TestClient, engine: FakeEngine, path: str, fields: dict[str, Any], status: int, field: str
) -> None:
    answer = client.post(f"/v1/tasks/{path}", json={"prompt": "a", **fields})
    assert (answer.status_code, answer.json()["field"]) == (status, field), answer.text
    assert "allowed" in answer.json()["detail"] or status == 400
    assert not engine.submitted


def test_a_kind_that_the_model_does_not_make_is_refused_either_way(client: TestClient, clips: FakeEngine) -> None:
    detail = refused(client.post("/v1/tasks/video", json={"prompt": "a"}), 400, "unsupported", "body")
    assert "/v1/tasks/image/" in detail
    with calling(clips) as other:
        for path in ("image", "image/", "image/sync", "image/sync/"):
            detail = refused(other.post(f"/v1/tasks/{path}", json={"prompt": "a"}), 400, "unsupported", "body")
            assert "/v1/tasks/video/" in detail
        for name in ("video_path", "audio_path"):
            wrong = other.post("/v1/tasks/video/", json={"prompt": "a", name: "x"})
            refused(wrong, 400, "unsupported", name)
    assert not clips.submitted


def test_what_the_engine_refuses_is_told_in_these_words(client: TestClient, engine: FakeEngine) -> None:
    engine.refuse = InvalidRequest.of("num_inference_steps", 1, "2 or more")
    refused(client.post("/v1/tasks/image/", json={"prompt": "a"}), 422, "invalid_request", "infer_steps")
    engine.refuse = InvalidRequest.of("width", 60, "multiples of 8")
    refused(client.post("/v1/tasks/image/", json={"prompt": "a"}), 422, "invalid_request", "target_shape")
    engine.refuse = QueueFull("full", retry_after=3)
    assert client.post("/v1/tasks/image/", json={"prompt": "a"}).headers["retry-after"] == "3"
    refused(client.post("/v1/tasks/image/", content=b"{}"), 415, "wrong_media_type", "content-type")


def test_cancelling_ends_the_job_and_its_status_says_so(client: TestClient, engine: FakeEngine) -> None:
    client.post("/v1/tasks/image/", json={"prompt": "a"})
    engine.put("job1", "running", started=1.0)
    assert client.delete("/v1/tasks/job1").json()["stop_status"] == "success"
    assert engine.views["job1"].record.state == "cancelled"
    found = client.get("/v1/tasks/job1/status").json()
    assert (found["status"], found["error"]) == ("cancelled", "the task was cancelled")
    assert client.delete("/v1/tasks/job1").json()["stop_status"] == "do_nothing"
    refused(client.get("/v1/tasks/job1/result"), 404, "result_not_found", None)


def test_a_failure_is_told(client: TestClient, engine: FakeEngine) -> None:
    client.post("/v1/tasks/image/", json={"prompt": "a"})
    failures = [Failure(stage="denoise", worker="w", code="error", message=text) for text in ("first", "boom")]
    engine.put("job1", "failed", ended=2.0, failures=failures)
    found = client.get("/v1/tasks/job1/status").json()
    assert (found["status"], found["error"]) == ("failed", "boom")


def test_a_picture_in_one_call() -> None:
    engine = Quick(topology=TOPOLOGY)
    with calling(engine) as client:
        answer = client.post("/v1/tasks/image/sync", json={"prompt": "a", "save_result_path": "x.png"})
        assert (answer.status_code, answer.content) == (200, b"made 0"), answer.text
        assert answer.headers["content-type"] == "image/png"
        assert json.loads(answer.headers["triptych-warnings"])[0].startswith("save_result_path has no effect")
        assert "triptych-warnings" not in client.post("/v1/tasks/image/sync/", json={"prompt": "a"}).headers
        engine.failures = (Failure(stage="denoise", worker="w", code="stage_failed", message="boom"),)
        refused(client.post("/v1/tasks/image/sync", json={"prompt": "a"}), 500, "stage_failed", None)


def test_a_call_that_takes_too_long_is_cancelled(client: TestClient, engine: FakeEngine) -> None:
    began = time.monotonic()
    answer = client.post("/v1/tasks/image/sync?timeout_seconds=1", json={"prompt": "a"})
    assert "within 1 s" in refused(answer, 504, "timed_out", "task_id")
    assert 1 <= time.monotonic() - began < 30
    assert engine.views["job1"].record.state == "cancelled"


def test_the_queue_is_told(client: TestClient, engine: FakeEngine) -> None:
    for _ in range(3):
        client.post("/v1/tasks/image/", json={"prompt": "a"})
    engine.put("job2", "running", started=1.0)
    for path in ("/v1/tasks/queue/status", "/v1/tasks/queue/status/"):
        found = client.get(path).json()
        assert (found["current_task"], found["queue_size"], found["queue_available"]) == ("job2", 256, 253)
        assert (found["pending_count"], found["active_count"], found["is_processing"]) == (3, 3, False)


def test_another_keys_tasks_are_not_there() -> None:
    engine = FakeEngine()
    ring = KeyRing([ApiKey(name, hashlib.sha256(name.encode()).digest()) for name in ("one", "two")])
    one, two = ({"Authorization": f"Bearer {name}"} for name in ("one", "two"))
    with TestClient(create_app(engine, ServeSection(), version="1", keys=ring), LOCAL) as client:
        client.post("/v1/tasks/image/", json={"prompt": "a"}, headers=one).raise_for_status()
        engine.put("job1", "running", started=1.0)
        for method, path in (("GET", "job1/status"), ("GET", "job1/result"), ("DELETE", "job1")):
            answer = client.request(method, f"/v1/tasks/{path}", headers=two)
            refused(answer, 404, "job_not_found", "task_id")
            assert client.request(method, f"/v1/tasks/{path}").status_code == 401
        assert engine.views["job1"].record.state == "running"
        assert client.get("/v1/tasks/queue/status", headers=two).json()["current_task"] is None
        assert client.get("/v1/tasks/queue/status", headers=one).json()["current_task"] == "job1"


@pytest.mark.parametrize("task", ["nope", "a" * 65, "..%2F..%2Fetc", "%00"])
def test_an_unknown_task_is_404(client: TestClient, task: str) -> None:
    for method, path in (("GET", f"{task}/status"), ("GET", f"{task}/result"), ("DELETE", task)):
        assert client.request(method, f"/v1/tasks/{path}").status_code == 404

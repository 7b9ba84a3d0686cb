"""OpenAI's clip routes on an engine without a model: bodies of both kinds, the life of a clip, pages, files."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.server.conftest import LOCAL
from tests.server.fake import TOPOLOGY, FakeEngine, File, View
from tests.server.test_openai_images import picture, refused
from triptych.cluster.jobs import Failure
from triptych.config import ServeSection
from triptych.errors import InvalidRequest
from triptych.model.topology import Defaults
from triptych.server import create_app
from triptych.server.locks.keys import ApiKey, KeyRing

VIDEOS = "/v1/videos"
CLIPS = type(TOPOLOGY)(
    **{**vars(TOPOLOGY), "makes": "video", "temporal_scale": 4, "defaults": Defaults(fps=16, num_frames=81)}
)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(topology=CLIPS)


def created(client: TestClient, **fields: Any) -> dict[str, Any]:
    answer = client.post(VIDEOS, json={"prompt": "a cat walks", **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("as_form", [False, True])
def test_a_clip_is_taken_at_once(client: TestClient, engine: FakeEngine, as_form: bool) -> None:
    fields = {"prompt": "a cat walks", "seconds": "4", "size": "64x32", "quality": "high", "seed": 3, "model": "toy"}
    sent = {"data": fields, "files": {"input_reference": picture()}} if as_form else {"json": fields}
    answer = client.post(VIDEOS, **sent)  # pyright: ignore[reportArgumentType]
    assert answer.status_code == 200, answer.text
    video = answer.json()
    request, options = engine.submitted[0]
    assert (request.prompt, request.num_frames, request.width, request.height) == ("a cat walks", 65, 64, 32)
    assert (request.seed, len(request.images), options["preview"]) == (3, int(as_form), False)
    assert (video["id"], video["object"], video["model"], video["status"]) == ("job1", "video", "toy", "queued")
    assert (video["progress"], video["completed_at"], video["error"]) == (0, None, None)
    assert (video["prompt"], video["size"], video["seconds"]) == ("a cat walks", "64x32", "4.0625")
    assert video["warnings"][-1] == "quality is accepted and has no effect here"
    assert client.get(f"{VIDEOS}/job1").json() == {**video, "warnings": ["a word it was never taught"]}


@pytest.mark.parametrize(
    ("fields", "frames"),
    [
        ({}, None),
        ({"seconds": "4"}, 65),
        ({"seconds": 4}, 65),
        ({"seconds": 0.01}, 1),
        ({"seconds": "1.0625"}, 17),
        ({"seconds": 2, "fps": 8}, 17),
        ({"num_frames": 33}, 33),
    ],
)
def test_seconds_are_frames_that_the_model_can_make(
    client: TestClient, engine: FakeEngine, fields: dict[str, Any], frames: int | None
) -> None:
    created(client, **fields)
    assert engine.submitted[0][0].num_frames == frames


def test_a_picture_comes_by_its_url(client: TestClient, engine: FakeEngine) -> None:
    url = "data:image/png;base64," + base64.b64encode(picture("blue")).decode()
    created(client, input_reference={"image_url": url})
    sent = client.post(VIDEOS, data={"prompt": "a", "input_reference[image_url]": url}, files={"n": (None, "")})
    refused(sent, 400, "invalid_request", "n")
    form = client.post(VIDEOS, files={"prompt": (None, "a"), "input_reference[image_url]": (None, url)})
    assert form.status_code == 200, form.text
    assert [request.images[0].getpixel((0, 0)) for request, _ in engine.submitted] == [(0, 0, 255)] * 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "n": 2}, "n"),
        ({"prompt": "a", "num_outputs": 2}, "num_outputs"),
        ({"prompt": "a", "seconds": "long"}, "seconds"),
        ({"prompt": "a", "seconds": "nan"}, "seconds"),
        ({"prompt": "a", "seconds": 0}, "seconds"),
        ({"prompt": "a", "seconds": -4}, "seconds"),
        ({"prompt": "a", "seconds": 10**400}, "seconds"),
        ({"prompt": "a", "seconds": 3601}, "seconds"),
        ({"prompt": "a", "seconds": 3600}, "seconds"),
        ({"prompt": "a", "seconds": 4, "num_frames": 5}, "seconds"),
        ({"prompt": "a", "fps": 0}, "fps"),
        ({"prompt": "a", "size": "1x"}, "size"),
        ({"prompt": "a", "input_reference": {"file_id": "file-1"}}, "input_reference[0]"),
        ({"prompt": "a", "input_reference": {}}, "input_reference"),
        ({"prompt": "a", "input_reference": {"image_url": "/etc/passwd"}}, "input_reference[0]"),
        ({"prompt": "a", "input_reference": "x"}, "input_reference"),
        ({"prompt": "a", "output_format": "webm"}, "output_format"),
    ],
)
def test_a_wrong_field_is_400_and_named(client: TestClient, engine: FakeEngine, fields: Any, param: str) -> None:
    message = refused(client.post(VIDEOS, json=fields), 400, "invalid_request", param)
    assert message.startswith(f"{param}: given") and not engine.submitted


def test_what_the_model_refuses_is_named_in_openais_words(client: TestClient, engine: FakeEngine) -> None:
    for given, param in (({"seconds": "5"}, "seconds"), ({"num_frames": 81}, "num_frames")):
        engine.refuse = InvalidRequest.of("num_frames", 81, "at most 49 here")
        refused(client.post(VIDEOS, json={"prompt": "a", **given}), 400, "invalid_request", param)
    engine.refuse = InvalidRequest.of("images", "none", "at least one (image2video works on an image)")
    refused(client.post(VIDEOS, json={"prompt": "a"}), 400, "invalid_request", "input_reference")
    engine.topology = TOPOLOGY
    assert "/v1/images" in refused(client.post(VIDEOS, json={"prompt": "a"}), 400, "unsupported", "model")


def test_bodies_of_other_kinds_are_refused(client: TestClient) -> None:
    refused(client.post(VIDEOS, content=b"x", headers={"Content-Type": "text/plain"}), 415, "wrong_media_type",
            "content-type")  # fmt: skip
    refused(client.post(VIDEOS, data={"prompt": "a"}), 415, "wrong_media_type", "content-type")
    refused(client.post(VIDEOS, files={"input_reference": b"x" * 100_001}), 413, "body_too_large", "body")


def test_a_clip_that_runs_tells_its_progress(client: TestClient, engine: FakeEngine) -> None:
    created(client)
    seen = []
    for stage, step, steps in ((0, 0, 1), (1, 0, 0), (1, 2, 8), (1, 8, 8), (2, 0, 0), (3, 0, 0)):
        engine.put("job1", "running", stage=stage)
        engine.views["job1"] = View(engine.views["job1"].record, None, step, steps)
        found = client.get(f"{VIDEOS}/job1").json()
        assert found["status"] == "in_progress"
        seen.append(found["progress"])
    assert seen == [0, 0, 25, 99, 99, 99]
    refused(client.get(f"{VIDEOS}/job1/content"), 409, "not_done", None)
    engine.put("job1", "done", ended=12.7)
    done = client.get(f"{VIDEOS}/job1").json()
    assert (done["status"], done["progress"], done["completed_at"]) == ("completed", 100, 12)


def test_a_clip_that_will_not_come_says_why(client: TestClient, engine: FakeEngine) -> None:
    created(client)
    created(client)
    failure = Failure(stage="denoise", worker="w", code="not_enough_memory", message="too large")
    engine.put("job1", "failed", ended=1.0, failures=[failure])
    engine.cancel("job2")
    first, second = (client.get(f"{VIDEOS}/{job}").json() for job in ("job1", "job2"))
    assert (first["status"], first["error"]) == ("failed", {"code": "not_enough_memory", "message": "too large"})
    assert (second["status"], second["error"]["code"]) == ("failed", "cancelled")


def test_a_clips_file_has_ranges(client: TestClient, engine: FakeEngine, tmp_path: Path) -> None:
    created(client)
    (tmp_path / "0.mp4").write_bytes(b"0123456789")
    engine.files["job1"] = [File(path=tmp_path / "0.mp4", media_type="video/mp4")]
    engine.put("job1", "done", ended=1.0)
    whole = client.get(f"{VIDEOS}/job1/content")
    assert (whole.content, whole.headers["content-type"]) == (b"0123456789", "video/mp4")
    assert whole.headers["content-disposition"] == 'inline; filename="job1-0.mp4"' and whole.headers["etag"]
    tag = whole.headers["etag"]
    for known in (tag, f'"another", W/{tag}', "*"):
        again = client.get(f"{VIDEOS}/job1/content", headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert client.get(f"{VIDEOS}/job1/content", headers={"If-None-Match": '"another"'}).status_code == 200
    part = client.get(f"{VIDEOS}/job1/content?variant=video", headers={"Range": "bytes=2-4"})
    assert (part.status_code, part.content) == (206, b"234")
    refused(client.get(f"{VIDEOS}/job1/content?variant=thumbnail"), 400, "invalid_request", "variant")
    engine.files.clear()
    refused(client.get(f"{VIDEOS}/job1/content"), 410, "result_gone", None)


def test_deleting_forgets_and_cancels(client: TestClient, engine: FakeEngine) -> None:
    created(client)
    following: Any = client.app
    assert "job1" in following.state.front.follower._tracks
    answer = client.delete(f"{VIDEOS}/job1")
    assert answer.json() == {"id": "job1", "object": "video.deleted", "deleted": True}
    assert not engine.views and not following.state.front.follower._tracks
    for call in (client.get, client.delete):
        refused(call(f"{VIDEOS}/job1"), 404, "job_not_found", "video_id")
    refused(client.get(f"{VIDEOS}/job1/content"), 404, "job_not_found", "video_id")


def test_clips_are_listed_by_pages(client: TestClient, engine: FakeEngine) -> None:
    empty = client.get(VIDEOS).json()
    assert empty == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    for _ in range(7):
        created(client)
    engine.topology = TOPOLOGY
    client.post("/v1/jobs", json={"prompt": "no clip"})
    for order, names in (("desc", "7654321"), ("asc", "1234567")):
        seen, after = "", None
        while True:
            query = {"order": order, "limit": 3} | ({"after": after} if after else {})
            page = client.get(VIDEOS, params=query).json()
            seen += "".join(one["id"].removeprefix("job") for one in page["data"])
            assert page["first_id"] == page["data"][0]["id"] and page["last_id"] == page["data"][-1]["id"]
            if not page["has_more"]:
                break
            after = page["last_id"]
        assert seen == names, order


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("order=up", "order"),
        ("after=nope", "after"),
    ],
)
def test_a_wrong_query_is_400_and_named(client: TestClient, query: str, param: str) -> None:
    refused(client.get(f"{VIDEOS}?{query}"), 400, "invalid_request", param)


def test_many_jobs_of_other_kinds_hide_no_clip(client: TestClient, engine: FakeEngine) -> None:
    created(client)
    engine.topology = TOPOLOGY
    for _ in range(230):
        client.post("/v1/jobs", json={"prompt": "no clip"})
    (found,) = client.get(VIDEOS).json()["data"]
    assert found["id"] == "job1"
    refused(client.get(f"{VIDEOS}/job2"), 404, "job_not_found", "video_id")


def test_a_clip_is_there_for_its_own_key_alone(engine: FakeEngine) -> None:
    ring = KeyRing([ApiKey(name, hashlib.sha256(name.encode()).digest()) for name in ("ours", "theirs")])
    ours, theirs = ({"Authorization": f"Bearer {name}"} for name in ("ours", "theirs"))
    with TestClient(create_app(engine, ServeSection(), version="1", keys=ring), LOCAL) as client:
        answer = client.post(VIDEOS, json={"prompt": "a"}, headers=ours)
        assert (answer.status_code, answer.json()["id"]) == (200, "job1")
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            answer = client.request(method, f"{VIDEOS}/job1{path}", headers=theirs)
            refused(answer, 404, "job_not_found", "video_id")
        assert client.get(VIDEOS, headers=theirs).json()["data"] == []
        refused(client.get(f"{VIDEOS}?after=job1", headers=theirs), 400, "invalid_request", "after")
        assert [one["id"] for one in client.get(VIDEOS, headers=ours).json()["data"]] == ["job1"]
        refused(client.get(VIDEOS), 401, "not_authenticated", None)
        refused(client.post("/v1/images/edits"), 401, "not_authenticated", None)
    assert engine.views["job1"].record.spec.client == "ours"

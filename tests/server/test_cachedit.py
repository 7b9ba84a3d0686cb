"""cache-dit's API as its users call it: its fields, defaults and replies, with refusals that name what is wrong."""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.server.conftest import LOCAL
from tests.server.fake import TOPOLOGY, FakeEngine, File, Hand, Taken
from tests.server.test_jobs import data_url
from triptych.cluster import FlushReport, WorkerFlush
from triptych.cluster.jobs import Failure, StageRecord
from triptych.config import ServeSection
from triptych.errors import InvalidRequest, NotEnoughMemory, QueueFull
from triptych.model.topology import InputInfo, StageTopology, Topology
from triptych.request import Request
from triptych.server import create_app
from triptych.server.locks.keys import ApiKey, KeyRing

INPUTS = tuple(InputInfo(name) for name in ("prompt", "width", "height", "num_inference_steps", "sigmas", "image"))
STAGE = StageTopology("denoise", (), (), (), INPUTS, (), ())
PICTURES = replace(TOPOLOGY, stages=(STAGE,), guidance="classifier_free")
CLIPS = replace(PICTURES, makes="video")
TIMES = StageRecord(
    stage="denoise", worker="w", seconds=1.5, waited=0.25, fetched=0.125, steps=4, peak_bytes=10
)  # fmt: skip


@dataclass
class Quick(FakeEngine):
    """Every job ends at once: well, or with `failures`."""

    topology: Topology = PICTURES
    failures: tuple[Failure, ...] = ()
    ends: bool = True

    def submit(self, request: Request, **options: Any) -> Taken:
        taken = super().submit(request, **options)
        if self.ends:
            kind = "video/mp4" if self.topology.makes == "video" else "image/png"
            self.files[taken.id] = [File(data=b"made %d" % n, media_type=kind) for n in range(request.num_outputs)]
            self.put(
                taken.id, "failed" if self.failures else "done", started=1000.0, ended=1002.5, finished=[TIMES],
                failures=list(self.failures),
            )  # fmt: skip
        return taken

    @property
    def asked(self) -> Request:
        """What the last job was asked."""
        return self.submitted[-1][0]


@pytest.fixture
def engine() -> Quick:
    return Quick()


def calling(engine: FakeEngine, **settings: Any) -> TestClient:
    app = create_app(engine, ServeSection(**settings), version="1")
    return TestClient(app, LOCAL, raise_server_exceptions=False)


@pytest.fixture
def client(engine: Quick) -> Iterator[TestClient]:
    with calling(engine) as client:
        yield client


def refused(answer: Any, status: int, code: str, field: str | None) -> str:
    """What an error says, in cache-dit's shape."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"detail", "code", "field"} and (body["code"], body["field"]) == (code, field)
    assert field is None or body["detail"].startswith(f"{field}: ")
    return body["detail"]


def test_a_prompt_alone_takes_its_defaults_and_gives_pictures(client: TestClient, engine: Quick) -> None:
    answer = client.post("/generate", json={"prompt": "a cat"})
    assert answer.status_code == 200, answer.text
    assert answer.json() == {
        "images": [base64.b64encode(b"made 0").decode()],
        "time_cost": 2.5,
        "inference_start_time": "1970-01-01T00:16:40.000Z",
        "inference_end_time": "1970-01-01T00:16:42.500Z",
        "warnings": ["a word it was never taught"],
    }
    request = engine.asked
    assert (request.width, request.height, request.num_inference_steps) == (1024, 1024, 50)
    assert (request.guidance_scale, request.negative_prompt, request.seed, request.fps) == (7.5, None, None, None)


def test_every_field_reaches_the_request(client: TestClient, engine: Quick) -> None:
    fields = {
        "prompt": "a cat", "negative_prompt": "dull", "width": 64, "height": 128, "num_inference_steps": 2,
        "guidance_scale": 3, "sigmas": [1.0, 0.5], "seed": 5, "num_images": 3, "include_stats": True,
    }  # fmt: skip
    reply = client.post("/generate", json=fields).json()
    assert len(reply["images"]) == 3
    times = {"stage": "denoise", "seconds": 1.5, "waited": 0.25, "fetched": 0.125, "steps": 4, "peak_bytes": 10}
    assert reply["stats"] == {"cache_stats": [], "stages": [times]}
    assert engine.asked == Request.parse(
        prompt="a cat", negative_prompt="dull", width=64, height=128, num_inference_steps=2, guidance_scale=3,
        sigmas=(1.0, 0.5), seed=5, num_outputs=3,
    )  # fmt: skip


def test_sigmas_say_how_many_steps(client: TestClient, engine: Quick) -> None:
    client.post("/generate", json={"prompt": "a", "sigmas": [1, 0.6, 0.2]}).raise_for_status()
    assert engine.asked.num_inference_steps is None and engine.asked.sigmas == (1.0, 0.6, 0.2)
    wrong = client.post("/generate", json={"prompt": "a", "sigmas": [1], "num_inference_steps": 2})
    refused(wrong, 422, "invalid_request", "sigmas")


def test_a_model_without_a_use_for_a_default_is_not_given_it_and_what_was_said_is_named() -> None:
    bare = StageTopology("denoise", (), (), (), INPUTS[:1], (), ())
    engine = Quick(topology=replace(PICTURES, stages=(bare,), guidance="none"))
    with calling(engine) as client:
        assert client.post("/generate", json={"prompt": "a"}).json()["warnings"] == ["a word it was never taught"]
        assert engine.asked == Request.parse(prompt="a")
        said = {"width": 64, "guidance_scale": 2, "negative_prompt": "x", "fps": 8, "num_frames": 1, "output_dir": "o"}
        warnings = client.post("/generate", json={"prompt": "a", **said}).json()["warnings"]
        assert [text.split(" ")[0] for text in warnings[:-1]] == [
            "width", "negative_prompt", "guidance_scale", "fps", "num_frames", "output_dir",
        ]  # fmt: skip
        assert engine.asked == Request.parse(prompt="a")


def test_clips_come_as_one_video() -> None:
    engine = Quick(topology=CLIPS)
    with calling(engine) as client:
        reply = client.post("/generate", json={"prompt": "a", "num_frames": 17, "fps": 8}).json()
        assert reply["video"] == base64.b64encode(b"made 0").decode() and "images" not in reply
        assert (engine.asked.num_frames, engine.asked.fps) == (17, 8)
        client.post("/generate", json={"prompt": "a"}).raise_for_status()
        assert (engine.asked.num_frames, engine.asked.fps) == (None, 16)
        wrong = client.post("/generate", json={"prompt": "a", "num_images": 2})
        refused(wrong, 422, "invalid_request", "num_images")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"width": 63}, "width"),
        ({"height": 4097}, "height"),
        ({"num_inference_steps": 201}, "num_inference_steps"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"guidance_scale": 20.1}, "guidance_scale"),
        ({"num_images": 5}, "num_images"),
        ({"num_frames": 201}, "num_frames"),
        ({"fps": 61}, "fps"),
        ({"seed": -1}, "seed"),
        ({"sigmas": []}, "sigmas"),
        ({"output_format": "file"}, "output_format"),
        ({"output_dir": "../x"}, "output_dir"),
        ({"output_dir": "/tmp"}, "output_dir"),
        ({"output_dir": ""}, "output_dir"),
        ({"stepz": 3}, "stepz"),
        ({"image_urls": ["/etc/passwd"]}, "image_urls[0]"),
        ({"image_urls": ["file:" + "///etc/passwd"]}, "image_urls[0]"),
        ({"image_urls": ["file-" + "0" * 32]}, "image_urls[0]"),
        ({"image_urls": ["http://127.0.0.1/a.png"]}, "image_urls[0]"),
        ({"image_urls": ["A" * 101]}, "image_urls[0]"),
        ({"image_urls": "data:image/png;base64,AAAA"}, "image_urls"),
        ({"image_urls": ["x"] * 17}, "image_urls[0]"),
    ],
)
def test_a_wrong_field_is_named(client: TestClient, engine: Quick, fields: dict[str, Any], field: str) -> None:
    body = {"prompt": "a", **fields} if fields else {}
    detail = refused(client.post("/generate", json=body), 422, "invalid_request", field)
    assert "allowed" in detail
    assert not engine.submitted


def test_what_the_engine_refuses_is_told_in_these_words(client: TestClient, engine: Quick) -> None:
    engine.refuse = InvalidRequest.of("num_outputs", 2, "1")
    refused(client.post("/generate", json={"prompt": "a", "num_images": 2}), 422, "invalid_request", "num_images")
    engine.refuse = QueueFull("full", retry_after=3)
    answer = client.post("/generate", json={"prompt": "a"})
    refused(answer, 429, "queue_full", None)
    assert answer.headers["retry-after"] == "3"
    engine.refuse = NotEnoughMemory("too large", field="width, height")
    refused(client.post("/generate", json={"prompt": "a"}), 429, "not_enough_memory", "width, height")
    engine.missing = ("denoise",)
    refused(client.post("/generate", json={"prompt": "a"}), 503, "no_worker", None)
    refused(client.post("/generate", content=b"{", headers={"Content-Type": "application/json"}), 422,
            "invalid_request", "body")  # fmt: skip
    refused(client.post("/generate", content=b"{}"), 415, "wrong_media_type", "content-type")
    assert client.get("/generate").status_code == 405 and "detail" in client.get("/generate").json()


def test_a_job_that_fails_says_why(client: TestClient, engine: Quick) -> None:
    engine.failures = (Failure(stage="denoise", worker="w", code="invalid_request", message="odd", field="images"),)
    refused(client.post("/generate", json={"prompt": "a"}), 422, "invalid_request", "image_urls")
    engine.failures = (Failure(stage="denoise", worker="w", code="stage_failed", message="boom"),)
    assert "boom" in refused(client.post("/generate", json={"prompt": "a"}), 500, "stage_failed", None)


def test_it_waits_for_the_end_and_a_cancelled_job_is_told(client: TestClient, engine: Quick) -> None:
    engine.ends = False
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append(client.post("/generate", json={"prompt": "a"})))
    waiting.start()
    give_up = time.monotonic() + 30
    while not engine.watchers.get("job1") and time.monotonic() < give_up:
        waiting.join(0.01)
    assert not answers
    engine.cancel("job1")
    waiting.join(30)
    refused(answers[0], 409, "cancelled", None)


def test_pictures_come_as_data_base64_or_uploads(client: TestClient, engine: Quick) -> None:
    url = data_url(Image.new("RGB", (16, 8), "red"))
    large = data_url(Image.effect_noise((16, 16), 50).convert("RGB"))
    sent = client.post("/v1/files", files={"file": base64.b64decode(url.partition(",")[2])})
    assert sent.status_code == 200, sent.text
    given = [url, large.partition(",")[2], sent.json()["id"]]
    client.post("/generate", json={"prompt": "a", "image_urls": given}).raise_for_status()
    assert [picture.size for picture in engine.asked.images] == [(16, 8), (16, 16), (16, 8)]
    assert engine.asked.images[2].getpixel((0, 0)) == (255, 0, 0)


def test_a_picture_that_is_none_is_400(client: TestClient) -> None:
    wrong = "data:image/png;base64," + base64.b64encode(b"<svg xmlns='x'/>").decode()
    refused(client.post("/generate", json={"prompt": "a", "image_urls": [wrong]}), 400, "invalid_media",
            "image_urls[0]")  # fmt: skip


def test_paths_only_where_the_operator_named_a_folder(client: TestClient, engine: Quick, tmp_path: Path) -> None:
    answer = client.post("/generate", json={"prompt": "a", "output_format": "path"})
    assert "writes no files" in refused(answer, 400, "unsupported", "output_format")
    assert not engine.submitted
    folder = tmp_path / "made"
    with calling(engine, output_folder=folder) as client:
        fields = {"prompt": "a", "num_images": 2, "output_format": "path"}
        first = client.post("/generate", json=fields).json()["images"]
        second = client.post("/generate", json={**fields, "output_dir": "mine"}).json()["images"]
    job = list(engine.views)
    assert [Path(name) for name in first] == [folder / f"image_{job[0]}_{index}.png" for index in range(2)]
    assert [Path(name) for name in second] == [folder / "mine" / f"image_{job[1]}_{index}.png" for index in range(2)]
    assert [Path(name).read_bytes() for name in first] == [b"made 0", b"made 1"]
    assert {path.name for path in folder.rglob("*")} == {"mine", *(Path(name).name for name in [*first, *second])}


def test_nothing_is_written_elsewhere_by_a_link_or_for_a_refused_request(engine: Quick, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "made", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "link").symlink_to(elsewhere)
    (folder / "taken").write_text("a file")
    with calling(engine, output_folder=folder) as client:
        fields = {"prompt": "a", "output_format": "path"}
        refused(client.post("/generate", json={**fields, "output_dir": "link"}), 400, "unsupported", "output_dir")
        refused(client.post("/generate", json={**fields, "output_dir": "taken"}), 503, "storage_failed", None)
        refused(client.post("/generate", json={**fields, "output_dir": "new", "image_urls": ["x"]}), 422,
                "invalid_request", "image_urls[0]")  # fmt: skip
    assert not engine.submitted and not list(elsewhere.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == ["link", "taken"]


def test_a_video_goes_to_a_file_too(tmp_path: Path) -> None:
    with calling(Quick(topology=CLIPS), output_folder=tmp_path) as client:
        path = Path(client.post("/generate", json={"prompt": "a", "output_format": "path"}).json()["video"])
    assert path.parent == tmp_path and path.suffix == ".mp4" and path.read_bytes() == b"made 0"


def test_the_model_is_told(client: TestClient, engine: Quick) -> None:
    info = client.get("/get_model_info").json()
    assert list(info.items())[:3] == [("model_path", "toy"), ("device", ""), ("torch_dtype", "")]
    engine.workers = (Hand(("encode",), "cpu", "torch.float16"), Hand(("denoise",), "cuda:0", "torch.bfloat16"))
    assert client.get("/get_model_info").json() == {
        "model_path": "toy", "device": "cuda:0", "torch_dtype": "torch.bfloat16", "enable_cache": False,
        "is_loaded": True,
    }  # fmt: skip
    engine.missing = ("denoise",)
    assert client.get("/get_model_info").json()["is_loaded"] is False


def test_a_flush_tells_what_it_freed_and_what_it_did_not(client: TestClient, engine: Quick) -> None:
    refused(client.post("/flush_cache"), 503, "no_worker", None)
    one = WorkerFlush(worker="w", stages={"encode": {"prompts": 5}}, process={"transfer": 7}, failed={})
    engine.flushed = FlushReport(workers=(one,), coordinator={"transfer": 1})
    found = client.post("/flush_cache").json()
    assert found == {
        "message": "Cache flushed successfully", "freed_bytes": 13, "coordinator": {"transfer": 1}, "unanswered": [],
        "workers": [{"worker": "w", "stages": {"encode": {"prompts": 5}}, "process": {"transfer": 7}, "failed": {}}],
    }  # fmt: skip
    two = WorkerFlush(worker="v", stages={}, process={}, failed={"encode/prompts": "OSError: stuck"})
    engine.flushed = FlushReport(workers=(one, two), unanswered=("u",))
    found = client.post("/flush_cache").json()
    assert found["message"] == "Cache flushed in part; not yet answered: u; failed: v: encode/prompts"
    assert found["unanswered"] == ["u"]
    engine.refuse = QueueFull("a flush is under way")
    refused(client.post("/flush_cache"), 429, "queue_full", None)


def test_keys_are_needed_and_an_admins_to_flush(engine: Quick) -> None:
    ring = KeyRing(
        [ApiKey(name, hashlib.sha256(name.encode()).digest(), admin=name == "admin") for name in ("admin", "user")]
    )
    app = create_app(engine, ServeSection(), version="1", keys=ring)
    engine.flushed = FlushReport(coordinator={"transfer": 0}, unanswered=("w",))
    with TestClient(app, LOCAL) as client:
        for method, path in (("GET", "/get_model_info"), ("POST", "/generate"), ("POST", "/flush_cache")):
            refused(client.request(method, path), 401, "not_authenticated", None)
        user, admin = ({"Authorization": f"Bearer {name}"} for name in ("user", "admin"))
        refused(client.post("/flush_cache", headers=user), 403, "forbidden", None)
        assert client.post("/flush_cache", headers=admin).status_code == 200
        client.post("/generate", json={"prompt": "a"}, headers=user).raise_for_status()
        assert engine.submitted[-1][1]["client"] == "user"

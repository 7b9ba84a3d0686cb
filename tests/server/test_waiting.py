"""Clients that wait, hang up, come back, or look on while others wait: nobody holds up anybody else."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from tests.server.conftest import LOCAL
from tests.server.fake import TOPOLOGY, FakeEngine, File
from tests.server.test_jobs import refused, submitted, until
from triptych.cluster.jobs import Failure, Outcome
from triptych.config import ServeSection
from triptych.errors import InvalidRequest
from triptych.server import create_app
from triptych.server.errors import JobNotFound
from triptych.server.follow import Follower
from triptych.server.routes import jobs, openai_videos

PATIENCE = 10.0
BLOCKING = ("submit", "view", "cancel", "watch", "jobs", "estimate", "result_files", "status", "flush")
"""What an engine may take its time for."""


class OffLoop(FakeEngine):
    """Whatever may wait is called on threads that nobody else waits for."""

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in BLOCKING:
            return found

        def call(*args: Any, **options: Any) -> Any:
            with pytest.raises(RuntimeError, match="no running event loop"):
                asyncio.get_running_loop()
            return found(*args, **options)

        return call


def hung_up(engine: FakeEngine, path: str, body: dict[str, Any], **headers: str) -> list[Any]:
    """What is said to a client that hangs up once its job was taken."""
    left, sent = asyncio.Event(), []
    parts = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])
    given = {"host": "localhost", "content-type": "application/json", **headers}

    async def receive() -> Any:
        if (part := next(parts, None)) is not None:
            return part
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def call() -> None:
        scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
            "http_version": "1.1", "scheme": "http",
        }  # fmt: skip
        running = asyncio.create_task(create_app(engine, ServeSection(), version="1")(scope, receive, send))
        while not engine.watchers:
            await asyncio.sleep(0.01)
        left.set()
        await asyncio.wait_for(running, PATIENCE)

    asyncio.run(call())
    return sent


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/v1/jobs", {"prefer": "wait=60"}),
        ("/generate", {}),
        ("/v1/images/generations", {}),
        ("/v1/tasks/image/sync", {}),
    ],
)
def test_hanging_up_cancels_and_is_no_mistake_of_the_fields(path: str, headers: dict[str, str]) -> None:
    engine = OffLoop()
    sent = hung_up(engine, path, {"prompt": "a"}, **headers)
    assert sent[0]["status"] == 499 and b"client_closed_request" in sent[1]["body"]
    assert [view.record.state for view in engine.views.values()] == ["cancelled"]


def test_a_stream_that_is_left_cancels_off_the_loop() -> None:
    engine = OffLoop()
    hung_up(engine, "/v1/images/generations", {"prompt": "a", "stream": True})
    assert [view.record.state for view in engine.views.values()] == ["cancelled"]


def test_a_job_with_a_name_is_there_to_come_back_to(engine: FakeEngine) -> None:
    sent = hung_up(engine, "/v1/jobs", {"prompt": "a"}, **{"prefer": "wait=60", "idempotency-key": "order-17"})
    assert sent[0]["status"] == 499
    assert [view.record.state for view in engine.views.values()] == ["queued"]


def test_a_job_that_is_there_is_not_taken_in_again(
    client: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = {"Idempotency-Key": "order-17"}
    first = client.post("/v1/jobs", json={"prompt": "a"}, headers=key).json()["id"]

    def never(*args: Any) -> Any:
        raise AssertionError("its pictures were looked at once more")

    monkeypatch.setattr(jobs, "job_of", never)
    again = client.post("/v1/jobs", json={"prompt": "a"}, headers=key)
    assert again.json()["id"] == first and again.headers["idempotent-replayed"] == "true"
    refused(client.post("/v1/jobs", json={"prompt": "b"}, headers=key), 409, "conflict", "idempotency-key")


LOST = Failure(stage=None, worker="", code="no_worker", message="every process has ended")


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("path", ["/generate", "/v1/images/generations", "/v1/tasks/image/sync"])
def test_who_waits_for_a_job_that_is_given_up_is_told_so(
    client: TestClient, engine: FakeEngine, path: str, kept: bool
) -> None:
    def give_up() -> None:
        until(lambda: engine.watchers.get("job1"))
        if kept:  # the job stays as it is, and whoever watches it hears that
            engine.tell("job1", Outcome(state="failed", failures=(LOST,)))
        else:
            engine.put("job1", "failed", ended=1.0, failures=[LOST])

    giving = threading.Thread(target=give_up)
    giving.start()
    answer = client.post(path, json={"prompt": "a"})
    giving.join()
    assert answer.status_code == 503 and "no_worker" in answer.text and "retry-after" in answer.headers
    assert engine.views["job1"].record.state == ("queued" if kept else "failed")


def test_a_wait_for_a_job_that_goes_on_later_ends_with_the_job(client: TestClient, engine: FakeEngine) -> None:
    def give_up() -> None:
        until(lambda: engine.watchers.get("job1"))
        engine.tell("job1", Outcome(state="failed", failures=(LOST,)))

    giving = threading.Thread(target=give_up)
    giving.start()
    answer = client.post("/v1/jobs", json={"prompt": "a"}, headers={"Prefer": "wait=60"})
    giving.join()
    assert (answer.status_code, answer.json()["state"]) == (202, "queued")


def test_a_result_that_expires_meanwhile_is_gone(
    client: TestClient, engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, path = submitted(client), tmp_path / "0.png"
    path.write_bytes(b"0123456789")
    engine.files[job] = [File(path=path)]
    engine.put(job, "done", ended=1.0)
    found = jobs.result_response

    def and_expire(*args: Any) -> Any:
        response = found(*args)
        path.unlink()
        return response

    monkeypatch.setattr(jobs, "result_response", and_expire)
    refused(client.get(f"/v1/jobs/{job}/results/0"), 410, "result_gone", None)
    path.write_bytes(b"0123456789")
    refused(client.get(f"/v1/jobs/{job}/results/0", headers={"Range": "bytes=1-2"}), 410, "result_gone", None)


def test_a_job_that_is_forgotten_between_two_looks_is_not_found(
    client: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgotten(job: str, watcher: Any) -> Any:
        raise InvalidRequest.of("job", job, "a job that was submitted and has not expired")

    with pytest.raises(JobNotFound):
        Follower(forgotten).begin("job1")
    job = submitted(client)
    app: Any = client.app
    app.state.front.follower.forget(job)
    monkeypatch.setattr(app.state.front.follower, "_watch", forgotten)
    answer = client.get(f"/v1/jobs/{job}/events")
    assert answer.status_code == 200 and answer.text.count("event: ") == 1, "as it stood, and that is all"


@pytest.fixture
def watchful() -> Iterator[TestClient]:
    with TestClient(create_app(OffLoop(), ServeSection(), version="1"), LOCAL) as client:
        yield client


def test_nothing_that_may_wait_holds_up_the_loop(watchful: TestClient) -> None:
    app: Any = watchful.app
    engine: OffLoop = app.state.front.door
    job = submitted(watchful)
    app.state.front.follower.forget(job)  # it has to be watched anew
    engine.files[job] = [File(data=b"a picture")]
    engine.put(job, "done", ended=1.0)
    for path in (f"/v1/jobs/{job}", f"/v1/jobs/{job}/events", f"/v1/jobs/{job}/results/0", "/v1/jobs", "/health"):
        assert watchful.get(path).status_code == 200
    assert watchful.get(f"/v1/tasks/{job}/status").status_code == 200
    assert watchful.get(f"/v1/tasks/{job}/result").content == b"a picture"
    assert watchful.post("/v1/tasks/image/", json={"prompt": "a"}).status_code == 200
    assert watchful.post("/v1/tasks/image/sync?timeout_seconds=1", json={"prompt": "a"}).status_code == 504
    assert watchful.post("/v1/jobs", json={"prompt": "a"}, headers={"Prefer": "wait=0"}).status_code == 202
    engine.topology = replace(TOPOLOGY, makes="video")
    clip = watchful.post("/v1/videos", json={"prompt": "a"})
    assert clip.status_code == 200 and watchful.get(f"/v1/videos/{clip.json()['id']}/content").status_code == 409


def test_slow_downloads_leave_threads_for_everybody_else(client: TestClient, engine: FakeEngine) -> None:
    job = submitted(client)
    engine.put(job, "done", ended=1.0)
    slow, begun = threading.Event(), threading.Semaphore(0)

    def fetched(name: str) -> list[File]:
        begun.release()
        assert slow.wait(PATIENCE)
        return [File(data=b"a picture")]

    engine.result_files = fetched  # pyright: ignore[reportAttributeAccessIssue]

    async def crowd() -> list[int]:
        app = create_app(engine, ServeSection(), version="1")
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=LOCAL) as some:
            waiting = [asyncio.create_task(some.get(f"/v1/jobs/{job}/results/0")) for _ in range(60)]
            while not begun.acquire(blocking=False):
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            other = await asyncio.wait_for(some.get("/v1/jobs?state=queued"), PATIENCE / 2)
            assert other.status_code == 200 and not any(task.done() for task in waiting)
            slow.set()
            return [answer.status_code for answer in await asyncio.gather(*waiting)]

    assert asyncio.run(crowd()) == [200] * 60


def test_the_oldest_clips_are_looked_for_within_bounds(
    client: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_videos, "LOOKED_AT", 4)
    monkeypatch.setattr(openai_videos, "PAGE", 2)
    engine.topology = replace(TOPOLOGY, makes="video")
    for _ in range(20):
        submitted(client)
    asked, found = [], engine.jobs

    def listed(**options: Any) -> Any:
        asked.append(options)
        return found(**options)

    engine.jobs = listed  # pyright: ignore[reportAttributeAccessIssue]
    page = client.get("/v1/videos", params={"order": "asc", "limit": 2}).json()
    assert [one["id"] for one in page["data"]] == ["job17", "job18"] and page["has_more"]
    assert len(asked) <= 3
    rest = client.get("/v1/videos", params={"order": "asc", "limit": 2, "after": "job18"}).json()
    assert [one["id"] for one in rest["data"]] == ["job19", "job20"] and not rest["has_more"]

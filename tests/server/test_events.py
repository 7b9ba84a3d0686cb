"""A job's events as a client reads them."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.server.fake import FakeEngine
from tests.server.test_jobs import refused, submitted, until
from triptych.cluster import Estimate
from triptych.messages import Picture, Stepped
from triptych.server import events


def step(number: int, preview: Picture | None = None, stage: Any = "denoise") -> Stepped:
    return Stepped(job="job1", stage=stage, attempt=1, step=number, steps=4, seconds=number / 10, preview=preview)


def read(text: str) -> list[tuple[str, str | None, Any]]:
    """Name, id and data of each event; a comment has the name `:`."""
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        if block.startswith(":"):
            found.append((":", None, None))
            continue
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        assert fields.keys() <= {"id", "event", "data"}, block
        found.append((fields["event"], fields.get("id"), json.loads(fields["data"])))
    return found


def listened(client: TestClient, job: str) -> None:
    """Waits until somebody listens to a job."""
    tracks = follower(client)._tracks
    until(lambda: job in tracks and tracks[job].bells)


def follower(client: TestClient) -> Any:
    app: Any = client.app
    return app.state.front.follower


@pytest.fixture
def told(client: TestClient, engine: FakeEngine) -> Callable[..., list[tuple[str, str | None, Any]]]:
    """What is told of a job when, once somebody listens, this happens to it."""

    def listen(job: str, happens: Callable[[], Any] | None = None, **headers: str) -> list[tuple[str, str | None, Any]]:
        acting = threading.Thread(target=happens) if happens else None
        if acting:
            acting.start()
        answer = client.get(f"/v1/jobs/{job}/events", headers=headers)
        if acting:
            acting.join()
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        return read(answer.text)

    return listen


def test_a_job_is_told_from_its_first_step_to_its_end(told: Any, client: TestClient, engine: FakeEngine) -> None:
    job = submitted(client)
    for event in (step(1, stage="encode"), step(1), step(2)):
        engine.tell(job, event)
    engine.estimates[job] = Estimate(0.0, 3.0)
    engine.put(job, "done", ended=9.0)
    found = told(job)
    assert [(name, number) for name, number, _ in found] == [
        ("job", None), ("progress", "1"), ("progress", "2"), ("progress", "3"), ("done", "4"),
    ]  # fmt: skip
    _, encoded, _, second, last = (data for _, _, data in found)
    assert (encoded["stage"], second["stage"], second["step"], second["steps"]) == ("encode", "denoise", 2, 4)
    assert second["seconds"] == 0.2 and second["done_in"] == pytest.approx(3.0, abs=0.5) and "preview" not in second
    assert last == client.get(f"/v1/jobs/{job}").json()


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_the_last_event_says_how_it_ended(told: Any, client: TestClient, engine: FakeEngine, state: Any) -> None:
    job = submitted(client)
    found = told(job, lambda: (listened(client, job), engine.put(job, state, ended=9.0)))
    assert [name for name, _, _ in found] == ["job", state]
    assert (found[0][2]["state"], found[1][2]["state"]) == ("queued", state)


def test_previews_are_pictures(told: Any, client: TestClient, engine: FakeEngine) -> None:
    job = submitted(client, preview=True)
    pixels = bytes(range(4 * 2 * 3))
    engine.tell(job, step(1, Picture(width=4, height=2, pixels=pixels)))
    engine.put(job, "done", ended=9.0)
    again = submitted(client, preview=True)

    def go_on() -> None:
        listened(client, again)
        engine.tell(again, step(1, Picture(width=4, height=2, pixels=pixels)))
        time.sleep(0.2)  # of an ended job no preview is kept
        engine.put(again, "done", ended=9.0)

    assert "preview" not in told(job)[1][2], "it has ended: there is the picture itself"
    (progress,) = [data for name, _, data in told(again, go_on) if name == "progress"]
    head, _, body = progress["preview"].partition(",")
    assert head == "data:image/png;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(body)))
    assert (picture.size, picture.tobytes()) == ((4, 2), pixels)


def test_who_comes_back_is_told_what_came_after(told: Any, client: TestClient, engine: FakeEngine) -> None:
    job = submitted(client)
    for number in (1, 2, 3):
        engine.tell(job, step(number))
    engine.put(job, "done", ended=9.0)
    found = told(job, **{"Last-Event-ID": "2"})
    assert [(name, number) for name, number, _ in found] == [("job", None), ("progress", "3"), ("done", "4")]
    assert [name for name, _, _ in told(job, **{"Last-Event-ID": "4"})] == ["job", "done"], "the end is never missed"


def test_an_id_of_a_former_life_hides_nothing(told: Any, client: TestClient, engine: FakeEngine) -> None:
    """A restarted server counts anew: of a job that has ended it knows the end, of one that runs what comes."""
    ended, running = submitted(client), submitted(client)
    follower(client).forget(ended)
    engine.put(ended, "done", ended=9.0)
    found = told(ended, **{"Last-Event-ID": "57"})
    assert [name for name, _, _ in found] == ["job", "done"] and found[0][2]["state"] == "done"
    engine.tell(running, step(3))
    engine.put(running, "done", ended=9.0)
    assert [name for name, _, _ in told(running, **{"Last-Event-ID": "57"})] == ["job", "progress", "done"]


def test_a_job_that_waits_is_told_its_place(
    told: Any, client: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "LOOK", 0.02)
    monkeypatch.setattr(events, "AGAIN", 0.2)
    first, second = submitted(client), submitted(client)

    def go_on() -> None:
        listened(client, second)
        time.sleep(0.1)
        engine.estimates[second] = Estimate(1.0, 2.0)
        engine.views[second] = replace(engine.views[second], position=0)
        time.sleep(0.4)
        engine.put(second, "done", ended=9.0)

    names = told(second, go_on)
    assert names[0][2]["position"] == 1 and names[0][2]["starts_in"] is None
    waits = [data for name, _, data in names if name == "queued"]
    assert waits and all(one == {"position": 0, "starts_in": 1.0, "done_in": 2.0} for one in waits)
    assert 2 <= len(waits) <= 4, "when it changes, and then now and then"
    assert [name for name, _, _ in names if name != "queued"] == ["job", "done"] and first != second


def test_silence_is_filled_with_comments(
    told: Any, client: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "LOOK", 0.02)
    monkeypatch.setattr(events, "KEEP_ALIVE", 0.1)
    job = submitted(client)
    engine.put(job, "running", started=1.0)
    found = told(job, lambda: (time.sleep(0.5), engine.put(job, "done", ended=9.0)))
    names = [name for name, _, _ in found]
    assert 2 <= names.count(":") <= 5 and names[0] == "job" and names[-1] == "done"


def test_a_job_that_is_forgotten_ends_its_stream(told: Any, client: TestClient, engine: FakeEngine) -> None:
    job = submitted(client)

    def forget() -> None:
        listened(client, job)
        time.sleep(0.1)
        del engine.views[job]
        follower(client).forget(job)

    assert [name for name, _, _ in told(job, forget)] == ["job"]


def test_wrong_ids_are_refused(client: TestClient) -> None:
    job = submitted(client)
    refused(client.get("/v1/jobs/unknown/events"), 404, "job_not_found", "job")
    for wrong in ("x", "-1", "1.5", "9" * 30):
        answer = client.get(f"/v1/jobs/{job}/events", headers={"Last-Event-ID": wrong})
        refused(answer, 422, "invalid_request", "last-event-id")


def test_a_slow_reader_is_told_what_there_is_and_keeps_nothing(client: TestClient, engine: FakeEngine) -> None:
    job = submitted(client)
    for number in range(3000):
        engine.tell(job, step(number, Picture(width=1, height=1, pixels=b"\0\0\0")))
    engine.put(job, "done", ended=9.0)
    found = read(client.get(f"/v1/jobs/{job}/events").text)
    assert len(found) <= 1026 and found[-1][0] == "done" and found[-1][1] == "3001"


def test_a_new_job_of_an_old_one_s_id_begins_anew(told: Any, client: TestClient, engine: FakeEngine) -> None:
    key = {"Idempotency-Key": "order-17"}
    job = client.post("/v1/jobs", json={"prompt": "a"}, headers=key).json()["id"]
    engine.tell(job, step(1))
    engine.put(job, "failed", ended=9.0)
    assert [name for name, _, _ in told(job)] == ["job", "progress", "failed"]
    engine.forget(job)  # it has expired
    assert client.post("/v1/jobs", json={"prompt": "a"}, headers=key).json()["id"] == job
    again = client.post("/v1/jobs", json={"prompt": "a"}, headers=key)
    assert again.headers["idempotent-replayed"] == "true"
    engine.tell(job, step(2))
    engine.put(job, "done", ended=9.0)
    found = told(job)
    assert [(name, number) for name, number, _ in found] == [("job", None), ("progress", "1"), ("done", "2")]
    assert found[1][2]["step"] == 2


def test_a_reader_that_leaves_is_forgotten_and_cancels_nothing(client: TestClient, engine: FakeEngine) -> None:
    job = submitted(client)
    following = follower(client)
    left = asyncio.Event()

    async def receive() -> Any:
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    async def read_and_leave() -> None:
        path = f"/v1/jobs/{job}/events"
        scope = {
            "type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": [(b"host", b"localhost")], "http_version": "1.1", "scheme": "http",
        }  # fmt: skip
        reading = asyncio.create_task(client.app(scope, receive, send))  # pyright: ignore[reportArgumentType]
        while not following._tracks[job].bells:
            await asyncio.sleep(0.01)
        left.set()
        await asyncio.wait_for(reading, 10)

    asyncio.run(read_and_leave())
    assert not following._tracks[job].bells and engine.views[job].record.state == "queued"

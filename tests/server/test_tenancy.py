"""A key's jobs are its own: whoever else asks for them learns nothing, by whatever route and however often."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from tests.server.conftest import LOCAL
from tests.server.fake import TOPOLOGY, FakeEngine, File
from triptych.config import ServeSection
from triptych.server import KeyRing, create_app
from triptych.server.locks.keys import ApiKey

HEADERS = {name: {"Authorization": f"Bearer key-of-{name}"} for name in ("alice", "bob", "root")}
UNKNOWN = {"job": "0123456789abcdef0123456789abcdef", "file": "file-0123456789abcdef0123456789abcdef"}
ADMINS = [("GET", "/v1/cluster"), ("GET", "/metrics"), ("POST", "/flush_cache")]


def app_of(engine: FakeEngine) -> FastAPI:
    ring = KeyRing(ApiKey.of(name, f"key-of-{name}", name == "root") for name in HEADERS)
    return create_app(engine, ServeSection(), version="1", keys=ring)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(topology=replace(TOPOLOGY, makes="video", workflow="text2video", workflows=("text2video",)))


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[TestClient]:
    with TestClient(app_of(engine), LOCAL, raise_server_exceptions=False) as client:
        yield client


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def owned(client: TestClient, engine: FakeEngine) -> dict[str, str]:
    """A finished job and an upload of alice's."""
    headers = {**HEADERS["alice"], "Idempotency-Key": "holiday"}
    job = client.post("/v1/jobs", json={"prompt": "alice's secret"}, headers=headers)
    assert job.status_code == 202, job.text
    file = client.post(
        "/v1/files", files={"file": ("a.png", png())}, data={"purpose": "vision"}, headers=HEADERS["alice"]
    )
    assert file.status_code == 200, file.text
    engine.files[job.json()["id"]] = [File(data=b"clip", media_type="video/mp4")]
    engine.put(job.json()["id"], "done", ended=9.0)
    return {"job": job.json()["id"], "file": file.json()["id"]}


def routes() -> list[tuple[str, str, str]]:
    """Method, path, and what its id is of, of every route that takes one."""
    found = []
    for path, methods in app_of(FakeEngine()).openapi()["paths"].items():
        named = re.search(r"\{(job|task_id|video_id|file)\}", path)
        paths = [path, f"{path}/"] if path.startswith("/v1/tasks") else [path]
        if named is not None:
            kind = "file" if named[1] == "file" else "job"
            found += [(method.upper(), one, kind) for method in methods for one in paths]
    return found


def ask(client: TestClient, who: str, method: str, path: str, id: str, **options: Any) -> Any:
    """An answer, and the id out of its text."""
    url = re.sub(r"\{(job|task_id|video_id|file)\}", id, path).replace("{number}", "0")
    answer = client.request(method, url, headers={**HEADERS[who], **options.pop("headers", {})}, **options)
    return answer.status_code, answer.text.replace(id, "ID")


def test_there_are_routes_to_try() -> None:
    assert len(routes()) >= 15


@pytest.mark.parametrize(("method", "path", "kind"), routes())
def test_every_route_that_takes_an_id(
    client: TestClient, engine: FakeEngine, owned: dict[str, str], method: str, path: str, kind: str
) -> None:
    before = dict(engine.views)
    unknown = ask(client, "bob", method, path, UNKNOWN[kind])
    assert unknown[0] == 404
    for stranger in ("bob", "root"):
        assert ask(client, stranger, method, path, owned[kind]) == unknown, "another's is like none"
    assert engine.views == before
    url = path.replace("{number}", "0")
    assert client.request(method, re.sub(r"\{\w+\}", owned[kind], url)).status_code == 401
    assert ask(client, "alice", method, path, owned[kind])[0] == 200


def test_twenty_tries_of_a_second_key_are_all_refused_alike(
    client: TestClient, engine: FakeEngine, owned: dict[str, str]
) -> None:
    job, file = owned["job"], owned["file"]
    alice = HEADERS["alice"]["Authorization"]
    tries: list[tuple[str, str, dict[str, str]]] = [
        ("GET", f"/v1/jobs/{job}", {}),
        ("DELETE", f"/v1/jobs/{job}", {}),
        ("GET", f"/v1/jobs/{job}/events", {}),
        ("GET", f"/v1/jobs/{job}/events", {"Last-Event-ID": "1"}),
        ("GET", f"/v1/jobs/{job}/results/0", {}),
        ("GET", f"/v1/jobs/{job}/results/0", {"Range": "bytes=0-3"}),
        ("GET", f"/v1/jobs/{job}/results/99", {}),
        ("GET", f"/v1/jobs?before={job}", {}),
        ("GET", f"/v1/videos/{job}", {}),
        ("GET", f"/v1/videos/{job}/content", {}),
        ("GET", f"/v1/videos/{job}/content?variant=thumbnail", {}),
        ("DELETE", f"/v1/videos/{job}", {}),
        ("GET", f"/v1/tasks/{job}/status", {}),
        ("GET", f"/v1/tasks/{job}/result", {}),
        ("DELETE", f"/v1/tasks/{job}", {}),
        ("GET", f"/v1/files/{file}", {}),
        ("DELETE", f"/v1/files/{file}", {}),
        ("GET", f"/v1/jobs/{job}?client=alice&user=alice", {"X-Forwarded-User": "alice", "X-Api-Key": alice[7:]}),
        ("GET", f"/v1/jobs/{job}", {"Cookie": f"authorization={alice}", "X-Original-URL": f"/v1/jobs/{job}"}),
        ("GET", f"/v1/jobs/{job}%20", {}),
        ("GET", f"/v1/jobs/{job.upper()}", {}),
        ("GET", f"/v1/jobs/..%2Fjobs%2F{job}", {}),
        ("GET", f"/v1/jobs/{job}%00", {}),
        ("GET", f"/v1/jobs/{job[:-1]}", {}),
    ]
    assert len(tries) >= 20
    before = dict(engine.views)
    for method, path, headers in tries:
        answer = client.request(method, path, headers={**headers, **HEADERS["bob"]})
        assert answer.status_code == 404, (path, answer.text)
        assert "secret" not in answer.text and "alice" not in answer.text
    assert engine.views == before and engine.files[job] and len(engine.submitted) == 1
    assert client.get(f"/v1/jobs/{job}/results/0", headers=HEADERS["alice"]).content == b"clip"
    assert client.get(f"/v1/files/{file}", headers=HEADERS["alice"]).status_code == 200


def test_lists_are_of_ones_own(client: TestClient, owned: dict[str, str]) -> None:
    for path in ("/v1/jobs", "/v1/jobs?state=done&limit=100", "/v1/videos", "/v1/videos?order=asc&limit=100"):
        assert [one["id"] for one in client.get(path, headers=HEADERS["alice"]).json()["data"]] == [owned["job"]]
        for stranger in ("bob", "root"):
            assert client.get(path, headers=HEADERS[stranger]).json()["data"] == []
    assert owned["job"] not in client.get("/v1/tasks/queue/status", headers=HEADERS["bob"]).text
    for order in ("asc", "desc"):
        after = [
            client.get(f"/v1/videos?order={order}&after={id}", headers=HEADERS["bob"])
            for id in (owned["job"], UNKNOWN["job"])
        ]
        assert [answer.status_code for answer in after] == [400, 400]
        assert after[0].text.replace(owned["job"], UNKNOWN["job"]) == after[1].text


def test_a_name_for_a_job_is_its_givers(client: TestClient, engine: FakeEngine, owned: dict[str, str]) -> None:
    """The same Idempotency-Key, with the same body and with another one: neither replays nor hits alice's job."""
    for prompt in ("alice's secret", "bob's"):
        headers = {**HEADERS["bob"], "Idempotency-Key": "holiday"}
        answer = client.post("/v1/jobs", json={"prompt": prompt}, headers=headers)
        if prompt == "bob's":
            assert answer.status_code == 409, "with his own"
        else:
            assert answer.status_code == 202 and answer.json()["id"] != owned["job"]
    assert len(engine.submitted) == 2


def test_anothers_upload_is_no_picture_of_mine(client: TestClient, engine: FakeEngine, owned: dict[str, str]) -> None:
    taken = len(engine.submitted)
    for who, status in (("bob", 422), ("root", 422)):
        body = {"prompt": "a", "image_path": owned["file"]}
        answer = client.post("/v1/tasks/video/", json=body, headers=HEADERS[who])
        assert answer.status_code == status, answer.text
    assert len(engine.submitted) == taken


def test_a_cluster_is_an_admins(client: TestClient, engine: FakeEngine) -> None:
    def allowed(client: TestClient, method: str, path: str, who: str = "") -> int | bool:
        status = client.request(method, path, headers=HEADERS.get(who)).status_code
        return status if status in (401, 403) else True

    for method, path in ADMINS:
        assert [allowed(client, method, path, who) for who in ("", "alice", "root")] == [401, 403, True], path
    with TestClient(create_app(engine, ServeSection(), version="1"), LOCAL) as keyless:
        assert all(allowed(keyless, method, path) is True for method, path in ADMINS)


OPEN = {"/health", "/docs", "/openapi.json", "/docs/oauth2-redirect"}


def test_nothing_else_answers_without_a_key(client: TestClient) -> None:
    page = client.get("/openapi.json").json()["paths"]
    for path, methods in page.items():
        for method in methods:
            answer = client.request(method, re.sub(r"\{\w+\}", "0", path), json={"prompt": "a"})
            assert answer.status_code == (200 if path in OPEN else 401), (method, path, answer.text)

"""The clients and the native API against real servers: killed and started again, hung up on, asked twice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from PIL import Image

from tests.e2e.commands import ENDED, PROMPT, Server, short_folder, until
from triptych import AsyncClient, Cancelled, Client, InvalidRequest, TriptychError

LONG: dict[str, Any] = {"num_inference_steps": 900}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with short_folder() as folder:
        server = Server(folder, "--threads", "1")
        yield server
        server.close()


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


def test_a_picture_is_submitted_followed_and_fetched(server: Server, client: Client, tmp_path: Path) -> None:
    job = client.submit(PROMPT, seed=7, num_inference_steps=4, preview=True)
    told = list(job.events())
    assert told[-1].state == job.state == "done"
    steps = [(one.step, one.steps) for one in told if one.stage == "denoise" and one.seconds]
    assert steps == [(step, 4) for step in range(1, 5)]
    previews = [one.preview for one in told if one.preview is not None]
    assert previews and all(isinstance(one, Image.Image) for one in previews)
    result = job.result()
    (picture,) = result.images
    assert picture.size == (64, 64) and result.job["request"]["seed"] == 7
    (path,) = result.save(tmp_path)
    assert path.read_bytes() == server.picture(server.job(job.id))
    assert client.generate(PROMPT, seed=7, num_inference_steps=4).files == result.files


def test_estimates_are_told_once_something_was_measured(client: Client) -> None:
    client.generate(PROMPT, num_inference_steps=4)
    jobs = [client.submit(PROMPT, num_inference_steps=20) for _ in range(12)]
    last = client.job(jobs[-1].id).info
    assert last["done_in"] is not None and last["done_in"] > 0
    assert last["starts_in"] is not None and last["starts_in"] <= last["done_in"]
    soon = client.job(jobs[0].id).info
    assert soon["state"] in ENDED or soon["done_in"] < last["done_in"]
    waits = next(one for one in jobs[-1].events() if one.position is not None)
    assert waits.state == "queued" and waits.done_in is not None
    for job in jobs:
        job.cancel()


def test_a_cancelled_job_raises_cancelled(client: Client) -> None:
    job = client.submit(PROMPT, **LONG)
    assert client.cancel(job.id).state == "cancelled"
    assert [one.state for one in job.events()][-1] == "cancelled"
    with pytest.raises(Cancelled):
        job.result()
    assert job.id in {one.id for one in client.jobs(state="cancelled")}
    assert client.health() == {"status": "ok", "missing": []}


def test_what_is_wrong_is_told_as_the_engine_tells_it(client: Client) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.submit(PROMPT, width=70)
    assert caught.value.field == "width"
    with pytest.raises(TriptychError) as unknown:
        client.job("unknown")
    assert unknown.value.code == "job_not_found"


def test_a_submission_sent_many_times_at_once_makes_one_job(server: Server, client: Client) -> None:
    def submit(_: int) -> str:
        return client.submit(PROMPT, seed=3, num_inference_steps=2, idempotency_key="at-once").id

    before = server.cluster()["totals"]["submitted"]
    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(submit, range(16)))
    assert len(made) == 1 and server.cluster()["totals"]["submitted"] == before + 1
    with pytest.raises(TriptychError) as caught:
        client.submit(PROMPT, seed=4, idempotency_key="at-once")
    assert caught.value.code == "conflict"


def test_waiting_is_answered_with_the_end_and_leaving_cancels_what_has_no_key(server: Server) -> None:
    body = {"prompt": PROMPT, "num_inference_steps": 2}
    done = server.client.post("/v1/jobs", json=body, headers={"Prefer": "wait=60"})
    assert (done.status_code, done.json()["state"]) == (200, "done")
    late = server.client.post("/v1/jobs", json={**body, **LONG}, headers={"Prefer": "wait=1"})
    assert late.status_code == 202 and late.json()["state"] in ("queued", "running")
    server.client.delete(late.headers["location"])
    wait = {"Prefer": "wait=60"}
    for headers, cancelled in ((wait, True), ({**wait, "Idempotency-Key": "left"}, False)):
        with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=server.url, timeout=1.0) as impatient:
            impatient.post("/v1/jobs", json={**body, **LONG}, headers=headers)
        (last,) = server.client.get("/v1/jobs", params={"limit": 1}).json()["data"]
        if cancelled:
            assert server.ended(last["id"])["state"] == "cancelled"
        else:
            time.sleep(0.5)
            assert server.client.get(f"/v1/jobs/{last['id']}").json()["state"] == "running"
            server.client.delete(f"/v1/jobs/{last['id']}")


def test_a_reader_that_does_not_read_holds_nobody_up(server: Server, client: Client) -> None:
    job = client.submit(PROMPT, num_inference_steps=60, preview=True)
    host, port = server.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            reader = stack.enter_context(socket.create_connection((host, int(port))))
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.sendall(f"GET /v1/jobs/{job.id}/events HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
        assert client.generate(PROMPT, num_inference_steps=2).images
        assert len(job.result().images) == 1


def test_asyncio_does_the_same(server: Server) -> None:
    async def run() -> None:
        async with AsyncClient(server.url) as client:
            job, other = await asyncio.gather(
                client.submit(PROMPT, seed=7, num_inference_steps=3), client.submit(PROMPT, **LONG)
            )
            told = [one async for one in job.events()]
            assert told[-1].state == "done" and len((await job.result()).images) == 1
            await other.cancel()
            waiting = asyncio.create_task(client.generate(PROMPT, **LONG))
            await asyncio.sleep(0.5)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            found = [one async for one in client.jobs(state="cancelled")]
            assert found and other.id in {one.id for one in found[:5]}
            async for one in client.jobs(state=["queued", "running"]):
                raise AssertionError(f"job {one.id} was left")

    asyncio.run(run())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def read_events(url: str, job: str, last: str) -> list[tuple[str, Any]]:
    with httpx.stream("GET", f"{url}/v1/jobs/{job}/events", headers={"Last-Event-ID": last}, timeout=60.0) as answer:
        return [(event.event, json.loads(event.data)) for event in httpx.EventSource(answer)]


def test_a_killed_server_goes_on_with_its_jobs_their_streams_and_their_keys() -> None:
    with short_folder() as folder:
        words = ["--threads", "1", "--state", "state", "--port", str(free_port())]
        server = Server(folder, *words)
        with Client(server.url, patience=300.0) as client:
            ended = client.submit(PROMPT, seed=7, num_inference_steps=2, idempotency_key="ended")
            ended.result()
            job = client.submit(PROMPT, seed=7, num_inference_steps=150, idempotency_key="running")
            told: list[Any] = []
            reading = threading.Thread(target=lambda: told.extend(job.events()))
            reading.start()
            server.reached(job.id, "denoise", 3)
            server.signal(signal.SIGKILL)
            server.end()
            server.close()
            secret = folder / "state" / "secret"
            assert stat.S_IMODE(secret.stat().st_mode) == 0o600 and len(secret.read_bytes()) == 32
            server = Server(folder, *words)
            try:
                again = client.submit(PROMPT, seed=7, num_inference_steps=150, idempotency_key="running")
                assert again.id == job.id, "the same key, the same job"
                names = [name for name, _ in read_events(server.url, ended.id, "57")]
                assert names == ["job", "done"]
                until(lambda: not reading.is_alive(), lambda: server.job(job.id))
                assert [one.state for one in told][-1] == "done" and len(job.result().images) == 1
                assert {one.id for one in client.jobs()} == {ended.id, job.id}
            finally:
                server.close()
                reading.join(timeout=120)

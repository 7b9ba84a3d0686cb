"""cache-dit's and LightX2V's clients against real workers: a flush frees what is kept to be faster, between units, and
changes no picture; who cancels or hangs up is worked for no longer."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.commands import PROMPT, Server, short_folder, until

POOL = 64 << 20
"""What each of a process's pools begins with."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A process for each stage."""
    with short_folder() as folder:
        server = Server(folder, "--layout", "split", "--threads", "1")
        yield server
        server.close()


def flush(server: Server) -> dict[str, Any]:
    """What a flush of everybody freed, by worker."""
    answer = server.client.post("/flush_cache")
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["message"] == "Cache flushed successfully" and not found["unanswered"]
    assert not any(worker["failed"] for worker in found["workers"])
    each = [size for worker in found["workers"] for part in (*worker["stages"].values(), worker["process"])
            for size in part.values()]  # fmt: skip
    assert found["freed_bytes"] == sum(each) + sum(found["coordinator"].values())
    return {**found, "workers": {worker["worker"]: worker for worker in found["workers"]}}


def cache_use(server: Server, cache: str, worker: str) -> tuple[float, float]:
    """Hits and misses of a worker's cache, as Prometheus reads them."""
    text = server.client.get("/metrics").raise_for_status().text
    found = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("cache") == cache and sample.labels["worker"] == worker
    }
    return found["triptych_cache_hits_total"], found["triptych_cache_misses_total"]


def shared_bytes(server: Server) -> int:
    """What all workers hold of memory files, as the system counts it."""
    total = 0
    for worker in server.workers().values():
        with open(f"/proc/{worker['pid']}/status", encoding="ascii") as lines:
            total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssShmem:"))
    return total


def test_what_was_kept_is_freed_once_and_fills_again(server: Server) -> None:
    flush(server)
    hits, misses = cache_use(server, "previews", "denoise")
    done = server.ended(server.submit(num_inference_steps=3, preview=True)["id"])
    until(lambda: cache_use(server, "previews", "denoise") == (hits + 2, misses + 1), server.cluster)
    before = server.picture(done)
    until(server.is_idle, server.cluster)
    time.sleep(1.5)  # small payloads are released with the coordinator's next tick
    held = shared_bytes(server)
    assert held >= 2 * POOL, "pools of encode and denoise"
    first = flush(server)["workers"]
    assert first.keys() == {"encode", "denoise", "decode"}
    assert [list(first[name]["stages"]) for name in first] == [[name] for name in first]
    assert first["encode"]["stages"]["encode"] == {} == first["decode"]["stages"]["decode"]
    assert first["denoise"]["stages"]["denoise"]["previews"] > 0, "the map that previews were made with"
    for name in ("encode", "denoise"):
        assert first[name]["process"]["transfer"] >= POOL, "nobody needs what it had published"
    until(lambda: shared_bytes(server) <= held - 2 * POOL, lambda: (held, shared_bytes(server)))
    made = cache_use(server, "transfer", "encode")[1]
    again = flush(server)["workers"]
    assert again["denoise"]["stages"]["denoise"] == {"previews": 0}
    assert all(worker["process"]["transfer"] == 0 for worker in again.values())
    repeated = server.ended(server.submit(num_inference_steps=3, preview=True)["id"])
    assert server.picture(repeated) == before
    until(server.is_idle, server.cluster)
    until(lambda: cache_use(server, "previews", "denoise") == (hits + 4, misses + 2), server.cluster)
    until(lambda: cache_use(server, "transfer", "encode")[1] > made, server.cluster)
    assert flush(server)["workers"]["denoise"]["stages"]["denoise"]["previews"] > 0


@pytest.mark.slow
def test_a_flush_in_the_middle_of_a_job_does_not_change_it(server: Server) -> None:
    fields = {"num_inference_steps": 60, "preview": True, "seed": 11}
    undisturbed = server.picture(server.ended(server.submit(**fields)["id"]))
    job = server.submit(**fields)["id"]
    server.reached(job, "denoise", 5)
    found = flush(server)["workers"]
    now = server.job(job)
    assert now["state"] == "running", "it did not wait for the job's end"
    assert found["denoise"]["stages"]["denoise"]["previews"] > 0
    with server.client.stream("GET", f"/v1/jobs/{job}/events") as events:
        told = [json.loads(line.removeprefix("data:")) for line in events.iter_lines() if line.startswith("data:")]
    assert max(event["step"] for event in told if event.get("preview")) > now["step"], "previews go on"
    done = server.ended(job)
    assert server.picture(done) == undisturbed and done["retries"] == 0


def test_who_calls_cache_dits_way_gets_pictures_while_others_flush(server: Server) -> None:
    body = {"prompt": PROMPT, "seed": 7, "width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 1.5}
    wanted = server.client.post("/generate", json=body).raise_for_status().json()["images"]
    ended = threading.Event()
    seen: list[int] = []

    def keep_flushing() -> None:
        while not ended.is_set():
            seen.append(server.client.post("/flush_cache").status_code)

    flushing = [threading.Thread(target=keep_flushing) for _ in range(2)]
    for thread in flushing:
        thread.start()
    try:
        for _ in range(8):
            assert server.client.post("/generate", json=body).raise_for_status().json()["images"] == wanted
    finally:
        ended.set()
        for thread in flushing:
            thread.join()
    assert 200 in seen and set(seen) <= {200, 429}


@pytest.mark.slow
def test_a_task_that_is_cancelled_is_computed_no_further(server: Server) -> None:
    fields = {"prompt": PROMPT, "infer_steps": 1000, "seed": 7}
    task = server.client.post("/v1/tasks/image/", json=fields).raise_for_status().json()["task_id"]
    server.reached(task, "denoise", 3)
    assert server.client.get(f"/v1/tasks/{task}/status").json()["status"] == "processing"
    assert server.client.get("/v1/tasks/queue/status").json()["current_task"] == task
    assert server.client.delete(f"/v1/tasks/{task}").json()["stop_status"] == "success"
    assert server.client.get(f"/v1/tasks/{task}/status").json()["status"] == "cancelled"
    until(server.is_idle, server.cluster)
    picture = server.client.post("/v1/tasks/image/sync", json={**fields, "infer_steps": 2}).raise_for_status()
    assert picture.content.startswith(b"\x89PNG")


@pytest.mark.slow
def test_who_hangs_up_is_worked_for_no_longer(server: Server) -> None:
    body = {"prompt": PROMPT, "width": 256, "height": 256, "num_inference_steps": 200}
    before = server.cluster()["totals"]["submitted"]

    def leave() -> None:
        with httpx.Client(base_url=server.url, timeout=0.5) as client, pytest.raises(httpx.ReadTimeout):
            client.post("/generate", json=body)

    leave()
    until(server.is_idle, server.cluster)
    found = server.cluster()
    assert found["totals"]["submitted"] == before + 1
    newest = server.client.get("/v1/jobs", params={"limit": 1}).raise_for_status().json()
    assert newest["data"][0]["state"] == "cancelled"

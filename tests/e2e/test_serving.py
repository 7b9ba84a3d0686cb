"""A split server as its clients see it: the same pictures as fused, a job's life over HTTP, wrong requests, workers
that join from elsewhere or may not, and what is left when it has been told to stop."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.e2e.commands import PROMPT, Command, Server, processes_of, run, short_folder, sockets_in, until
from triptych import Engine, Request
from triptych.request import Progress, Result

EMBEDDED = Path(__file__).resolve().parents[2] / "src/triptych/model/embedded/emoji"
NAN = {"sigmas": [1e308, 1e-308]}
"""Noise levels with which the latents are no numbers after a step."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A process for each stage, jobs on disk, a timeline, and a door for workers with keys."""
    with short_folder() as folder:
        code, made, _ = run(folder, "keys", "keys", "--client", "friend", "--client", "stranger", "--client", "lost")
        assert (code, len(made)) == (0, 4)
        (folder / "keys" / "clients" / "stranger.pub").unlink()
        words = ["--layout", "split", "--threads", "1", "--state", "state", "--trace", "trace.json"]
        server = Server(folder, *words, "--listen", "tcp://127.0.0.1:0", "--keys", "keys")
        yield server
        server.close()


@pytest.fixture(scope="module")
def fused() -> Iterator[Engine]:
    with Engine.open("emoji", device="cpu") as engine:
        yield engine


def pixels(data: bytes) -> bytes:
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def expected(fused: Engine, **fields: Any) -> bytes:
    (picture,) = fused.generate(Request.parse(prompt=PROMPT, seed=7, **fields)).outputs
    assert isinstance(picture, Image.Image)
    return picture.convert("RGB").tobytes()


def test_a_split_picture_is_the_fused_one(server: Server, fused: Engine) -> None:
    fields = {"num_inference_steps": 4}
    done = server.ended(server.submit(exact=True, **fields)["id"])
    assert [time["stage"] for time in done["times"]] == ["encode", "denoise", "decode"]
    assert len({worker["pid"] for worker in server.workers().values()} | {server.process.pid}) == 4
    assert pixels(server.picture(done)) == expected(fused, **fields)


def test_split_previews_are_the_fused_ones(fused: Engine) -> None:
    request = Request.parse(prompt=PROMPT, seed=7, num_inference_steps=3)

    def shown(engine: Engine) -> list[bytes]:
        pictures = []
        for event in engine.stream(request, preview=True):
            if isinstance(event, Progress) and event.preview is not None:
                pictures.append(event.preview.tobytes())
            if isinstance(event, Result):
                (picture,) = event.outputs
                assert isinstance(picture, Image.Image)
                pictures.append(picture.tobytes())
        return pictures

    with Engine.open("emoji", device="cpu", layout="split") as split:
        assert shown(split) == shown(fused) and len(shown(fused)) == 4


def test_a_cancelled_job_ends_within_a_step(server: Server) -> None:
    job = server.submit(num_inference_steps=900)["id"]
    server.reached(job, "denoise")
    assert server.client.delete(f"/v1/jobs/{job}").json()["state"] == "cancelled"
    until(server.is_idle, server.cluster)
    unit = next(stage["unit_seconds"] for stage in server.cluster()["stages"] if stage["stage"] == "denoise")
    after = server.ended(server.submit(num_inference_steps=2)["id"])
    denoise = next(time for time in after["times"] if time["stage"] == "denoise")
    assert denoise["waited"] < 100 * unit + 1, "the denoiser was still at the cancelled job"
    assert server.job(job)["results"] == [] and server.job(job)["state"] == "cancelled"
    assert server.client.get(f"/v1/jobs/{job}/results/0").status_code == 409


@pytest.mark.parametrize(
    ("body", "status", "code", "field"),
    [
        ({"prompt": "x", "width": 70}, 422, "invalid_request", "width"),
        ({"prompt": "x", "steps": 3}, 422, "invalid_request", "steps"),
        ({"prompt": "x", "num_inference_steps": "3"}, 422, "invalid_request", "num_inference_steps"),
        ({"seed": 3}, 422, "invalid_request", "prompt"),
        ({"prompt": "x", "images": ["data:image/png;base64,AAAA"]}, 400, "invalid_media", "images[0]"),
        ({"prompt": "x", "images": ["http://127.0.0.1/picture.png"]}, 422, "invalid_request", "images[0]"),
        ({"prompt": "x", "save_result_path": "/etc/x"}, 422, "invalid_request", "save_result_path"),
        ({"prompt": "x", "deadline": -1}, 422, "invalid_request", "deadline"),
        ([], 422, "invalid_request", "body"),
    ],
)
def test_a_wrong_request_is_told_its_field(server: Server, body: Any, status: int, code: str, field: str) -> None:
    answer = server.client.post("/v1/jobs", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["field"]) == (status, code, field)
    assert "Traceback" not in answer.text


def test_what_is_not_there_is_404(server: Server) -> None:
    for path in ("/v1/jobs/unknown", "/v1/jobs/..%2f..%2fetc", "/v1/jobs/unknown/results/0", "/v2/jobs"):
        assert server.client.get(path).status_code == 404, path
    done = server.ended(server.submit(num_inference_steps=1)["id"])
    assert server.client.get(f"/v1/jobs/{done['id']}/results/1").status_code == 404
    assert server.client.get(f"/v1/jobs/{done['id']}/results/0", headers={"Range": "bytes=0-3"}).content == b"\x89PNG"


def test_what_one_job_asks_for_is_not_seen_by_the_next(server: Server) -> None:
    plain = {"num_inference_steps": 3, "exact": True}
    first = server.ended(server.submit(**plain)["id"])
    other = {"guidance_scale": 3.0, "width": 32, "shift": 2.0, "output_format": "webp", "num_outputs": 2}
    odd = server.ended(server.submit(**plain, **other)["id"])
    again = server.ended(server.submit(**plain)["id"])
    assert server.picture(first) == server.picture(again) != server.picture(odd)
    assert first["request"] == again["request"] and len(odd["results"]) == 2


def test_bad_jobs_cost_the_good_ones_beside_them_nothing(server: Server) -> None:
    wanted = server.picture(server.ended(server.submit(num_inference_steps=6, exact=True)["id"]))
    bad = [server.submit(**NAN)["id"] for _ in range(6)]
    good = [server.submit(num_inference_steps=6, exact=True)["id"] for _ in range(3)]
    assert [server.ended(job)["error"]["stage"] for job in bad] == ["denoise"] * 6
    assert [server.picture(server.ended(job)) == wanted for job in good] == [True] * 3
    assert server.cluster()["totals"]["workers_lost"] == 0
    until(server.is_idle, server.cluster)


def test_a_deadline_ends_a_job_that_runs(server: Server) -> None:
    job = server.ended(server.submit(num_inference_steps=900, deadline=0.5)["id"])
    assert (job["state"], job["error"]["code"]) == ("failed", "deadline")
    until(server.is_idle, server.cluster)


def test_status_says_what_the_cluster_says(server: Server) -> None:
    code, lines, said = run(server.folder, "status", server.url, "--json")
    assert (code, said) == (0, "")
    found = json.loads("\n".join(lines))
    assert {worker["name"] for worker in found["workers"]} == set(server.workers())
    assert found["missing"] == [] and found["totals"]["workers_lost"] == 0
    code, lines, said = run(server.folder, "status", server.url)
    assert (code, said) == (0, "") and any("denoise" in line for line in lines)


@pytest.fixture
def joining(server: Server) -> Iterator[Callable[..., Command]]:
    """Starts workers that hold denoise and join with a key."""
    (endpoint,) = re.findall(r"workers of other hosts join at (tcp://\S+)", server.said)
    started: list[Command] = []

    def start(key: str, *words: str) -> Command:
        given = ["--device", "cpu", "--threads", "1", "--orphan-seconds", "20", "--join", endpoint, *words]
        started.append(Command(server.folder, "worker", "denoise", *given, "--key", f"keys/{key}.key"))
        return started[-1]

    yield start
    for command in started:
        command.close()


def test_a_worker_from_elsewhere_takes_work_and_leaves(server: Server, joining: Callable[..., Command]) -> None:
    guest = joining("friend", "--name", "guest", "--transfer", 'routes=["tcp"]')
    assert server.worker("guest")["pid"] == guest.process.pid
    jobs = [server.submit(seed=seed, num_inference_steps=8, exact=True)["id"] for seed in range(12)]
    pictures = [server.picture(server.ended(job)) for job in jobs]
    assert server.worker("guest")["done"] > 0 and server.worker("denoise")["done"] > 0
    guest.signal()
    assert guest.end() == 0, guest.said
    until(lambda: "guest" not in server.workers(), server.cluster)
    alone = server.ended(server.submit(seed=3, num_inference_steps=8, exact=True)["id"])
    assert server.picture(alone) == pictures[3]
    assert server.cluster()["totals"]["workers_lost"] == 0, "it was drained: nothing had to be done again"


def test_who_may_not_join_is_told_why_on_both_sides(server: Server, joining: Callable[..., Command]) -> None:
    other = server.folder / "other"
    shutil.copytree(EMBEDDED, other, ignore=shutil.ignore_patterns("__pycache__"))
    scheduler = other / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("{", '{"invert_sigmas": false,', 1))
    lost = server.folder / "keys" / "lost.key"
    assert run(server.folder, "keys", "others", "--client", "lost")[0] == 0
    lost.write_text((server.folder / "others" / "lost.key").read_text())
    refused = {
        "the coordinator at tcp": joining("stranger"),
        "its key is not the one that the key file names": joining("lost"),
        "it holds another model": joining("friend", "--model", str(other), "--name", "imitator"),
    }
    for reason, command in refused.items():
        assert command.end() == 2, command.said
        (line,) = [line for line in command.said.splitlines() if "cannot join" in line]
        assert reason in line and "Traceback" not in command.said, command.said
    assert re.search(r"refused 127\.0\.0\.1: its key \S+ is not on the list", server.said)
    assert re.search(r"refused worker imitator on \S+: it holds another model", server.said)
    assert set(server.workers()) == {"encode", "denoise", "decode"}


def test_told_to_stop_it_finishes_what_it_has_and_leaves_nothing(server: Server) -> None:
    bad = server.ended(server.submit(**NAN)["id"])
    assert (bad["state"], bad["error"]["stage"], bad["error"]["code"]) == ("failed", "denoise", "stage_failed")
    jobs = [server.submit(num_inference_steps=30)["id"] for _ in range(2)]
    server.signal()
    until(lambda: server.client.get("/health").json()["status"] == "draining", "draining")
    refused = server.client.post("/v1/jobs", json={"prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert server.end() == 0, server.said
    assert processes_of(server.folder) == [] and sockets_in(server.folder) == []
    files = server.folder / "state" / "artifacts"
    assert [len(list((files / job).glob("0.png"))) for job in jobs] == [1, 1]
    _check_trace(json.loads((server.folder / "trace.json").read_text()))
    words = ["--state", "state", "--stage", "denoise", "--device", "cpu", "--threads", "1"]
    code, _, said = run(server.folder, "replay", bad["id"], *words)
    assert code == 2 and said.splitlines()[-1] == f"error: {bad['error']['message']}"
    code, _, said = run(server.folder, "replay", jobs[0], *words)
    assert code == 2 and said.startswith(f"error: job: given '{jobs[0]}'; allowed: one that failed")


def _check_trace(events: list[dict[str, Any]]) -> None:
    kinds = Counter((event["ph"], event.get("cat")) for event in events)
    assert kinds["X", "unit"] > 50
    for kind in ("queue", "task", "transfer"):
        assert kinds["b", kind] == kinds["e", kind] > 0, kinds
    named = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert {"queues", "encode", "denoise", "decode"} <= named

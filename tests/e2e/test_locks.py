"""A served model behind keys and bounds, as two clients of it see it."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image

from tests.e2e.commands import PROMPT, Server, processes_of, short_folder

KEYS = {"alice": "alices-key-0123456789", "bob": "bobs-key-0123456789ab", "root": "roots-key-0123456789a"}
VARIABLE = "KEYS_OF_THE_DOOR"
LAYOUT = f"""
workers: [{{stages: all, threads: 1}}]
serve:
  api_keys_env: {VARIABLE}
  bounds: {{pixels: 4096, steps: 4}}
"""


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with short_folder() as folder, pytest.MonkeyPatch.context() as patch:
        entries = [f"{name}:{key}{':admin' if name == 'root' else ''}" for name, key in KEYS.items()]
        patch.setenv(VARIABLE, ",".join(entries))
        (folder / "layout.yaml").write_text(LAYOUT)
        server = Server(folder, "--layout", "layout.yaml")
        server.client.headers.update(bearer("alice"))
        try:
            yield server
        finally:
            server.close()


def test_a_job_is_its_owners(server: Server) -> None:
    job = server.ended(server.submit(num_inference_steps=2)["id"])
    assert re.fullmatch("[0-9a-f]{32}", job["id"])
    assert Image.open(io.BytesIO(server.picture(job))).size == (64, 64)
    for path in (f"/v1/jobs/{job['id']}", job["results"][0], f"/v1/jobs/{job['id']}/events"):
        for name in ("bob", "root"):
            assert server.client.get(path, headers=bearer(name)).status_code == 404
    assert server.client.get("/v1/jobs", headers=bearer("bob")).json()["data"] == []
    assert server.client.get("/v1/cluster", headers=bearer("bob")).status_code == 403
    assert server.client.get("/v1/cluster", headers=bearer("root")).status_code == 200


def test_bounds_hold_for_what_the_model_fills_in(server: Server) -> None:
    few = {"num_inference_steps": 4}
    for fields, field in (
        ({}, "num_inference_steps"),
        ({"width": 128, **few}, "width"),
        ({**few, "num_outputs": 17}, "num_outputs"),
    ):
        answer = server.client.post("/v1/jobs", json={"prompt": PROMPT, **fields})
        assert (answer.status_code, answer.json()["error"]["field"]) == (422, field), answer.text


def test_a_bomb_is_refused_and_the_server_lives_on(server: Server) -> None:
    file = io.BytesIO()
    Image.new("1", (8192, 8200)).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    answer = server.client.post("/v1/jobs", json={"prompt": PROMPT, "images": [url]})
    assert answer.status_code == 400, answer.text
    assert server.client.get("/health").status_code == 200


def test_only_the_server_knows_the_keys(server: Server) -> None:
    """Neither its log nor any of the processes that it started."""
    others = [process for process in processes_of(Path(server.folder)) if process.pid != server.process.pid]
    assert others
    for process in others:
        try:
            known = process.environ()
        except psutil.Error:  # it has just ended
            continue
        assert VARIABLE not in known
        assert not [key for key in KEYS.values() if key in " ".join([*known.values(), *process.cmdline()])]
    server.client.get("/v1/jobs", headers={"Authorization": f"Bearer {KEYS['bob']}x"})
    server.wait_to_say(" 401 ")
    assert not [key for key in KEYS.values() if key in server.said]

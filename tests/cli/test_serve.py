"""`triptych serve` as a process: its one line when ready, draining, stopping hard, and what it refuses at once."""

from __future__ import annotations

import importlib
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from triptych.cli import main
from triptych.errors import InvalidRequest, Unsupported
from triptych.server import bind, url_of

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import importlib, sys, time
from tests.server.fake import FakeEngine
from triptych.cli import main

class Engine(FakeEngine):
    def cancel(self, job):
        cancelled = super().cancel(job)
        self.drained.set()
        return cancelled

    def close(self):
        print("closing", flush=True)
        time.sleep({closing})
        print("closed", flush=True)

def opening(model, display, pickle, code, options):
    try:
        print("opening", model, options["layout"].name, options["layout"].slots(("denoise",))[0].threads, flush=True)
        time.sleep({sleep})
    except KeyboardInterrupt:
        {interrupted}
    return Engine()

importlib.import_module("triptych.cli.serve").open_engine = opening
sys.exit(main(["serve", "toy", *sys.argv[1:]]))
"""


class Server:
    """A server process on an engine without a model; its lines on standard output are read as they come."""

    def __init__(self, *arguments: str, sleep: float = 0, closing: float = 0, interrupted: str = "raise") -> None:
        script = SCRIPT.replace("{sleep}", str(sleep)).replace("{closing}", str(closing))
        script = script.replace("{interrupted}", interrupted)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.errors: list[str] = []
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self.errors.extend(self.process.stderr)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def url(self) -> str:
        lines = iter(self.line, "")
        return next(line.removeprefix("ready: ") for line in lines if line.startswith("ready: "))

    def end(self) -> int:
        code = self.process.wait(timeout=30)
        self._reader.join(timeout=30)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(timeout=30)
        self._reader.join(timeout=30)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*arguments: str, **engine: Any) -> Server:
        servers.append(Server(*arguments, **engine))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def test_it_says_its_url_and_drains_when_told_to_stop(start: Callable[..., Server]) -> None:
    server = start("--port", "0", "--layout", "split", "--threads", "2")
    assert server.line() == "opening toy split 2"
    with httpx.Client(base_url=server.url(), timeout=30) as client:
        assert client.get("/health").json()["status"] == "ok"
        job = client.post("/v1/jobs", json={"prompt": "a cat"}).json()
        assert job["state"] == "queued"
        server.process.send_signal(signal.SIGTERM)
        while (answer := client.get("/health")).status_code == 200:
            pass
        assert answer.json()["status"] == "draining"
        refused = client.post("/v1/jobs", json={"prompt": "a cat"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert client.get(f"/v1/jobs/{job['id']}").status_code == 200, "jobs are still told of"
        assert client.delete(f"/v1/jobs/{job['id']}").json()["state"] == "cancelled"
    assert server.end() == 0
    assert [server.line(), server.line()] == ["closing", "closed"]
    assert "draining: what runs is finished first; once more stops at once\n" in server.errors
    assert not [line for line in server.errors if "Traceback" in line]


def test_told_twice_it_stops_at_once(start: Callable[..., Server]) -> None:
    server = start("--port", "0")
    with httpx.Client(base_url=server.url(), timeout=30) as client:
        client.post("/v1/jobs", json={"prompt": "a cat"})
        server.process.send_signal(signal.SIGTERM)
        while client.get("/health").status_code == 200:
            pass
        server.process.send_signal(signal.SIGTERM)
    assert server.end() == 1
    assert [server.line(), server.line()] == ["closing", "closed"]


def test_a_drain_that_ran_out_of_time_is_no_success(start: Callable[..., Server]) -> None:
    server = start("--port", "0", "--drain", "0.2")
    with httpx.Client(base_url=server.url(), timeout=30) as client:
        client.post("/v1/jobs", json={"prompt": "a cat"})
        server.process.send_signal(signal.SIGTERM)
    assert server.end() == 1
    assert [server.line(), server.line()] == ["closing", "closed"]
    assert "the time to drain is over, and not all that runs is finished\n" in server.errors


def test_told_to_stop_while_it_closes_it_closes_to_the_end(start: Callable[..., Server]) -> None:
    server = start("--port", "0", closing=2.0)
    with httpx.Client(base_url=server.url(), timeout=30) as client:
        server.process.send_signal(signal.SIGTERM)
        while client.get("/health").status_code == 200:
            pass
        server.process.send_signal(signal.SIGTERM)
    assert server.line() == "closing"
    for number in (signal.SIGTERM, signal.SIGINT):
        server.process.send_signal(number)
    assert server.line() == "closed"
    assert server.end() == 1


@pytest.mark.parametrize("interrupted", ["raise", "raise ValueError('an extension module said so')", "pass"])
def test_told_to_stop_while_it_opens_it_ends(start: Callable[..., Server], interrupted: str) -> None:
    """Whatever becomes of the interruption: extension modules turn it into errors, finalizers swallow it."""
    server = start("--port", "0", sleep=60, interrupted=interrupted)
    assert server.line().startswith("opening")
    server.process.send_signal(signal.SIGTERM)
    if interrupted == "pass":
        assert (server.line(), server.line()) == ("closing", "closed")
    assert server.end() == 130
    assert server.errors[-1] == "cancelled\n"


def test_a_port_in_use_is_one_line_before_anything_is_opened(start: Callable[..., Server]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = start("--port", str(port))
        assert server.end() == 2
    assert server.line() == ""
    assert server.errors == [
        f"error: port: given {port}; allowed: a free one (127.0.0.1: address already in use)\n"
    ]  # fmt: skip


def test_two_servers_cannot_share_a_port_even_before_they_answer() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert url_of(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(InvalidRequest, match="port: given"):
            bind("127.0.0.1", port)
    with bind("127.0.0.1", port) as again:
        assert again.getsockname()[1] == port


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--layout", "none.yaml"], "layout: given 'none.yaml'; allowed: fused, split, or the path of a YAML file"),
        (["--threads", "0"], "threads: given 0; allowed: greater than or equal to 1"),
        (["--dtype", "int8"], "dtype: given 'int8'; allowed: "),
        (["--port", "70000"], "port: given 70000; allowed: less than or equal to 65535"),
        (["--listen", "tcp://127.0.0.1:1"], "listen: given 'tcp://127.0.0.1:1'; allowed: an endpoint and a folder of"),
        (["--drain", "-5"], "drain: given -5.0; allowed: 0 to 604800 seconds"),
        (["--drain", "inf"], "drain: given inf; allowed: 0 to 604800 seconds"),
        (["--host", "a..b"], "host: given 'a..b'; allowed: an address of this machine"),
        (["--host", "not a host"], "host: given 'not a host'; allowed: an address of this machine"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "emoji", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {line}") and printed.err.count("\n") == 1 and not printed.out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "emoji at 127.0.0.1, auto, None"),
        (["--model-path", "toy"], "toy at 127.0.0.1, auto, None"),
        (["toy", "--model-path", "toy", "--device", "cpu", "--dtype", "float16"], "toy at 127.0.0.1, cpu, float16"),
        (["--model-path", "toy", "--host", "localhost", "--device", "cuda"], "toy at localhost, cuda, None"),
        (["toy", "--model-path", "other"], "model-path: given 'other'; allowed: the model that was named before it"),
        (["", "--model-path", "other"], "model-path: given 'other'; allowed: the model that was named before it, ''"),
    ],
)
def test_the_flags_of_cache_dit_are_known(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def opening(model: str, *rest: Any) -> None:
        layout = rest[-1]["layout"]
        (slot,) = layout.slots(("denoise",))
        raise Unsupported(f"{model} at {layout.serve.host}, {slot.device}, {slot.dtype}")

    monkeypatch.setattr(importlib.import_module("triptych.cli.serve"), "open_engine", opening)
    assert main(["serve", *arguments, "--port", "0"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {line}")


class Real:
    """`triptych serve emoji` as a process; what it logs is in a file."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.log = folder / "serve.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "triptych", "serve", "emoji", "--device", "cpu", "--port", "0", *arguments],
                stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            )  # fmt: skip

    def url(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("ready: "), self.log.read_text()
        return line.split()[1]

    def close(self) -> None:
        """Workers of a server that had to be killed end by themselves."""
        self.process.kill()
        self.process.wait(timeout=30)
        assert self.process.stdout is not None
        self.process.stdout.close()


def finished(client: httpx.Client, fields: dict[str, object]) -> dict[str, Any]:
    """A job's object once it has ended."""
    job = client.post("/v1/jobs", json=fields).raise_for_status().json()
    give_up = time.monotonic() + 60
    while job["state"] in ("queued", "running"):
        assert time.monotonic() < give_up, job
        time.sleep(0.05)
        job = client.get(f"/v1/jobs/{job['id']}").raise_for_status().json()
    return job


def test_a_real_model_is_served_and_its_state_outlives_it(tmp_path: Path) -> None:
    """The whole of it: a process per stage, a picture, a failure that can be replayed, a restart that remembers."""
    state = tmp_path / "state"
    server = Real(tmp_path, "--layout", "split", "--threads", "1", "--state", str(state))
    try:
        with httpx.Client(base_url=server.url(), timeout=60) as client:
            assert client.get("/health").status_code == 200
            asked = {
                "prompt": "a red apple",
                "seed": 7,
                "num_inference_steps": 3,
                "exact": True,
                "output_format": "webp",
            }
            good = finished(client, asked)
            assert (good["state"], good["error"]) == ("done", None)
            assert [(time["stage"], time["steps"]) for time in good["times"]] == [
                ("encode", 1), ("denoise", 3), ("decode", 1),
            ]  # fmt: skip
            answer = client.get(good["results"][0])
            assert answer.headers["content-type"] == "image/webp"
            assert Image.open(io.BytesIO(answer.content)).size == (64, 64)
            bad = finished(client, {"prompt": "a cat", "sigmas": [1e308, 1e-308]})
            assert (bad["state"], bad["error"]["stage"]) == ("failed", "denoise")
            refused = client.post("/v1/jobs", json={"prompt": "a cat", "width": 70})
            assert (refused.status_code, refused.json()["error"]["field"]) == (422, "width")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0, server.log.read_text()
    finally:
        server.close()
    assert main(["replay", bad["id"], "--state", str(state), "--stage", "denoise", "--device", "cpu"]) == 2
    again = Real(tmp_path, "--threads", "1", "--state", str(state))
    try:
        with httpx.Client(base_url=again.url(), timeout=60) as client:
            assert client.get(f"/v1/jobs/{good['id']}").json()["state"] == "done"
            assert client.get(good["results"][0]).content == answer.content
        again.process.send_signal(signal.SIGTERM)
        assert again.process.wait(timeout=60) == 0, again.log.read_text()
    finally:
        again.close()

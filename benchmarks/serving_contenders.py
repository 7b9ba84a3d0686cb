"""Servers that take the same request: Triptych, cache-dit 1.3.5, and diffusers behind a lock.

Each is a process of its own with `POST /generate` in cache-dit's words. cache-dit is installed in a virtual environment
of its own, which reuses the libraries of this one.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

__all__ = ["Connection", "Server", "cache_dit", "diffusers_loading", "locked_diffusers", "triptych"]

ROOT = Path(__file__).resolve().parents[1]
CACHE_DIT = "1.3.5"
START_SECONDS = 300.0
STOP_SECONDS = 30.0
IDLE_SECONDS = 2.0
"""A server may hang up soon after that."""


class Connection:
    """A connection to a server that is kept."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._connection = http.client.HTTPConnection(*address, timeout=START_SECONDS)
        self._used = time.monotonic()

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        """The body of the answer. Raises RuntimeError for one that is not 200 or 202."""
        if time.monotonic() - self._used > IDLE_SECONDS:
            self._connection.close()  # and with the request a new one is opened
        data = None if body is None else json.dumps(body)
        self._connection.request(method, path, data, {"Content-Type": "application/json"} if data else {})
        answer = self._connection.getresponse()
        text = answer.read()
        self._used = time.monotonic()
        if answer.status not in (200, 202):
            raise RuntimeError(f"{method} {path} answered {answer.status}: {text[:300]!r}")
        return text

    def generate(self, fields: dict[str, Any]) -> bytes:
        """A picture as PNG."""
        return base64.b64decode(json.loads(self.ask("POST", "/generate", fields))["images"][0])

    def picture(self, fields: dict[str, Any]) -> Image.Image:
        """A picture."""
        return Image.open(io.BytesIO(self.generate(fields))).convert("RGB")

    def close(self) -> None:
        """Hangs up."""
        self._connection.close()


@dataclass(frozen=True)
class Server:
    """One that runs. `seconds`: from its start until it was ready."""

    name: str
    address: tuple[str, int]
    process: subprocess.Popen[str]
    seconds: float

    def connect(self) -> Connection:
        """A connection of the caller's own."""
        return Connection(self.address)


@contextlib.contextmanager
def _started(command: Sequence[str], log: Path, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), **(env or {})},
        )  # fmt: skip
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()


def _line(process: subprocess.Popen[str], log: Path) -> str:
    """The first line of its standard output. Raises RuntimeError with its last words if it ends without one."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    assert process.stdout is not None
    threading.Thread(target=lambda out=process.stdout: lines.put(out.readline()), daemon=True).start()
    with contextlib.suppress(queue.Empty):
        if line := lines.get(timeout=START_SECONDS).strip():
            return line
    raise RuntimeError(f"{process.args!r} does not start:\n{log.read_text()[-2000:]}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def _wait_for_health(address: tuple[str, int], process: subprocess.Popen[str], log: Path) -> None:
    give_up = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up and process.poll() is None:
        with contextlib.suppress(OSError, RuntimeError, http.client.HTTPException):
            connection = Connection(address)
            try:
                connection.ask("GET", "/health")
                return
            finally:
                connection.close()
        time.sleep(0.02)
    raise RuntimeError(f"{process.args!r} does not start:\n{log.read_text()[-2000:]}")


@contextlib.contextmanager
def triptych(folder: str, *words: str, name: str = "Triptych") -> Iterator[Server]:
    """`triptych serve`."""
    command = [sys.executable, "-m", "triptych", "serve", folder, "--device", "cpu", "--port", "0", *words]
    with _printing_its_url(command, name) as server:
        yield server


class ServedEngine(Server):
    """An Engine with a server in front of it, which can be asked without that."""

    def make(self, count: int) -> list[float]:
        """The seconds of so many pictures by the Engine itself, measured in its process."""
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{count}\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())


@contextlib.contextmanager
def served_engine(folder: str, fields: dict[str, Any]) -> Iterator[ServedEngine]:
    """As `triptych serve`, with one thread."""
    command = [sys.executable, "-m", "benchmarks.served_engine", folder, json.dumps(fields)]
    with _printing_its_url(command, "an Engine") as server:
        yield ServedEngine(server.name, server.address, server.process, server.seconds)


@contextlib.contextmanager
def _printing_its_url(command: Sequence[str], name: str) -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="triptych-serving-") as place:
        log = Path(place, "log")
        began = time.perf_counter()
        with _started(command, log) as process:
            url = _line(process, log).removeprefix("ready: ")
            seconds = time.perf_counter() - began
            host, _, port = url.removeprefix("http://").rpartition(":")
            yield Server(name, (host, int(port)), process, seconds)


@contextlib.contextmanager
def cache_dit(folder: str) -> Iterator[Server]:
    """cache-dit's own server. Raises RuntimeError if it cannot be installed or started."""
    python = _cache_dit_python()
    port = _free_port()
    words = ["--model-path", folder, "--dtype", "float32", "--device", "cpu"]
    command = [str(python), "-m", "cache_dit.serve.serve", *words, "--host", "127.0.0.1", "--port", str(port)]
    with _by_health(f"cache-dit {CACHE_DIT}", command, port, {"PYTHONPATH": ""}) as server:
        yield server


@contextlib.contextmanager
def locked_diffusers(folder: str) -> Iterator[Server]:
    """diffusers' standard pipeline in a small FastAPI application, one request at a time."""
    port = _free_port()
    command = [sys.executable, "-m", "benchmarks.locked_diffusers", folder, str(port)]
    with _by_health("diffusers behind a lock", command, port, {}) as server:
        yield server


@contextlib.contextmanager
def _by_health(name: str, command: Sequence[str], port: int, env: dict[str, str]) -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="triptych-serving-") as place:
        log = Path(place, "log")
        began = time.perf_counter()
        with _started(command, log, env) as process:
            assert process.stdout is not None
            threading.Thread(target=process.stdout.read, daemon=True).start()  # what it prints must go somewhere
            address = ("127.0.0.1", port)
            _wait_for_health(address, process, log)
            yield Server(name, address, process, time.perf_counter() - began)


def _cache_dit_python() -> Path:
    """The interpreter of cache-dit's environment, made now if it is not there. Raises RuntimeError."""
    place = Path.home() / ".cache" / "triptych" / f"cache-dit-{CACHE_DIT}-python{sysconfig.get_python_version()}"
    python = place / "bin" / "python"
    probe = [str(python), "-c", "from cache_dit.serve.serve import launch_server"]
    if python.exists() and subprocess.run(probe, capture_output=True, cwd=place).returncode == 0:
        return python
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(place)], check=True)
        (packages,) = place.glob("lib/python*/site-packages")
        own = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
        (packages / "reuse.pth").write_text("\n".join(own) + "\n")
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
        subprocess.run([*install, f"cache-dit=={CACHE_DIT}"], check=True, capture_output=True, text=True)
        subprocess.run(probe, check=True, capture_output=True, text=True, cwd=place)
    except (OSError, subprocess.CalledProcessError) as error:
        words = getattr(error, "stderr", "") or str(error)
        raise RuntimeError(f"cache-dit {CACHE_DIT} cannot be installed: {words.strip().splitlines()[-1]}") from error
    return python


LOADING = """
import sys, torch
from diffusers import ModularPipeline
pipe = ModularPipeline.from_pretrained(sys.argv[1])
pipe.load_components(torch_dtype=torch.float32)
print("loaded", flush=True)
"""


def diffusers_loading(folder: str) -> float:
    """Seconds that a fresh process takes until diffusers has loaded the folder."""
    with tempfile.TemporaryDirectory(prefix="triptych-serving-") as place:
        log = Path(place, "log")
        began = time.perf_counter()
        with _started([sys.executable, "-c", LOADING, folder], log) as process:
            _line(process, log)
            return time.perf_counter() - began

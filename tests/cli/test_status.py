"""`triptych status`: what a server says of itself, as tables, as JSON, and again and again."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import pytest

from triptych.cli import main
from triptych.cluster import StageStatus, Status, Totals, WorkerStatus
from triptych.messages import Busy

STATUS = Status(
    coordinator="c",
    uptime=3725.0,
    stages=(
        StageStatus(
            stage="denoise", waiting=3, running=2, workers=1, credits=5, done=7, per_minute=12.5, unit_seconds=0.024,
            task_seconds=0.2,
        ),
    ),
    workers=(
        WorkerStatus(
            name="painter-0", incarnation="i", slot="painter-0", host="here", pid=4711, device="cpu",
            stages=("denoise",), state="busy", tasks=2, done=7, failed=1, memory_bytes=3 * 2**30, free_bytes=2**30,
            kept=2, kept_bytes=2048, weights={"denoise": 100}, last_seen=0.4,
            busy=Busy(job="j", stage="denoise", seconds=1.5),
        ),
    ),
    jobs={"queued": 3, "running": 2, "done": 7, "failed": 1, "cancelled": 0},
    totals=Totals(
        submitted=13, rejected=4, done=7, failed=1, cancelled=0, retries=5, resumes=6, remade=0, workers_lost=8,
        digest_failures=9, quarantined=1,
    ),
    missing=("decode",),
    fetching=0,
    draining=True,
)  # fmt: skip


class Answers(BaseHTTPRequestHandler):
    """Answers GET /v1/cluster with the server's `body`."""

    def do_GET(self) -> None:
        server: Any = self.server
        server.asked += 1
        known = self.path == "/v1/cluster"
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(server.body if known else b"no")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.body, server.asked = msgspec.json.encode(STATUS), 0
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_tables(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", server.url]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for text in (
        "up 1:02:05, draining",
        "3 queued, 2 running, 7 done, 1 failed, 0 cancelled",
        "5 retries, 6 resumes, 8 workers lost, 9 damaged transfers, 1 quarantined, 4 rejected",
        "no worker decode",
        "denoise 1 3 2/5 7 12.5 0.024 0.2",
        "painter-0 denoise here cpu busy denoise 1.5 s 4711 2 7 1 3 GiB 1 GiB 2, 2 KiB 0.4 s",
    ):
        assert text in out, out


def test_json_is_the_servers_own(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", server.url.removeprefix("http://"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(msgspec.json.encode(STATUS))


def test_watching_refreshes_until_the_server_is_gone(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []

    def vanish() -> None:
        while server.asked < 3:
            seen.append(server.asked)
        server.body = b"{}"

    thread = threading.Thread(target=vanish)
    thread.start()
    assert main(["status", server.url, "--watch", "--interval", "0.1"]) == 2
    thread.join()
    assert "of another version" in capsys.readouterr().err
    assert main(["status", server.url, "--watch", "--json", "--interval", "0"]) == 2


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("http://127.0.0.1:1", "url: no server answers at http://127.0.0.1:1/v1/cluster ("),
        ("ftp://127.0.0.1", "url: given 'ftp://127.0.0.1'; allowed: a server's, such as http://127.0.0.1:8000"),
        ("http://", "url: given 'http://'; allowed: "),
        ("a b", "url: given 'a b'; allowed: "),
        ("http://127.0.0.1:70000", "url: given 'http://127.0.0.1:70000'; allowed: "),
    ],
)
def test_what_is_wrong_is_one_line(url: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", url]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {line}") and printed.count("\n") == 1


def test_another_server_is_said_to_be_one(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", server.url + "/elsewhere"]) == 2
    assert "answered 404" in capsys.readouterr().err
    for body in (b"<html>", b"\xff", b"[" * 100_000):
        server.body = body
        for options in ([], ["--json"]):
            assert main(["status", server.url, *options]) == 2
            printed = capsys.readouterr()
            assert "of another version" in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_what_speaks_no_http_is_said_to_be_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    def answer() -> None:
        connection, _ = other.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(b"SSH-2.0-OpenSSH\r\n")

    with socket.create_server(("127.0.0.1", 0)) as other:
        thread = threading.Thread(target=answer)
        thread.start()
        assert main(["status", f"127.0.0.1:{other.getsockname()[1]}"]) == 2
        thread.join()
    printed = capsys.readouterr().err
    assert printed.startswith("error: url: no server answers at ") and printed.count("\n") == 1

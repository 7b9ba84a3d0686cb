"""Connections, over real sockets: who says nothing, says it slowly, or comes when too many are there."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import httpx
import pytest
import uvicorn

from tests.server.fake import FakeEngine
from triptych.config import ServeSection
from triptych.server import bind, create_app
from triptych.server.lines import Line

HEAD = b"GET /v1/jobs?limit=1 HTTP/1.1\r\nHost: localhost\r\n"


@contextlib.contextmanager
def serving(seconds: float, engine: FakeEngine | None = None, **settings: Any) -> Iterator[int]:
    """The application as `serve_app` has it, without its signals."""
    section = ServeSection(**settings)
    line = partial(Line, waiting={}, most=section.max_connections, seconds=seconds)
    config = uvicorn.Config(
        create_app(engine or FakeEngine(), section, version="1"), log_config=None, access_log=False, lifespan="off",
        ws="none", http=cast(Any, line),
    )  # fmt: skip
    server = uvicorn.Server(config)
    with bind("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            yield sock.getsockname()[1]
        finally:
            server.should_exit = server.force_exit = True
            thread.join()


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def closed_after(line: socket.socket) -> float:
    began = time.monotonic()
    assert line.recv(100) == b""
    return time.monotonic() - began


def test_who_says_nothing_is_let_go() -> None:
    with serving(0.4) as port, connected(port) as line:
        assert 0.2 < closed_after(line) < 4


def test_who_never_ends_a_head_is_let_go_however_often_it_says_something() -> None:
    with serving(0.5) as port, connected(port) as line:
        line.sendall(HEAD)
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() < began + 8:
                line.sendall(b"X-A: b\r\n")
                line.settimeout(0.1)
                with contextlib.suppress(TimeoutError):
                    if not line.recv(100):
                        break
        assert time.monotonic() - began < 4


def test_the_next_request_has_its_time_too() -> None:
    with serving(0.5) as port, connected(port) as line:
        for _ in range(3):
            time.sleep(0.3)
            line.sendall(HEAD + b"\r\n")
            answer = line.recv(10_000)
            while not answer.endswith(b"}"):  # the body may come by itself
                answer += line.recv(10_000)
            assert answer.startswith(b"HTTP/1.1 200 ")
        line.sendall(HEAD)
        assert 0.2 < closed_after(line) < 4


def test_an_answer_may_take_longer_than_a_head() -> None:
    with serving(0.3) as port, connected(port) as line:
        body = b'{"prompt": "a cat"}'
        line.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        line.sendall(b"Prefer: wait=1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        began = time.monotonic()
        assert line.recv(10_000).startswith(b"HTTP/1.1 202 ")
        assert time.monotonic() - began > 0.8


def test_silent_connections_shut_nobody_out() -> None:
    with serving(60, max_connections=8) as port, contextlib.ExitStack() as held:
        silent = [held.enter_context(connected(port)) for _ in range(30)]
        for line in silent[-4:]:
            line.sendall(HEAD)
        time.sleep(0.2)
        for _ in range(3):
            assert httpx.get(f"http://127.0.0.1:{port}/v1/jobs").status_code == 200
        assert silent[0].recv(10) == b"", "who waits longest goes first"


def test_one_request_too_many_is_told_so_in_our_words() -> None:
    page = "https://app.example.org"
    with serving(60, max_connections=2, origins=page) as port, contextlib.ExitStack() as held:
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url) as client:
            job = client.post("/v1/jobs", json={"prompt": "a cat"}).json()["id"]
            streams = [held.enter_context(httpx.Client(base_url=url)) for _ in range(2)]
            for stream in streams:
                held.enter_context(stream.stream("GET", f"/v1/jobs/{job}/events"))
            answer = client.get("/v1/jobs", headers={"origin": page})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "too_many_connections")
            assert answer.headers["retry-after"] == "5" and answer.headers["x-frame-options"] == "DENY"
            assert answer.headers["access-control-allow-origin"] == page
            held.close()
            give_up = time.monotonic() + 10
            while client.get("/v1/jobs").status_code != 200:
                assert time.monotonic() < give_up
                time.sleep(0.05)


@pytest.mark.parametrize("pipelined", [2, 5])
def test_requests_that_come_at_once_are_answered_one_by_one(pipelined: int) -> None:
    with serving(5) as port, connected(port) as line:
        line.sendall((HEAD + b"\r\n") * pipelined)
        got = b""
        while got.count(b"HTTP/1.1 200 ") < pipelined:
            part = line.recv(10_000)
            assert part
            got += part

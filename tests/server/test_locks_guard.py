"""What every request passes first: its Host, its Origin, the size of its body; and what every answer says of itself."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import Body, FastAPI, Request
from fastapi.testclient import TestClient

from tests.server.conftest import LOCAL
from tests.server.fake import FakeEngine
from triptych.config import ServeSection
from triptych.server import KeyRing, bind, create_app
from triptych.server.errors import add_handlers
from triptych.server.locks import guard
from triptych.server.locks.guard import Guard
from triptych.server.locks.keys import ApiKey

JSON = {"content-type": "application/json"}
PAGE = "https://app.example.org"
FILE = "file:" + "//"


def client_of(engine: FakeEngine, base: str = LOCAL, **settings: Any) -> TestClient:
    app = create_app(engine, ServeSection(**settings), version="1")
    return TestClient(app, base, raise_server_exceptions=False)


def submit(client: TestClient, **headers: str) -> Any:
    return client.post("/v1/jobs", json={"prompt": "a cat"}, headers=headers)


@pytest.mark.parametrize(
    ("settings", "host", "passes"),
    [
        ({}, "127.0.0.1:8000", True),
        ({}, "localhost", True),
        ({}, "LocalHost:1", True),
        ({}, "127.8.8.8", True),
        ({}, "[::1]:8000", True),
        ({}, "evil.example", False),
        ({}, "localhost.evil.example", False),
        ({}, "127.0.0.1.nip.io", False),
        ({}, "127.1", False),
        ({}, "2130706433", False),
        ({}, "192.168.1.2", False),
        ({}, "[::ffff:1.2.3.4]", False),
        ({}, "", False),
        ({}, "local host", False),
        ({}, "localhost:port", False),
        ({}, "localhost/x", False),
        ({}, "user@localhost", False),
        ({"hosts": "app.example.org"}, "APP.example.org.", True),
        ({"hosts": "app.example.org"}, "app.example.org:8443", True),
        ({"hosts": "app.example.org"}, "localhost", True),
        ({"hosts": "app.example.org"}, "x.app.example.org", False),
        ({"hosts": "*"}, "evil.example", True),
        ({"host": "0.0.0.0"}, "192.168.1.2:8000", True),
        ({"host": "0.0.0.0"}, "[2001:db8::1]", True),
        ({"host": "0.0.0.0"}, "evil.example", False),
        ({"host": "box.example.org"}, "box.example.org", True),
        ({"host": "box.example.org"}, "other.example.org", False),
    ],
)
def test_a_host_is_one_of_this_server(engine: FakeEngine, settings: Any, host: str, passes: bool) -> None:
    answer = submit(client_of(engine, **settings), host=host)
    if passes:
        assert answer.status_code == 202, answer.text
        return
    assert (answer.status_code, answer.json()["error"]["code"]) == (421, "wrong_host")
    assert answer.json()["error"]["field"] == "host" and not engine.submitted


def test_two_hosts_are_none(engine: FakeEngine) -> None:
    answer = client_of(engine).get("/health", headers=[("Host", "localhost"), ("Host", "localhost")])
    assert answer.status_code == 421


@pytest.mark.parametrize(
    ("origin", "settings", "passes"),
    [
        ("http://localhost:8000", {}, True),
        ("https://localhost:8000", {}, True),  # TLS may end before this server
        ("http://localhost", {}, False),
        ("http://localhost:3000", {}, False),
        ("http://127.0.0.1:8000", {}, False),
        ("http://evil.example", {}, False),
        ("http://evil.example:8000", {}, False),
        ("http://localhost:8000.evil.example", {}, False),
        ("null", {}, False),
        ("", {}, False),
        (FILE, {}, False),
        ("chrome-extension://localhost:8000", {}, False),
        (PAGE, {}, False),
        (PAGE, {"origins": PAGE}, True),
        (PAGE.upper(), {"origins": PAGE}, True),
        ("http://app.example.org", {"origins": PAGE}, False),
        (f"{PAGE}:8443", {"origins": PAGE}, False),
        (f"{PAGE}.evil.example", {"origins": PAGE}, False),
        ("null", {"origins": PAGE}, False),
        ("http://evil.example", {"origins": "*"}, True),
    ],
)
def test_a_web_page_elsewhere_is_kept_out(engine: FakeEngine, origin: str, settings: Any, passes: bool) -> None:
    client = client_of(engine, "http://localhost:8000", **settings)
    for answer in (submit(client, origin=origin), client.get("/health", headers={"origin": origin})):
        if not passes:
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "wrong_origin")
            assert "access-control-allow-origin" not in answer.headers
        else:
            assert answer.status_code in (200, 202), answer.text
    assert bool(engine.submitted) == passes


def test_the_default_port_is_no_difference(engine: FakeEngine) -> None:
    client = client_of(engine, "http://localhost", hosts="app.example.org")
    for origin, host in ((PAGE, "app.example.org"), (PAGE, "app.example.org:443"), (f"{PAGE}:443", "app.example.org")):
        assert client.get("/health", headers={"origin": origin, "host": host}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "passes"),
    [
        ({"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}, True),
        ({"sec-fetch-site": "none", "sec-fetch-mode": "navigate"}, True),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}, True),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}, False),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"}, False),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "script"}, False),
        ({"sec-fetch-site": "cross-site"}, False),
    ],
)
def test_what_a_page_fetches_blindly(engine: FakeEngine, headers: dict[str, str], passes: bool) -> None:
    client = client_of(engine)
    assert client.get("/health", headers=headers).status_code == (200 if passes else 403)
    if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        assert submit(client, **headers).status_code == 403


def test_no_page_is_told_anything_by_default(engine: FakeEngine) -> None:
    asked = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-private-network": "true"}
    answer = client_of(engine).options("/v1/jobs", headers=asked)
    assert answer.status_code == 403
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_listed_page_may_ask(engine: FakeEngine) -> None:
    client = client_of(engine, origins=[PAGE])
    asked = {
        "origin": PAGE, "access-control-request-method": "DELETE", "access-control-request-private-network": "true",
        "access-control-request-headers": "authorization,content-type,idempotency-key",
    }  # fmt: skip
    answer = client.options("/v1/jobs/x", headers=asked)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == PAGE
    assert "DELETE" in answer.headers["access-control-allow-methods"]
    assert "access-control-allow-credentials" not in answer.headers
    taken = submit(client, origin=PAGE, **{"sec-fetch-site": "cross-site"})
    assert taken.status_code == 202 and taken.headers["access-control-allow-origin"] == PAGE
    assert "Location" in taken.headers["access-control-expose-headers"] and "Origin" in taken.headers["vary"]
    assert "access-control-allow-origin" not in client.get("/health", headers={"origin": LOCAL}).headers
    assert client.options("/v1/jobs/x", headers={**asked, "origin": "http://evil.example"}).status_code == 403


def test_every_answer_says_how_to_be_read(engine: FakeEngine) -> None:
    client = client_of(engine)
    engine.refuse = ZeroDivisionError()
    answers = [
        client.get("/health"), client.get("/nothing"), submit(client), client.get("/v1/jobs", headers={"host": "evil"}),
        client.get("/openapi.json"), client.get("/docs"),
    ]  # fmt: skip
    assert [answer.status_code for answer in answers] == [200, 404, 500, 421, 200, 200]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["cache-control"] == "private, no-cache"
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        assert "server" not in answer.headers
    scripts = ["script-src" in answer.headers["content-security-policy"] for answer in answers]
    assert scripts == [False] * 5 + [True], "only the API's page runs any"


def test_a_body_that_announces_itself_as_too_large_is_not_waited_for(engine: FakeEngine) -> None:
    """Over a real socket: the answer comes before a byte of the body was sent."""
    with running(create_app(engine, ServeSection(max_body=1000), version="1")) as port:
        for path in ("/v1/jobs", "/health", "/nothing"):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
                line.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1001\r\n\r\n".encode())
                assert line.recv(100).startswith(b"HTTP/1.1 413 ")
    assert not engine.submitted


@pytest.mark.parametrize("size", [1000, 1001])
def test_a_body_that_comes_in_parts_is_counted_whoever_reads_it(size: int) -> None:
    app, read = FastAPI(), []

    @app.post("/parsed")
    async def parsed(text: str = Body()) -> None:
        read.append(len(text))

    @app.post("/streamed")
    async def streamed(request: Request) -> None:
        read.append(len(await request.body()))

    @app.post("/careless")
    async def careless(request: Request) -> str:
        try:
            await request.body()
        except Exception:
            return "never mind"
        return "fine"

    add_handlers(app)
    client = TestClient(Guard(app, ServeSection(max_body=1000)), LOCAL, raise_server_exceptions=False)
    whole = b'"' + b"a" * (size - 2) + b'"'
    for path in ("/parsed", "/streamed", "/careless"):
        parts = (whole[at : at + 100] for at in range(0, size, 100))
        answer = client.post(path, content=parts, headers={"content-type": "application/json"})
        assert answer.status_code == (200 if size == 1000 else 413), answer.text
        if size > 1000:
            assert answer.json()["error"]["code"] == "body_too_large"
    assert read == ([998, 1000] if size == 1000 else [])


def test_a_body_that_never_ends_is_not_waited_for(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
    with running(create_app(engine, ServeSection(), version="1")) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
            head = "POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            line.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert line.recv(100).startswith(b"HTTP/1.1 408 ")
        with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
            line.sendall(b"GET /v1/jobs/x/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert line.recv(100).startswith(b"HTTP/1.1 404 "), "others are still heard"
    assert not engine.submitted


def test_an_answer_that_has_begun_is_not_begun_again() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await receive()).get("more_body"):
            pass

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"a" * 600, "more_body": True}

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"host", b"localhost")], "query_string": b""}
    with pytest.raises(Exception, match="at most 1000 bytes"):
        asyncio.run(Guard(app, ServeSection(max_body=1000))(scope, receive, send))
    assert [message["type"] for message in sent] == ["http.response.start"]


def test_the_guard_stands_before_the_keys(engine: FakeEngine) -> None:
    app = create_app(engine, ServeSection(), version="1", keys=KeyRing([ApiKey.of("alice", "a-key")]))
    client = TestClient(app, LOCAL)
    for headers, status in (({"host": "evil"}, 421), ({"origin": PAGE}, 403), ({}, 401)):
        assert client.get("/v1/cluster", headers=headers).status_code == status


@pytest.mark.parametrize("name", ["if-none-match", "traceparent", "x-stainless-os", "x-stainless-retry-count"])
def test_a_listed_page_may_send_any_header(engine: FakeEngine, name: str) -> None:
    client = client_of(engine, origins=[PAGE])
    asked = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": name}
    answer = client.options("/v1/jobs", headers=asked)
    assert answer.status_code == 200 and name in answer.headers["access-control-allow-headers"].lower()


def test_a_listed_page_sees_what_the_guard_refuses(engine: FakeEngine) -> None:
    client = client_of(engine, origins=[PAGE], max_body=100)
    large = client.post("/v1/jobs", content=b"x" * 101, headers={"origin": PAGE})
    grown = client.post("/v1/jobs", content=iter([b"x" * 60] * 2), headers={"origin": PAGE, **JSON})
    wrong = client.get("/health", headers={"origin": PAGE, "host": "evil.example"})
    assert [answer.status_code for answer in (large, grown, wrong)] == [413, 413, 421]
    for answer in (large, grown, wrong):
        assert answer.headers["access-control-allow-origin"] == PAGE
    for origin in ("https://evil.example", ""):
        kept_out = client.post("/v1/jobs", content=b"x" * 101, headers={"origin": origin})
        assert kept_out.status_code == 403 and "access-control-allow-origin" not in kept_out.headers
    asked = {"origin": PAGE, "access-control-request-method": "POST", "host": "evil.example"}
    assert client.options("/v1/jobs", headers=asked).status_code == 421


def test_all_bodies_together_are_bounded(engine: FakeEngine) -> None:
    """Parts count as they come, until the body has been used, or the request has failed."""
    with running(create_app(engine, ServeSection(max_body=1000, max_bodies=2500), version="1")) as port:
        head = b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += b"Content-Length: 1000\r\n\r\n"
        lines = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(3)]
        for line in lines:
            line.sendall(head + b'{"prompt": "' + b"a" * 788)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            give_up = time.monotonic() + 10
            while (answer := client.post("/v1/jobs", content=b" " * 200, headers=JSON)).status_code != 429:
                assert time.monotonic() < give_up, "until the parts are there"
            assert answer.json()["error"]["code"] == "queue_full" and answer.headers["retry-after"] == "1"
            assert client.post("/v1/jobs", json={"prompt": "a cat"}).status_code == 202, "small ones fit beside them"
            lines[0].sendall(b"a" * 98 + b'"}' + b" " * 100)
            assert lines[0].recv(100).startswith(b"HTTP/1.1 429 "), "not even one that has begun"
            lines[1].close()
            while (answer := client.post("/v1/jobs", content=b" " * 800, headers=JSON)).status_code == 429:
                assert time.monotonic() < give_up, "until it is known to have left"
            assert answer.status_code == 422
            for line in lines:
                line.close()
            for _ in range(10):  # nothing of what was refused, or has ended, is counted still
                assert client.post("/v1/jobs", json={"prompt": "a" * 900}).status_code == 202


def test_a_request_that_waits_for_its_job_keeps_no_room_for_its_body(engine: FakeEngine) -> None:
    app, body = create_app(engine, ServeSection(max_body=1000, max_bodies=1000), version="1"), {"prompt": "a" * 900}
    with running(app) as port, ThreadPoolExecutor(1) as other:
        url = f"http://127.0.0.1:{port}/v1/jobs"
        waiting = other.submit(httpx.post, url, json=body, headers={"Prefer": "wait=3"})
        while not engine.submitted:
            time.sleep(0.01)
        time.sleep(0.1)
        assert httpx.post(url, json=body).status_code == 202 and not waiting.done()
        assert waiting.result().status_code == 202


class running:
    """An application on a port of its own."""

    def __init__(self, app: Any) -> None:
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none")
        self._server = uvicorn.Server(config)
        self._socket = bind("127.0.0.1", 0)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})

    def __enter__(self) -> int:
        self._thread.start()
        return self._socket.getsockname()[1]

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

"""More than a thousand wrong requests against a real server: each is refused, none is answered with 500, and the
server makes the same pictures afterwards as before."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.e2e.commands import Server, short_folder, until
from tests.e2e.corpus import MAX_BODY, ROUTES, Case, Raw, raw, requests
from tests.e2e.corpus_files import uploads

AT_ONCE = 4
SECONDS = 30.0
LAYOUT = f"""
name: small
workers: [{{stages: all, threads: 1}}]
serve: {{max_body: {MAX_BODY}}}
"""
STATUS = re.compile(rb"HTTP/1\.1 (\d{3})")
CASES = [*requests(), *uploads()]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with short_folder() as folder:
        (folder / "small.yaml").write_text(LAYOUT)
        server = Server(folder, "--layout", "small.yaml")
        yield server
        server.close()


@pytest.fixture
def unharmed(server: Server) -> Iterator[None]:
    """Checks that the server is afterwards what it was before."""

    def picture() -> bytes:
        return server.picture(server.ended(server.submit(num_inference_steps=4, exact=True)["id"]))

    before, workers, said = picture(), pids(server), len(server.said)
    yield
    until(server.is_idle, server.cluster)
    assert picture() == before
    assert pids(server) == workers, "no worker was lost"
    assert server.client.get("/health").status_code == 200
    assert "Traceback" not in server.said[said:], server.said[said:]


def pids(server: Server) -> dict[str, Any]:
    return {name: worker["pid"] for name, worker in server.workers().items()}


def test_the_corpus_is_of_routes_that_there_are(server: Server) -> None:
    """A request to nowhere is refused by every server."""
    paths = server.client.get("/openapi.json").raise_for_status().json()["paths"]
    assert {path for path in ROUTES if path not in paths} == set()
    assert len(CASES) > 1000 and len({case.name for case in CASES}) == len(CASES)


def test_wrong_requests_are_refused(server: Server, unharmed: None) -> None:
    done = server.ended(server.submit(num_inference_steps=1)["id"])["id"]
    limits = httpx.Limits(max_connections=AT_ONCE)
    with (
        httpx.Client(base_url=server.url, timeout=SECONDS, limits=limits) as client,
        ThreadPoolExecutor(AT_ONCE) as threads,
    ):
        wrong = [found for found in threads.map(lambda case: tried(client, case.of(done)), CASES) if found]
    assert not wrong, f"{len(wrong)} of {len(CASES)}:\n" + "\n".join(wrong)


def tried(client: httpx.Client, case: Case) -> str | None:
    """What is wrong with the answer."""
    try:
        headers = [(name.encode(), value.encode("latin-1")) for name, value in case.headers.items()]
        answer = client.request(case.method, case.path, content=case.content, headers=headers)
    except httpx.HTTPError as error:
        return f"{case.name}: no answer, {type(error).__name__}: {error}"
    status, text = answer.status_code, answer.text[:300]
    if status >= 500 or (case.refused and status < 400):
        return f"{case.name}: {status} {text}"
    if "Traceback" in answer.text:
        return f"{case.name}: a traceback: {text}"
    if status >= 400 and status != 416 and not message(answer):
        return f"{case.name}: {status} without a message: {text}"
    return None


def message(answer: httpx.Response) -> str:
    """What an error says, in any API's shape. A range that is none is answered by the framework, in plain text."""
    if "range" in answer.request.headers:
        return answer.text
    if answer.headers.get("content-type", "").partition(";")[0] != "application/json":
        return ""
    told = answer.json()
    error = told.get("error", told.get("detail"))
    return error.get("message", "") if isinstance(error, dict) else str(error or "")


def test_broken_http_is_refused(server: Server, unharmed: None) -> None:
    address = urlsplit(server.url)
    assert address.hostname and address.port
    wrong = [
        found
        for case in raw(address.netloc)
        if (found := spoken(address.hostname, address.port, case))
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def spoken(host: str, port: int, case: Raw) -> str | None:
    """What is wrong with how the server took these bytes."""
    heard = b""
    with socket.create_connection((host, port), timeout=SECONDS) as connection:
        try:
            connection.sendall(case.sent)
            if case.hang_up:
                return None
            while b"\r\n\r\n" not in heard and (got := connection.recv(65536)):
                heard += got
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has heard enough
        except TimeoutError:
            return f"{case.name}: neither an answer nor an end"
    statuses = [int(found) for found in STATUS.findall(heard)]
    if any(status >= 500 for status in statuses) or (case.answered and not statuses):
        return f"{case.name}: {statuses} {heard[:300]!r}"
    return None


def test_it_ends_well(server: Server) -> None:
    server.signal()
    assert server.end() == 0, server.said

"""The clients against answers that a test makes up: what is sent, what is tried again, what errors become."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from PIL import Image

from triptych import AsyncClient, Client
from triptych.errors import Cancelled, InvalidRequest, MediaError, QueueFull, StageFailed, TriptychError, Unreachable

DONE = {"id": "a1", "state": "done", "results": ["/v1/jobs/a1/results/0"], "error": None, "ended": 1.0}
QUEUED = {**DONE, "state": "queued", "results": []}


class Server:
    """Answers as it was told to, in order, and remembers what it was asked. An exception is a lost connection."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.asked.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def client(self, **more: Any) -> Client:
        return Client("http://server", transport=httpx.MockTransport(self), **more)


def ok(body: Any, status: int = 200) -> httpx.Response:
    return httpx.Response(status, json=body)


def wrong(status: int, code: str, field: str | None = None, **headers: str) -> httpx.Response:
    error = {"code": code, "message": "so it is", "field": field}
    return httpx.Response(status, json={"error": error}, headers=headers)


def stream(*events: tuple[str, str, Any]) -> httpx.Response:
    """Name, id and data of each."""
    text = "".join(
        f"{f'id: {id}' + chr(10) if id else ''}event: {name}\ndata: {json.dumps(data)}\n\n" for name, id, data in events
    )
    return httpx.Response(200, text=": alive\n\n" + text, headers={"Content-Type": "text/event-stream"})


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(file, "PNG")
    return file.getvalue()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses pass at once; what they were is noted."""
    paused: list[float] = []
    monkeypatch.setattr("triptych.client.sync.time.sleep", paused.append)
    return paused


def test_a_submission_is_sent_with_its_pictures_and_a_key_of_its_own(tmp_path: Path) -> None:
    server = Server(ok(QUEUED, 202), ok(QUEUED, 202))
    (tmp_path / "b.png").write_bytes(png())
    with server.client(api_key="secret") as client:
        sent = [Image.new("RGB", (1, 1)), png(), tmp_path / "b.png", "https://example.com/c.png"]
        job = client.submit(["x", "y"], seed=7, images=sent, mask=str(tmp_path / "b.png"), preview=True)
        client.submit("x", idempotency_key="mine")
    assert (job.id, job.state) == ("a1", "queued")
    body = json.loads(server.asked[0].content)
    assert (body["prompt"], body["seed"], body["preview"]) == (["x", "y"], 7, True)
    kinds = [url.partition(",")[0] for url in body["images"][:3]]
    assert kinds == ["data:image/png;base64"] * 3 and body["images"][3] == "https://example.com/c.png"
    assert base64.b64decode(body["mask"].partition(",")[2]) == png()
    first, second = (request.headers for request in server.asked)
    assert first["authorization"] == "Bearer secret" and len(first["idempotency-key"]) == 32
    assert second["idempotency-key"] == "mine"


def test_a_picture_that_is_none_is_not_sent(tmp_path: Path) -> None:
    server = Server()
    with server.client() as client, pytest.raises(MediaError) as caught:
        client.submit("x", images=[png(), b"GIF?"])
    assert caught.value.field == "images[1]" and not server.asked


def test_what_may_pass_is_tried_again_as_the_same_job(quick: list[float]) -> None:
    lost, full = httpx.ReadError("gone"), wrong(429, "queue_full", **{"Retry-After": "7"})
    server = Server(lost, full, wrong(503, "no_worker"), ok(QUEUED, 202))
    with server.client() as client:
        assert client.submit("x").id == "a1"
    assert len({request.headers["idempotency-key"] for request in server.asked}) == 1
    assert len(server.asked) == 4 and quick[1] == 7.0 and all(0 < pause <= 5 for pause in (quick[0], quick[2]))


@pytest.mark.parametrize(
    ("answer", "kind", "code"),
    [
        (wrong(429, "queue_full", **{"Retry-After": "100"}), QueueFull, "queue_full"),
        (httpx.ConnectError("refused"), Unreachable, "unreachable"),
    ],
)
def test_patience_has_an_end(answer: Any, kind: type[TriptychError], code: str, quick: list[float]) -> None:
    server = Server(answer)
    with server.client(patience=0.05) as client, pytest.raises(kind) as caught:
        client.submit("x")
    assert caught.value.code == code and not quick and len(server.asked) == 1
    if isinstance(caught.value, QueueFull):
        assert caught.value.retry_after == 100


@pytest.mark.parametrize(
    ("answer", "kind", "code", "field"),
    [
        (wrong(422, "invalid_request", "width"), InvalidRequest, "invalid_request", "width"),
        (wrong(400, "invalid_media", "images[0]"), MediaError, "invalid_media", "images[0]"),
        (wrong(409, "conflict", "idempotency-key"), TriptychError, "conflict", "idempotency-key"),
        (wrong(500, "stage_failed"), StageFailed, "stage_failed", None),
        (httpx.Response(502, text="<html>no"), TriptychError, "http_error", None),
        (httpx.Response(500, json=["?"]), TriptychError, "http_error", None),
        (httpx.Response(200, text="<html>"), TriptychError, "error", None),
    ],
)
def test_errors_are_the_packages_own(answer: httpx.Response, kind: type, code: str, field: str | None) -> None:
    server = Server(answer)
    with server.client() as client, pytest.raises(kind) as caught:
        client.submit("x")
    assert (caught.value.code, caught.value.field) == (code, field) and len(server.asked) == 1


def test_a_jobs_end_is_its_result_or_its_error(tmp_path: Path) -> None:
    why = {"code": "stage_failed", "message": "NaN", "field": None, "stage": "denoise"}
    server = Server(
        ok(DONE), httpx.Response(200, content=png(), headers={"Content-Type": "image/png"}),
        ok({**DONE, "state": "failed", "results": [], "error": why}), ok({**DONE, "state": "cancelled", "results": []}),
    )  # fmt: skip
    with server.client() as client:
        result = client.job("a1").result()
        with pytest.raises(StageFailed) as failed:
            client.job("a1").result()
        with pytest.raises(Cancelled):
            client.job("a1").result()
    assert (failed.value.stage, failed.value.job, failed.value.message) == ("denoise", "a1", "NaN")
    assert result.images[0].getpixel((0, 0)) == (255, 0, 0) and result.clips == ()
    (path,) = result.save(tmp_path / "new")
    assert (path.name, path.read_bytes()) == ("a1-0.png", png())


def test_a_lost_stream_goes_on_where_it_was() -> None:
    preview = "data:image/png;base64," + base64.b64encode(png()).decode()
    step = {"stage": "denoise", "step": 1, "steps": 2, "seconds": 0.5, "done_in": 2.0}
    server = Server(
        ok(QUEUED, 202),
        stream(("job", "", QUEUED), ("queued", "", {"position": 3, "starts_in": 1.0, "done_in": 4.0}),
               ("progress", "1", {**step, "preview": preview}), ("of tomorrow", "2", {})),
        httpx.ConnectError("refused"), wrong(503, "draining"),
        stream(("job", "", {**QUEUED, "state": "running"}), ("progress", "3", {**step, "step": 2}),
               ("done", "4", DONE)),
    )  # fmt: skip
    with server.client() as client:
        job = client.submit("x")
        told = list(job.events())
    assert [request.headers.get("last-event-id") for request in server.asked[1:]] == [None, "2", "2", "2"]
    assert [one.state for one in told] == ["queued", "queued", "running", "running", "running", "done"]
    assert (told[1].position, told[1].starts_in, told[1].done_in) == (3, 1.0, 4.0)
    assert (told[2].stage, told[2].step, told[2].steps, told[2].seconds) == ("denoise", 1, 2, 0.5)
    assert told[2].preview is not None and told[2].preview.size == (3, 2) and told[4].preview is None
    assert job.state == "done"


def test_a_stream_that_never_comes_back_is_given_up() -> None:
    server = Server(ok(QUEUED, 202), *[stream(("job", "", QUEUED))], *[httpx.ConnectError("refused")] * 99)
    with server.client(patience=0.25) as client, pytest.raises(Unreachable):
        list(client.submit("x").events())
    assert len(server.asked) < 10
    server = Server(ok(QUEUED, 202), wrong(404, "job_not_found", "job"))
    with server.client() as client, pytest.raises(TriptychError) as caught:
        list(client.submit("x").events())
    assert caught.value.code == "job_not_found"


def test_who_stops_waiting_cancels() -> None:
    server = Server(ok(QUEUED, 202), _Interrupt(), ok({**QUEUED, "state": "cancelled"}))
    with server.client() as client, pytest.raises(_Interrupt):
        client.generate("x")
    assert (server.asked[-1].method, server.asked[-1].url.path) == ("DELETE", "/v1/jobs/a1")


class _Interrupt(Exception):
    """Something that ends the waiting and is none of the network's errors."""


def test_jobs_are_paged_and_names_are_quoted() -> None:
    pages = [
        {"data": [{**DONE, "id": name} for name in names], "has_more": more}
        for names, more in (("ab", True), ("c", False))
    ]
    server = Server(*(ok(page) for page in pages), ok(DONE), ok(DONE), ok(DONE))
    with server.client() as client:
        assert [job.id for job in client.jobs(state=["done", "failed"])] == ["a", "b", "c"]
        client.cancel("../x?y")
        assert client.job("a1").refresh().state == "done"
    first, second, cancel, *_ = (request.url for request in server.asked)
    assert first.params.get_list("state") == ["done", "failed"] and "before" not in first.params
    assert second.params["before"] == "b" and cancel.raw_path == b"/v1/jobs/..%2Fx%3Fy"


def test_health_is_told_also_when_it_is_bad() -> None:
    bad = {"status": "unavailable", "missing": ["denoise"]}
    server = Server(ok(bad, 503), httpx.ConnectError("refused"), wrong(401, "not_authenticated"))
    with server.client() as client:
        assert client.health() == bad
        with pytest.raises(Unreachable):
            client.health()
        with pytest.raises(TriptychError, match="so it is"):
            client.health()


def asynchronously(server: Server, act: Callable[[AsyncClient], Any], **more: Any) -> Any:
    async def run() -> Any:
        async with AsyncClient("http://server", transport=httpx.MockTransport(server), **more) as client:
            return await act(client)

    return asyncio.run(run())


def test_the_other_client_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"stage": "denoise", "step": 1, "steps": 2, "seconds": 0.5, "done_in": 2.0}
    server = Server(
        httpx.ReadError("gone"), ok(QUEUED, 202), stream(("job", "", QUEUED), ("progress", "1", step)),
        httpx.ConnectError("refused"), stream(("done", "2", DONE)),
        httpx.Response(200, content=png(), headers={"Content-Type": "image/png"}),
    )  # fmt: skip

    async def act(client: AsyncClient) -> Any:
        result = await client.generate("x", images=[png()])
        return result.images[0].size

    assert asynchronously(server, act) == (3, 2)
    assert [request.headers.get("last-event-id") for request in server.asked[2:5]] == [None, "1", "1"]
    full = Server(wrong(429, "queue_full", **{"Retry-After": "9"}))
    with pytest.raises(QueueFull):
        asynchronously(full, lambda client: client.submit("x"), patience=1.0)


def test_the_other_client_cancels_what_is_not_waited_for() -> None:
    server = Server(ok(QUEUED, 202), _Interrupt(), ok(DONE))
    with pytest.raises(_Interrupt):
        asynchronously(server, lambda client: client.generate("x"))
    assert server.asked[-1].method == "DELETE"


def test_the_other_client_lists_cancels_and_asks() -> None:
    page = {"data": [DONE], "has_more": False}
    server = Server(
        ok(page), ok({**DONE, "state": "cancelled"}), ok({"status": "ok", "missing": []}), ok(DONE), ok(DONE)
    )

    async def act(client: AsyncClient) -> None:
        (job,) = [job async for job in client.jobs()]
        assert (await job.cancel()).state == "cancelled"
        assert (await client.health())["status"] == "ok"
        assert (await (await client.job("a1")).refresh()).state == "done"

    asynchronously(server, act)


def test_patience_begins_when_the_connection_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job may be silent for long; only comments came meanwhile."""
    server = Server(ok(QUEUED, 202))
    now = [1000.0]
    monkeypatch.setattr("triptych.client.shared.time.monotonic", lambda: now[0])

    def silent() -> Iterator[bytes]:
        yield f"event: job\ndata: {json.dumps(QUEUED)}\n\n".encode()
        now[0] += 3600
        raise httpx.ReadError("gone")

    kind = {"Content-Type": "text/event-stream"}
    server.answers += [httpx.Response(200, content=silent(), headers=kind), stream(("done", "4", DONE))]
    with server.client(patience=10.0) as client:
        assert [one.state for one in client.submit("x").events()] == ["queued", "done"]

"""What both clients share: everything but the sending and the waiting."""

from __future__ import annotations

import base64
import io
import itertools
import json
import time
import uuid
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import httpx2 as httpx
from PIL import Image

from triptych.errors import Cancelled, MediaError, QueueFull, StageFailed, TriptychError, Unreachable, error_class

__all__ = [
    "ENDED",
    "PAGE",
    "Ask",
    "Flow",
    "Follow",
    "JobUpdate",
    "KnownJob",
    "RemoteFile",
    "RemoteResult",
    "State",
    "asked_whole",
    "body_of",
    "fetched",
    "headers_of",
    "health",
    "path_of",
    "submitted",
]

Picture = Image.Image | bytes | Path | str
"""A picture, a file's bytes or path, a data URL, or a URL that the server may fetch."""
State = Literal["queued", "running", "done", "failed", "cancelled"]

ENDED = ("done", "failed", "cancelled")
SILENCE = 45.0
"""Seconds after which an event stream that says nothing is taken for dead; a server speaks every 15."""
MAX_EVENT = 64 << 20
"""Bytes of one event."""
MAX_PAUSE = 5.0
"""Seconds between two tries where the server does not say how long to wait."""
PAGE = 100

T = TypeVar("T")


@dataclass(frozen=True)
class JobUpdate:
    """How a job gets on. `position`: jobs before it while it waits; `starts_in` and `done_in`: estimated seconds (None:
    not known yet); `step` of `steps` within `stage`, `seconds` after the stage began; `preview`: a small picture of
    what there is, if the job was submitted with `preview`."""

    state: State
    position: int | None = None
    starts_in: float | None = None
    done_in: float | None = None
    stage: str | None = None
    step: int = 0
    steps: int = 0
    seconds: float = 0.0
    preview: Image.Image | None = None


@dataclass(frozen=True)
class RemoteFile:
    """One output of a job, as a file."""

    data: bytes = field(repr=False)
    media_type: str

    @property
    def suffix(self) -> str:
        """Of its name."""
        return {"image/jpeg": ".jpg"}.get(self.media_type, "." + self.media_type.rpartition("/")[2])

    def image(self) -> Image.Image:
        """The picture. Raises MediaError for a clip."""
        if not self.media_type.startswith("image/"):
            raise MediaError(f"it is {self.media_type}, no picture", field="output")
        picture = Image.open(io.BytesIO(self.data))
        picture.load()
        return picture


@dataclass(frozen=True)
class RemoteResult:
    """What a job made: `files` in their order, `job` as the server tells of it (with `request`, defaults filled in,
    `times` and `warnings`)."""

    job: dict[str, Any]
    files: tuple[RemoteFile, ...]

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The outputs that are pictures."""
        return tuple(file.image() for file in self.files if file.media_type.startswith("image/"))

    @property
    def clips(self) -> tuple[bytes, ...]:
        """The outputs that are clips, as files."""
        return tuple(file.data for file in self.files if file.media_type.startswith("video/"))

    def save(self, folder: Path | str) -> list[Path]:
        """Writes the files into a folder, which is made if need be, and returns where they are."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        name = "".join(letter for letter in self.job["id"] if letter.isalnum())
        paths = [place / f"{name}-{number}{file.suffix}" for number, file in enumerate(self.files)]
        for path, file in zip(paths, self.files, strict=True):
            path.write_bytes(file.data)
        return paths


class KnownJob:
    """What the server last told of a job."""

    def __init__(self, info: dict[str, Any]) -> None:
        self.info = info

    @property
    def id(self) -> str:
        """Its id."""
        return self.info["id"]

    @property
    def state(self) -> State:
        """As last told: queued, running, done, failed or cancelled."""
        return self.info["state"]


@dataclass(frozen=True)
class Ask:
    """Something to be sent."""

    method: str
    path: str
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    query: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """As the HTTP client takes them."""
        return {
            "method": self.method, "url": self.path, "content": self.body, "headers": self.headers,
            "params": self.query,
        }  # fmt: skip


Flow = Generator[Ask | float, Any, T]
"""Yields what is to be sent, and is given the answer or the httpx.TransportError; or seconds to pause, and is given
nothing. Returns what came of it."""


def _asked(ask: Ask, patience: float) -> Flow[httpx.Response]:
    """The answer. What may pass (no connection, too much to do) is asked again for `patience` seconds; everything that
    is asked here may be asked twice."""
    give_up = time.monotonic() + patience
    for attempt in itertools.count():
        wait = min(0.1 * 2 ** min(attempt, 10), MAX_PAUSE)
        try:
            response: httpx.Response = yield ask
        except httpx.TransportError as error:
            wrong = unreachable(error)
        else:
            if response.is_success:
                return response
            wrong = _error(response)
            if response.status_code not in (429, 503):
                raise wrong
            wait = _retry_after(response) or wait
        if time.monotonic() + wait > give_up:
            raise wrong
        yield wait
    raise AssertionError("it is asked until it is answered")


def headers_of(api_key: str | None) -> dict[str, str]:
    """Of everything that is sent."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def unreachable(error: httpx.TransportError) -> Unreachable:
    return Unreachable(f"the server cannot be reached: {error or type(error).__name__}")


def _retry_after(response: httpx.Response) -> float | None:
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdecimal() else None


def _error(response: httpx.Response) -> TriptychError:
    """An answer's error as the exception that it was."""
    try:
        told = json.loads(response.content)["error"]
        code, message, name = str(told["code"]), str(told["message"]), told.get("field")
    except (ValueError, KeyError, TypeError, AttributeError):
        code, name = "http_error", None
        message = f"{response.status_code} {response.reason_phrase}: {response.text[:200]}"
    return _exception(code, message, name, retry_after=_retry_after(response))


def _exception(
    code: str, message: str, name: str | None, *, retry_after: float | None = None, stage: str = "", job: str = ""
) -> TriptychError:
    kind = error_class(code)
    if issubclass(kind, QueueFull):
        return kind(message, retry_after=retry_after or 1.0, field=name)
    if issubclass(kind, StageFailed):
        return kind(message, stage=stage, job=job, field=name)
    made = kind(message, field=name)
    made.code = code  # of the server's own, or of a newer one, that have no class here
    return made


def _told(response: httpx.Response) -> dict[str, Any]:
    try:
        return response.json()
    except ValueError:
        raise TriptychError(f"{response.url} is no Triptych server: its answer is no JSON") from None


def path_of(job: str, rest: str = "") -> str:
    """Of a job, or of what belongs to it."""
    return f"/v1/jobs/{quote(job, safe='')}{rest}"


def body_of(prompt: str | Sequence[str], fields: dict[str, Any]) -> bytes:
    """A submission. Raises MediaError for pictures that are none, TypeError for what JSON has no word for."""
    body: dict[str, Any] = {"prompt": prompt if isinstance(prompt, str) else list(prompt), **fields}
    if body.get("images") is not None:
        body["images"] = [_url(one, f"images[{index}]") for index, one in enumerate(body["images"])]
    if body.get("mask") is not None:
        body["mask"] = _url(body["mask"], "mask")
    return json.dumps(body, allow_nan=False).encode()


def _url(picture: Picture, name: str) -> str:
    if isinstance(picture, str) and picture.startswith(("data:", "http://", "https://")):
        return picture
    if isinstance(picture, Image.Image):
        file = io.BytesIO()
        picture.save(file, "PNG")
        kind, data = "image/png", file.getvalue()
    else:
        data = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
        try:
            with Image.open(io.BytesIO(data)) as found:
                kind = Image.MIME[found.format or ""]
        except (OSError, KeyError, Image.DecompressionBombError):
            raise MediaError("given a file that is no picture", field=name) from None
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def submitted(body: bytes, key: str | None, patience: float) -> Flow[dict[str, Any]]:
    """Submits a job and returns it."""
    # However often it is sent, it makes one job.
    headers = {"Content-Type": "application/json", "Idempotency-Key": key or uuid.uuid4().hex}
    return _told((yield from _asked(Ask("POST", "/v1/jobs", body, headers), patience)))


def asked_whole(method: str, path: str, patience: float, **query: Any) -> Flow[dict[str, Any]]:
    """What a path answers."""
    asked = Ask(method, path, query={name: value for name, value in query.items() if value is not None})
    return _told((yield from _asked(asked, patience)))


def health() -> Flow[dict[str, Any]]:
    """How the server is, asked once."""
    try:
        response = yield Ask("GET", "/health")
    except httpx.TransportError as error:
        raise unreachable(error) from None
    if response.status_code not in (200, 503):
        raise _error(response)
    return _told(response)


def fetched(job: dict[str, Any], patience: float) -> Flow[RemoteResult]:
    """An ended job's result. Raises what it failed with."""
    if job["state"] == "cancelled":
        raise Cancelled(f"job {job['id']} was cancelled")
    if job["state"] == "failed":
        why = job["error"] or {"code": "error", "message": "the job failed"}
        stage = why.get("stage") or ""
        raise _exception(why["code"], why["message"], why.get("field"), stage=stage, job=job["id"])
    files = []
    for number in range(len(job["results"])):
        response = yield from _asked(Ask("GET", path_of(job["id"], f"/results/{number}")), patience)
        files.append(RemoteFile(response.content, response.headers.get("content-type", "").partition(";")[0]))
    return RemoteResult(job, tuple(files))


class Follow:
    """A job's events over as many connections as it takes."""

    def __init__(self, job: str, patience: float) -> None:
        self.job: dict[str, Any] | None = None
        """as it ended"""
        self._last = ""
        self._state: State = "queued"
        self._patience = patience
        self._open = False
        self._alive = time.monotonic()
        """since when there is no connection, if there is none"""
        self._pause = 0.0
        self._path = path_of(job, "/events")

    def arguments(self) -> dict[str, Any]:
        """Of the next connection."""
        headers = {"Last-Event-ID": self._last} if self._last else {}
        return {"method": "GET", "url": self._path, "headers": headers, "timeout": httpx.Timeout(SILENCE)}

    def opened(self) -> None:
        """There is a connection."""
        self._open = True

    def hear(self, event: httpx.ServerSentEvent) -> JobUpdate | None:
        """What an event says; None for one of a kind that is not known here."""
        if event.event != "job":  # which comes with every connection, whatever becomes of that
            self._pause = 0.0
        if event.id:
            self._last = event.id
        if event.event not in ("job", "queued", "progress", *ENDED):
            return None
        told: dict[str, Any] = json.loads(event.data)
        if event.event in ("job", *ENDED):
            self._state = told["state"]
        elif event.event == "progress":
            self._state = "running"
        if event.event in ENDED:
            self.job = told
        known = {name: told[name] for name in JobUpdate.__dataclass_fields__ if name in told and name != "preview"}
        return JobUpdate(**{**known, "state": self._state, "preview": _preview(told.get("preview"))})

    def refused(self, response: httpx.Response) -> float:
        """Seconds to pause before the next try. Raises what the server says, if that will not pass."""
        wrong = _error(response)
        if response.status_code not in (429, 502, 503, 504):
            raise wrong
        return self._later(wrong, _retry_after(response))

    def broke(self, error: httpx.TransportError | None) -> float:
        """The same after a connection that broke, or (None) ended too early."""
        return self._later(Unreachable("the event stream ended early") if error is None else unreachable(error))

    def _later(self, wrong: TriptychError, wait: float | None = None) -> float:
        if self._open:
            self._open, self._alive = False, time.monotonic()
        self._pause = min(max(0.1, 2 * self._pause), MAX_PAUSE)
        wait = wait or self._pause
        if time.monotonic() + wait > self._alive + self._patience:
            raise wrong
        return wait


def _preview(url: str | None) -> Image.Image | None:
    if not url:
        return None
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    picture.load()
    return picture

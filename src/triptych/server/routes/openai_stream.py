"""OpenAI's API: pictures as they come, as server-sent events."""

from __future__ import annotations

import base64
import contextlib
import io
import math
import time
from collections.abc import AsyncIterator
from typing import Any

from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from triptych.errors import TriptychError
from triptych.messages import Picture
from triptych.server.admission import view_of
from triptych.server.door import JobView
from triptych.server.errors import STATUSES, openai_error
from triptych.server.events import ALIVE, KEEP_ALIVE, EventStream, event
from triptych.server.failures import check_done
from triptych.server.files import bytes_of, files_of
from triptych.server.follow import Happening
from triptych.server.front import Front
from triptych.server.intake.openai_bodies import ImageBody, warnings_of
from triptych.server.locks.keys import Caller
from triptych.server.views import SSE_EVENT

__all__ = ["EVENTS", "picture_events", "size_of"]

EVENTS: dict[str, Any] = {
    "text/event-stream": {
        "itemSchema": SSE_EVENT,
        "example": 'event: image_generation.partial_image\ndata: {"type":"image_generation.partial_image",'
        '"partial_image_index":0,"b64_json":"iVBORw0KGgo=","created_at":1767225600,"size":"64x64",'
        '"quality":"auto","background":"opaque","output_format":"png"}\n\n',
    }
}
"""A stream on the OpenAPI page."""


class _Events(EventStream):
    """A job's events. With them the job ends, if it has not: its reader left."""

    def __init__(self, front: Front, job: str, events: AsyncIterator[bytes]) -> None:
        super().__init__(events)
        self._front, self._job = front, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Not in the stream itself, which is not even begun for a reader that left early, and not closed for a slow one.
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._front.cancel(self._job)


async def picture_events(front: Front, caller: Caller, job: str, body: ImageBody, kind: str) -> EventStream:
    """A job's previews and pictures as they come, as events of that kind; whoever stops reading cancels it."""
    view = await run_in_threadpool(view_of, front, caller, job)
    return _Events(front, job, _told(front, caller, job, body, kind, _Previews(view, body.partial_images or 0)))


async def _told(
    front: Front, caller: Caller, job: str, body: ImageBody, kind: str, shown: _Previews
) -> AsyncIterator[bytes]:  # fmt: skip
    try:
        async with contextlib.aclosing(front.follower.happenings(job, seconds=KEEP_ALIVE)) as happenings:
            async for happening in happenings:
                if happening is None:
                    yield ALIVE
                elif (preview := shown.due(happening)) is not None:
                    data = await run_in_threadpool(shown.file, preview)
                    yield _event(f"{kind}.partial_image", shown.told(data))
        view = await run_in_threadpool(view_of, front, caller, job)
        check_done(view)
        for data in await front.slowly(_finals, front, view):
            warned = {"warnings": warnings_of(body, view.record.spec.warnings)}
            yield _event(f"{kind}.completed", {**data, **warned})
    except TriptychError as error:
        # It is too late for a status.
        _, said = openai_error(STATUSES.get(error.code, 500), error.code, error.message, error.field)
        yield _event("error", said)


class _Previews:
    """Which previews of a job are shown, and as what: so many, spread over its steps, the last one when it is
    denoised."""

    def __init__(self, view: JobView, count: int) -> None:
        self._size = _asked_size(view)
        self._format = view.record.spec.request.get("output_format") or "png"
        self._count = count
        self._sent = 0

    def due(self, happening: Happening) -> Picture | None:
        """The preview of a step, if one is to be shown by then."""
        if happening.preview is None or self._sent >= self._count:
            return None
        reached = math.floor(self._count * happening.step / max(1, happening.steps))
        return happening.preview if reached > self._sent else None

    def file(self, preview: Picture) -> tuple[bytes, tuple[int, int]]:
        """A preview in the size and the format of the picture that is to come."""
        picture = Image.frombytes("RGB", (preview.width, preview.height), preview.pixels)
        if self._size is not None:
            picture = picture.resize(self._size, Image.Resampling.BICUBIC)
        file = io.BytesIO()
        picture.save(file, self._format)
        return file.getvalue(), picture.size

    def told(self, made: tuple[bytes, tuple[int, int]]) -> dict[str, Any]:
        """The event's fields; one more has been shown then."""
        self._sent += 1
        data, size = made
        return {"partial_image_index": self._sent - 1, **_picture(data, size, self._format, time.time())}


def _finals(front: Front, view: JobView) -> list[dict[str, Any]]:
    made = []
    for file in files_of(front.door, view):
        data = bytes_of(file)
        format = file.media_type.removeprefix("image/")
        made.append(_picture(data, size_of(view, data), format, view.record.ended or time.time()))
    return made


def size_of(view: JobView, data: bytes) -> tuple[int, int]:
    """Width and height of a finished job's picture."""
    asked = _asked_size(view)
    if asked is not None:
        return asked
    with Image.open(io.BytesIO(data)) as picture:
        return picture.size


def _asked_size(view: JobView) -> tuple[int, int] | None:
    """A job's size, where the request says it rather than the picture that it brought."""
    request = view.record.spec.request
    return (request["width"], request["height"]) if {"width", "height"} <= request.keys() else None


def _picture(data: bytes, size: tuple[int, int], format: str, at: float) -> dict[str, Any]:
    return {
        "b64_json": base64.b64encode(data).decode(),
        "created_at": int(at),
        "size": f"{size[0]}x{size[1]}",
        "quality": "auto",
        "background": "opaque",
        "output_format": format,
    }


def _event(name: str, data: dict[str, Any]) -> bytes:
    return event(name, {"type": name, **data})

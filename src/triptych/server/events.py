"""A job as it gets on, as server-sent events."""

from __future__ import annotations

import base64
import contextlib
import io
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi.responses import StreamingResponse
from PIL import Image
from starlette.concurrency import run_in_threadpool

from triptych.cluster import Estimate
from triptych.server.admission import view_of
from triptych.server.errors import JobNotFound
from triptych.server.views import SSE_EVENT, job_object

if TYPE_CHECKING:
    from triptych.messages import Picture
    from triptych.server.follow import Happening
    from triptych.server.front import Front
    from triptych.server.locks.keys import Caller

__all__ = ["ALIVE", "EVENTS", "KEEP_ALIVE", "EventStream", "event", "job_events"]

KEEP_ALIVE = 15.0
"""Seconds of silence after which a comment tells whoever is between that the connection is alive."""
ALIVE = b": alive\n\n"
"""That comment."""
LOOK = 1.0
"""Seconds between two looks at a job that waits."""
AGAIN = 5.0
"""Seconds after which one that waits is told again, though its place is the same."""
FRESH = 0.5
"""Seconds for which an estimate holds, time taken off."""

EVENTS: dict[str, Any] = {
    "text/event-stream": {
        "itemSchema": SSE_EVENT,
        "example": 'event: queued\ndata: {"position":2,"starts_in":1.5,"done_in":3.1}\n\n'
        'id: 2\nevent: progress\ndata: {"stage":"denoise","step":1,"steps":8,"seconds":0.1,"done_in":0.9,'
        '"preview":"data:image/png;base64,iVBORw0KGgo="}\n\n'
        'id: 10\nevent: done\ndata: {"id":"0f8b2c4de6a14f0f9c5b7a3d2e1f6c8b","state":"done"}\n\n',
    }
}
"""A stream on the OpenAPI page."""


class EventStream(StreamingResponse):
    """Server-sent events, which nobody on the way may keep."""

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")


def event(name: str, data: dict[str, Any], number: int | None = None) -> bytes:
    """One of them; `number` is its id."""
    head = b"" if not number else b"id: %d\n" % number
    return b"%sevent: %s\ndata: %s\n\n" % (head, name.encode(), msgspec.json.encode(data))


def job_events(front: Front, caller: Caller, job: str, after: int) -> StreamingResponse:
    """What happens to a job after happening `after`, to its end: `job` (the job as it stands, first), `queued` while it
    waits, `progress`, and finally `done`, `failed` or `cancelled` (the job as it ended). One who reads slowly is told
    what there is then; nothing waits for that."""
    return EventStream(_Told(front, caller, job).events(after))


class _Told:
    """One listener's stream."""

    def __init__(self, front: Front, caller: Caller, job: str) -> None:
        self._front, self._caller, self._job = front, caller, job
        self._estimate, self._estimated = Estimate(), 0.0
        self._place: int | None = None
        self._placed = 0.0
        self._said = 0.0

    async def events(self, after: int) -> AsyncIterator[bytes]:
        """The stream. A happening's number is its event's id; one from a former life of the server means nothing."""
        with contextlib.suppress(JobNotFound):  # it was forgotten meanwhile
            yield await self._whole("job")
            if after > await run_in_threadpool(self._front.follower.count, self._job):
                after = 0
            last = after
            happenings = self._front.follower.happenings(self._job, after, LOOK)
            async with contextlib.aclosing(happenings):
                async for happening in happenings:
                    last = last if happening is None else happening.number
                    told = await self._tell(happening)
                    if told:
                        yield told
            yield await self._whole(None, last)

    async def _tell(self, happening: Happening | None) -> bytes | None:
        if happening is None:
            return await run_in_threadpool(self._waits)
        return None if happening.stage is None else await self._progress(happening)

    async def _whole(self, name: str | None, number: int | None = None) -> bytes:
        """The job as it stands, under that name; without one under its state, if it has ended."""
        found = await run_in_threadpool(self._object)
        if name is None and found["ended"] is None:
            return b""
        self._place, self._placed = found["position"], time.monotonic()
        return self._event(name or found["state"], found, number)

    def _object(self) -> dict[str, Any]:
        front = self._front
        return job_object(front.door, view_of(front, self._caller, self._job)).model_dump()

    def _waits(self) -> bytes | None:
        """While nothing happens: its place in the queue if it has changed, a comment after a long silence."""
        now, view = time.monotonic(), view_of(self._front, self._caller, self._job)
        place = view.position
        if place is not None and (place != self._place or now - self._placed >= AGAIN):
            self._place, self._placed = place, now
            found = self._front.door.estimate(self._job)
            told = {"position": place, "starts_in": found.starts_in, "done_in": found.done_in}
            return self._event("queued", told)
        if now - self._said < KEEP_ALIVE:
            return None
        self._said = now
        return ALIVE

    async def _progress(self, happening: Happening) -> bytes:
        now = time.monotonic()
        if now - self._estimated > FRESH:
            self._estimate = await run_in_threadpool(self._front.door.estimate, self._job)
            self._estimated = now
        told: dict[str, Any] = {
            "stage": happening.stage,
            "step": happening.step,
            "steps": happening.steps,
            "seconds": happening.seconds,
            "done_in": self._estimate.later(now - self._estimated).done_in,
        }
        if happening.preview is not None:
            told["preview"] = await run_in_threadpool(_data_url, happening.preview)
        return self._event("progress", told, happening.number)

    def _event(self, name: str, data: dict[str, Any], number: int | None = None) -> bytes:
        self._said = time.monotonic()
        return event(name, data, number)


def _data_url(preview: Picture) -> str:
    file = io.BytesIO()
    Image.frombytes("RGB", (preview.width, preview.height), preview.pixels).save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

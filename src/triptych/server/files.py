"""Results as files on their way to a client."""

from __future__ import annotations

import mimetypes
import os
from io import BytesIO
from typing import Annotated, BinaryIO

from fastapi import Header, Response
from fastapi.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from triptych.messages import MEDIA_TYPES
from triptych.server.door import Door, JobView, ResultFile
from triptych.server.errors import NotDone, ResultGone, ResultNotFound

__all__ = ["SUFFIXES", "KnownTags", "bytes_of", "files_of", "opened", "result_response"]

KnownTags = Annotated[
    str | None, Header(alias="If-None-Match", description="the ETag of what the client has", max_length=4096)
]
SUFFIXES = {kind: ".jpg" if format == "jpeg" else f".{format}" for format, kind in MEDIA_TYPES.items()}


def files_of(door: Door, view: JobView) -> list[ResultFile]:
    """All outputs of a finished job. Raises NotDone for one that has not ended well, ResultGone once they have
    expired."""
    record = view.record
    if record.state != "done":
        raise NotDone(f"job {record.spec.id} is {record.state}")
    files = list(door.result_files(record.spec.id))
    if not files:
        raise ResultGone(f"the results of job {record.spec.id} have expired")
    return files


def result_response(door: Door, view: JobView, number: int, known: str | None = None) -> Response:
    """One output of a finished job; ranges are the framework's. `known`: the If-None-Match of a client that may have
    it already. Raises like `files_of`, and ResultNotFound."""
    files = files_of(door, view)
    if not 0 <= number < len(files):
        raise ResultNotFound(f"given {number}; allowed: 0 to {len(files) - 1}", field="number")
    name = f"{view.record.spec.id}-{number}"
    tag = f'"{name}-{round(1000 * (view.record.ended or 0)):x}"'
    headers = {"ETag": tag, "Cache-Control": "private, max-age=31536000, immutable"}
    if known is not None and (
        known.strip() == "*" or tag in {one.strip().removeprefix("W/") for one in known.split(",")}
    ):
        return Response(status_code=304, headers=headers)
    return _response(files[number], name, headers)


def bytes_of(file: ResultFile) -> bytes:
    """What a result holds. Raises ResultGone once it has expired."""
    with opened(file) as found:
        return found.read()


def opened(file: ResultFile) -> BinaryIO:
    """A result to read from; once it is open, it cannot expire. Raises ResultGone if it has before."""
    if file.data is not None:
        return BytesIO(file.data)
    try:
        path = file.path
        assert path is not None, "a result is a file or bytes"
        return path.open("rb")
    except (FileNotFoundError, KeyError):
        raise ResultGone("the result has expired") from None


class _Sent(FileResponse):
    """A file. As long as it is not open, nothing is said, since it may expire; it is 410 then."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head: list[Message] = []

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                head.append(message)
                return
            if head:
                await send(head.pop())
            await send(message)

        try:
            await super().__call__(scope, receive, sending)
        except FileNotFoundError:
            raise ResultGone("the result has expired") from None


def _response(file: ResultFile, name: str, headers: dict[str, str]) -> Response:
    suffix = SUFFIXES.get(file.media_type) or mimetypes.guess_extension(file.media_type) or ""
    headers["Content-Disposition"] = f'inline; filename="{name}{suffix}"'
    headers["X-Content-Type-Options"] = "nosniff"
    if file.data is not None:
        return Response(file.data, headers=headers, media_type=file.media_type)
    with opened(file) as found:
        size_and_age = os.fstat(found.fileno())
    return _Sent(found.name, headers=headers, media_type=file.media_type, stat_result=size_and_age)

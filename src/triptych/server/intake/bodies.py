"""Bodies of bounded size, and a job from its JSON."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import Request as HttpRequest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from starlette.requests import ClientDisconnect

from triptych.errors import InvalidRequest
from triptych.request import Request
from triptych.server.admission import Wanted
from triptych.server.errors import ClientClosedRequest, WrongMediaType
from triptych.server.front import Front
from triptych.server.intake.pictures import developed
from triptych.server.locks.guard import announced_size, check_size
from triptych.server.locks.keys import Caller

__all__ = ["JOB_BODY", "bounded", "check_simple", "checked", "first_wrong", "job_of", "read_body"]

MAX_IMAGES = 16
MAX_PRIORITY = 100
MAX_DEADLINE = 7 * 24 * 3600.0

MAX_COMMAS = 100_000
MAX_BRACKETS = 10_000
"""Of JSON, text in it included: a value that holds others takes a hundred times the bytes that it came as."""

Body = TypeVar("Body", bound=BaseModel)

PICTURE = r"^(data:image/[a-z0-9.+-]{1,32};base64,|https?://)"


def _body_model() -> type[BaseModel]:
    """The request's fields as JSON has them, pictures as data URLs, and what concerns the job alone."""
    shared = {name: (info.annotation, info) for name, info in Request.model_fields.items()}
    own: dict[str, Any] = {
        "images": (
            tuple[Annotated[str, Field(pattern=PICTURE)], ...],
            Field(default=(), max_length=MAX_IMAGES, description="data:image/…;base64,… or URLs"),
        ),
        "mask": (
            Annotated[str | None, Field(pattern=PICTURE)],
            Field(default=None, description="as in images; white is painted anew"),
        ),
        "preview": (bool, Field(default=False, description="make small pictures of what it has got to")),
        "priority": (int, Field(default=0, ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="higher goes first")),
        "deadline": (
            float | None,
            Field(default=None, gt=0, le=MAX_DEADLINE, allow_inf_nan=False, description="seconds from now"),
        ),
        "exact": (bool, Field(default=False, description="bit for bit the same in any layout; may be slower")),
    }
    config = ConfigDict(extra="forbid", frozen=True, strict=True)
    return create_model("JobBody", __config__=config, **{**shared, **own})


JOB_BODY = _body_model()
"""The body of `POST /v1/jobs`."""

_JOB_ONLY = ("preview", "priority", "deadline", "exact")


async def read_body(request: HttpRequest, limit: int) -> bytes:
    """The body of a JSON request. Raises WrongMediaType, or BodyTooLarge as soon as more than `limit` bytes are
    announced or have come."""
    # Asked for by name, so that a form on some web page cannot drive a server on the reader's own machine.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise WrongMediaType(f"given {kind[:80]!r}; allowed: application/json", field="content-type")
    return b"".join([part async for part in bounded(request, limit)])


async def bounded(request: HttpRequest, limit: int) -> AsyncGenerator[bytes, None]:
    """A request's body as it comes. Raises BodyTooLarge as soon as more than `limit` bytes are announced or have
    come, ClientClosedRequest if the client hangs up before its end."""
    check_size(announced_size(request.headers), limit)
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            check_size(size, limit)
            yield part
    except ClientDisconnect:
        raise ClientClosedRequest("it ended early: the client hung up", field="body") from None


@contextlib.asynccontextmanager
async def job_of(front: Front, caller: Caller, data: bytes) -> AsyncIterator[Wanted]:
    """A block that begins the job of a JSON. Raises InvalidRequest naming the first field that is wrong, MediaError
    for a picture."""
    fields = _fields(data)
    given = {name: value for name, value in fields.items() if name not in _JOB_ONLY}
    async with developed(front, caller, given.pop("images", ()), given.pop("mask", None)) as brought:
        yield Wanted(Request.parse(**given, **brought), **{name: fields[name] for name in _JOB_ONLY})


def _fields(data: bytes) -> dict[str, Any]:
    """A job's checked fields, pictures still as data URLs."""
    body = checked(JOB_BODY, data)
    return {name: getattr(body, name) for name in body.model_fields_set | set(_JOB_ONLY)}


def checked(model: type[Body], data: bytes) -> Body:
    """A body's JSON as its model. Raises InvalidRequest naming the first field that is wrong."""
    check_simple(data, "body")
    try:
        # Stricter than pydantic's own: no NaN, no half of a surrogate pair, no number that is none when written back.
        msgspec.json.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"not valid JSON: {error}", field="body") from None
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise first_wrong(error, model) from None


def check_simple(data: bytes, field: str) -> None:
    """Raises InvalidRequest for JSON of so many values that it would hold up everybody else."""
    if data.count(b",") > MAX_COMMAS or data.count(b"[") + data.count(b"{") > MAX_BRACKETS:
        allowed = f"at most {MAX_COMMAS} commas, and {MAX_BRACKETS} opening brackets"
        raise InvalidRequest(f"given JSON of more values than that; allowed: {allowed}", field=field)


def first_wrong(error: ValidationError, model: type[BaseModel]) -> InvalidRequest:
    """The first thing that is wrong with a body, in our words."""
    first = error.errors(include_url=False)[0]
    path = first["loc"]
    if first["type"] == "extra_forbidden":
        return InvalidRequest.of(
            str(path[0])[:80], first["input"], f"the fields {', '.join(sorted(model.model_fields))}"
        )
    if first["type"] == "missing":
        return InvalidRequest.of(str(path[0]), "nothing", "a value, it cannot be left out")
    return InvalidRequest.of(
        str(path[0]) if path else "body", first["input"], first["msg"].removeprefix("Input should be ")
    )

"""Errors on their way to a client: codes become HTTP statuses here, and nowhere else."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.routing import Match

from triptych.errors import InvalidRequest, TriptychError
from triptych.server.seeing.visits import visit_of

__all__ = [
    "STATUSES",
    "BodyTooLarge",
    "BodyTooSlow",
    "ClientClosedRequest",
    "Conflict",
    "Draining",
    "Forbidden",
    "JobNotFound",
    "NotAuthenticated",
    "NotDone",
    "ResultGone",
    "ResultNotFound",
    "TimedOut",
    "TooManyConnections",
    "UploadNotFound",
    "WrongHost",
    "WrongMediaType",
    "WrongOrigin",
    "add_handlers",
    "answer",
    "openai_error",
    "shape_of",
]

logger = logging.getLogger(__name__)


class JobNotFound(TriptychError):
    """No such job, or it has expired."""

    code = "job_not_found"


class ResultNotFound(TriptychError):
    """The job has fewer outputs."""

    code = "result_not_found"


class NotDone(TriptychError):
    """The job has no results: it has not ended, or not well."""

    code = "not_done"


class ResultGone(TriptychError):
    """The results were there and have expired."""

    code = "result_gone"


class BodyTooLarge(TriptychError):
    """The body has more bytes than the deployment takes."""

    code = "body_too_large"


class BodyTooSlow(TriptychError):
    """The body has not come to its end in time."""

    code = "body_too_slow"


class ClientClosedRequest(TriptychError):
    """The client hung up before the answer; nobody is told but the log and the counters."""

    code = "client_closed_request"


class WrongMediaType(TriptychError):
    """The body is not what the route reads."""

    code = "wrong_media_type"


class NotAuthenticated(TriptychError):
    """No API key was given, or none that is known."""

    code = "not_authenticated"


class WrongHost(TriptychError):
    """The request's Host is no name of this server: a page elsewhere may have had its own name lead here."""

    code = "wrong_host"


class WrongOrigin(TriptychError):
    """A web page elsewhere asks, which the deployment does not let in."""

    code = "wrong_origin"


class Forbidden(TriptychError):
    """The API key may not do this."""

    code = "forbidden"


class Conflict(TriptychError):
    """The same Idempotency-Key was given with another body."""

    code = "conflict"


class UploadNotFound(TriptychError):
    """No such upload, or it has expired."""

    code = "upload_not_found"


class TimedOut(TriptychError):
    """The job did not end within the time that its client gave it, and was cancelled."""

    code = "timed_out"


class TooManyConnections(TriptychError):
    """More requests are under way than the deployment answers at a time."""

    code = "too_many_connections"


class Draining(TriptychError):
    """The server is about to stop and takes no more jobs."""

    code = "draining"


STATUSES: Mapping[str, int] = {
    "invalid_request": 422,
    "not_finite": 422,
    "invalid_media": 400,
    "unsupported": 400,
    "not_authenticated": 401,
    "forbidden": 403,
    "wrong_origin": 403,
    "job_not_found": 404,
    "model_not_found": 404,
    "result_not_found": 404,
    "upload_not_found": 404,
    "not_done": 409,
    "cancelled": 409,
    "conflict": 409,
    "result_gone": 410,
    "body_too_slow": 408,
    "body_too_large": 413,
    "wrong_media_type": 415,
    "wrong_host": 421,
    "client_closed_request": 499,
    "queue_full": 429,
    "not_enough_memory": 429,
    "no_worker": 503,
    "storage_failed": 503,
    "draining": 503,
    "too_many_connections": 503,
    "deadline": 504,
    "time_limit": 504,
    "timed_out": 504,
}
"""The HTTP status of each code; 500 for the rest, which are nobody's mistake but ours."""

_LATER = {429: 1, 503: 5}
"""Seconds that a client should wait before it tries again, where the error does not say."""

_FINAL = ("cancelled", "stage_failed", "deadline", "time_limit")
"""How a job ended that was waited for: OpenAI's client would else try it again, which the cluster has done already."""


def add_handlers(app: FastAPI) -> None:
    """Every error leaves as `{"error": {"code", "message", "field"}}`, or in the shape of the API that its path belongs
    to, never with a traceback."""
    app.add_exception_handler(TriptychError, _ours)
    app.add_exception_handler(RequestValidationError, _wrong_parameter)
    app.add_exception_handler(HTTPException, _protocol)
    app.add_exception_handler(Exception, _unexpected)


Shape = Callable[[int, str, str, str | None], tuple[int, dict[str, Any]]]
"""From status, code, message and field to an answer's status and body."""


def _native(status: int, code: str, message: str, field: str | None) -> tuple[int, dict[str, Any]]:
    return status, {"error": {"code": code, "message": message, "field": field}}


def openai_error(status: int, code: str, message: str, field: str | None) -> tuple[int, dict[str, Any]]:
    """OpenAI's shape. It says 400 for 422, and the message names the field, since its client shows nothing else."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    text = f"{field}: {message}" if field else message
    return 400 if status == 422 else status, {"error": {"message": text, "type": kind, "param": field, "code": code}}


def detail_error(status: int, code: str, message: str, field: str | None) -> tuple[int, dict[str, Any]]:
    """The shape of servers that leave their errors to FastAPI, as cache-dit's and LightX2V's do."""
    return status, {"detail": f"{field}: {message}" if field else message, "code": code, "field": field}


_SHAPES: tuple[tuple[tuple[str, ...], Shape], ...] = (
    (("/v1/images", "/v1/videos", "/v1/models", "/v1/files"), openai_error),
    (("/get_model_info", "/generate", "/flush_cache", "/v1/tasks"), detail_error),
)
"""By the beginning of a path, what its errors look like where that is not our own shape."""


def shape_of(path: str) -> Shape:
    """What an error of that path looks like."""
    return next((shape for prefixes, shape in _SHAPES if path.startswith(prefixes)), _native)


def _answer(
    request: Request, status: int, code: str, message: str, field: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:  # fmt: skip
    visit_of(request.scope).code = code
    shown, body = shape_of(request.url.path)(status, code, message, field)
    return JSONResponse(body, shown, dict(headers or {}))


async def _ours(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, TriptychError)
    return answer(request, error)


def answer(request: Request, error: TriptychError) -> JSONResponse:
    """An error as its client gets it."""
    status = STATUSES.get(error.code, 500)
    if status == 500:
        logger.error("%s %s: %s: %s", request.method, request.url.path, error.code, error)
    headers: dict[str, str] = {}
    if status in _LATER:
        seconds = getattr(error, "retry_after", None) or _LATER[status]
        headers["Retry-After"] = str(math.ceil(seconds))
    if error.code in _FINAL:
        headers["X-Should-Retry"] = "false"
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return _answer(request, status, error.code, error.message, error.field, headers)


async def _wrong_parameter(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = first["loc"]  # where it was found, the parameter's name, and the place in that
    wrong = InvalidRequest.of(str(place[1] if len(place) > 1 else place[-1]), first.get("input"), first["msg"])
    return _answer(request, 422, wrong.code, wrong.message, wrong.field)


async def _protocol(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    headers = {**(error.headers or {})}
    if error.status_code == 405:
        headers["Allow"] = ", ".join(sorted(_methods(request)))
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    return _answer(request, error.status_code, code, str(error.detail), None, headers)


def _methods(request: Request) -> set[str]:
    """What a path may be asked with; the framework names only what the first route of that path knows."""
    found: set[str] = set()
    asked: str | None = None
    for context in iter_route_contexts(request.app.routes):
        route = context.original_route
        if route.matches(request.scope)[0] is not Match.NONE:
            asked = asked or getattr(route, "path", None)
            if getattr(route, "path", None) == asked:
                found |= getattr(route, "methods", None) or set()
    return found


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    # The traceback goes to the log with the exception itself, which is raised on after this answer.
    return _answer(request, 500, "internal", "an internal error; the server's log says more")

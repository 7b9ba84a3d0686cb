"""Errors on their way to a client: codes become HTTP statuses here, and nowhere else."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from triptych.errors import InvalidRequest, TriptychError

__all__ = [
    "STATUSES",
    "BodyTooLarge",
    "Conflict",
    "Draining",
    "Forbidden",
    "JobNotFound",
    "NotAuthenticated",
    "NotDone",
    "ResultGone",
    "ResultNotFound",
    "WrongMediaType",
    "add_handlers",
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


class WrongMediaType(TriptychError):
    """The body is not what the route reads."""

    code = "wrong_media_type"


class NotAuthenticated(TriptychError):
    """No API key was given, or none that is known."""

    code = "not_authenticated"


class Forbidden(TriptychError):
    """The API key may not do this."""

    code = "forbidden"


class Conflict(TriptychError):
    """The same Idempotency-Key was given with another body."""

    code = "conflict"


class Draining(TriptychError):
    """The server is about to stop and takes no more jobs."""

    code = "draining"


STATUSES: Mapping[str, int] = {
    "invalid_request": 422,
    "invalid_media": 400,
    "unsupported": 400,
    "not_authenticated": 401,
    "forbidden": 403,
    "job_not_found": 404,
    "model_not_found": 404,
    "result_not_found": 404,
    "not_done": 409,
    "cancelled": 409,
    "conflict": 409,
    "result_gone": 410,
    "body_too_large": 413,
    "wrong_media_type": 415,
    "queue_full": 429,
    "not_enough_memory": 429,
    "no_worker": 503,
    "draining": 503,
}
"""The HTTP status of each code; 500 for the rest, which are nobody's mistake but ours."""

_LATER = {429: 1, 503: 5}
"""Seconds that a client should wait before it tries again, where the error does not say."""


def add_handlers(app: FastAPI) -> None:
    """Every error leaves as `{"error": {"code", "message", "field"}}`, never with a traceback."""
    app.add_exception_handler(TriptychError, _ours)
    app.add_exception_handler(RequestValidationError, _wrong_parameter)
    app.add_exception_handler(HTTPException, _protocol)
    app.add_exception_handler(Exception, _unexpected)


def _answer(
    status: int, code: str, message: str, field: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    error = {"code": code, "message": message, "field": field}
    return JSONResponse({"error": error}, status, dict(headers or {}))


async def _ours(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, TriptychError)
    status = STATUSES.get(error.code, 500)
    if status == 500:
        logger.error("%s %s: %s: %s", request.method, request.url.path, error.code, error)
    headers: dict[str, str] = {}
    if status in _LATER:
        seconds = getattr(error, "retry_after", None) or _LATER[status]
        headers["Retry-After"] = str(math.ceil(seconds))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return _answer(status, error.code, error.message, error.field, headers)


async def _wrong_parameter(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    wrong = InvalidRequest.of(str(first["loc"][-1]), first.get("input"), first["msg"])
    return _answer(422, wrong.code, wrong.message, wrong.field)


async def _protocol(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    return _answer(error.status_code, code, str(error.detail), None, error.headers)


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    # The traceback goes to the log with the exception itself, which is raised on after this answer.
    return _answer(500, "internal", "an internal error; the server's log says more")

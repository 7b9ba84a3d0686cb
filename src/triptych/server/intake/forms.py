"""Forms (multipart/form-data) of bounded size, kept in memory: fields as text, files as bytes."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from fastapi import Request as HttpRequest
from pydantic import ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from triptych.errors import InvalidRequest
from triptych.server.errors import WrongMediaType
from triptych.server.intake.bodies import Body, bounded, check_simple, first_wrong

__all__ = ["FORM", "Form", "form_fields", "media_type", "read_form"]

FORM = "multipart/form-data"

MAX_FIELDS = 128
MAX_FILES = 32

Form = dict[str, list[str | bytes]]
"""Each name with all that was given under it, in order; what came as a file is bytes. Names of files are not kept."""

_CHARSETS = ("utf-8", "utf8", "us-ascii")
"""Python knows many more, some of which fail at whatever they read."""
_INNER = re.compile(r"([^\[\]]{1,64})\[([^\[\]]{1,64})\]")


class _Parser(MultiPartParser):
    """Starlette's, with files in memory (the body is bounded) and no quiet acceptance of a form that breaks off."""

    def __init__(self, headers: Headers, stream: AsyncGenerator[bytes, None], limit: int) -> None:
        self.spool_max_size = limit + 1
        self.complete = False
        super().__init__(headers, stream, max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=limit)

    def on_end(self) -> None:
        self.complete = True

    def close(self) -> None:
        """Lets go of the files, of that too in whose middle the form broke off."""
        for file in self._files_to_close_on_error:
            file.close()


def media_type(request: HttpRequest) -> str:
    """What the body is said to be, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_form(request: HttpRequest, limit: int) -> Form:
    """A form. Raises WrongMediaType for anything else, BodyTooLarge as soon as more than `limit` bytes are announced
    or have come, InvalidRequest for a form that is damaged, breaks off, or has too many parts."""
    if media_type(request) != FORM:
        raise WrongMediaType(f"given {media_type(request)[:80]!r}; allowed: {FORM}", field="content-type")
    charset = _charset(request)
    if charset not in _CHARSETS:
        raise WrongMediaType(f"given charset {charset[:80]!r}; allowed: utf-8, or none", field="content-type")
    parser = _Parser(request.headers, bounded(request, limit), limit)
    try:
        parts = await parser.parse()
    except (MultiPartException, FormParserError) as error:
        reason = getattr(error, "message", "") or str(error)
        raise InvalidRequest(f"not a valid form: {reason}", field="body") from None
    form: Form = {}
    for name, value in parts.multi_items():
        held = value.file.read() if isinstance(value, UploadFile) else value
        form.setdefault(name[:80], []).append(held)
    parser.close()
    if not parser.complete:
        raise InvalidRequest("not a valid form: it breaks off before its last boundary", field="body")
    return form


def _charset(request: HttpRequest) -> str:
    """What the body's text is said to be written in."""
    given = parse_options_header(request.headers["content-type"])[1].get(b"charset", b"utf-8")
    return given.decode("latin-1").strip().lower()


def form_fields(model: type[Body], form: Form, lists: tuple[str, ...] = ()) -> Body:
    """A form's text as a body's model: `name[]`, a name given again, and one of `lists` make a list, `name[key]` a part
    of an object. Raises InvalidRequest naming the first field that is wrong, or was given as a file."""
    fields: dict[str, Any] = {}
    for name, values in form.items():
        texts = [value for value in values if isinstance(value, str)]
        if len(texts) < len(values):
            raise InvalidRequest.of(name, "a file", "text, if it is a field at all")
        inner = _INNER.fullmatch(name)
        field = inner[1] if inner else name.removesuffix("[]")
        if inner and isinstance(fields.setdefault(field, {}), dict) and inner[2] not in fields[field]:
            fields[field][inner[2]] = _value(texts[0], name)
        elif inner or field in fields:
            raise InvalidRequest.of(field, "more than once", "once")
        else:
            fields[field] = texts if field != name or field in lists or len(texts) > 1 else texts[0]
    try:
        # Text holds numbers and switches as words.
        return model.model_validate(fields, strict=False)
    except ValidationError as error:
        raise first_wrong(error, model) from None


def _value(text: str, field: str) -> Any:
    """A value inside an object, of which no model says what it is: JSON if it is any."""
    data = text.encode()
    check_simple(data, field)
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return text

"""Pictures sent ahead, as OpenAI's files are."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, Field

from triptych.errors import InvalidRequest
from triptych.server.front import FrontOf, Who
from triptych.server.intake.forms import FORM, read_form
from triptych.server.intake.pictures import developed
from triptych.server.routes.detail_words import example
from triptych.server.routes.openai_words import openai_wrong
from triptych.server.uploads import KEPT_SECONDS, Upload

__all__ = ["router"]

router = APIRouter(prefix="/v1/files", tags=["uploads"])

MAX_PURPOSE = 64

_EXAMPLE_ID = "file-3f2c9a0d7b1e4c58a6d0f9e8b7c6a5d4"


class FileObject(BaseModel):
    """An upload. Times are seconds since the epoch."""

    id: str = Field(description="name it where a request takes a picture, as in `image_urls`")
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class FileDeleted(BaseModel):
    """It is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


_FILE = {
    "id": _EXAMPLE_ID, "object": "file", "bytes": 2048, "created_at": 1767225600, "expires_at": 1767229200,
    "filename": _EXAMPLE_ID, "purpose": "vision", "status": "processed",
}  # fmt: skip


_FORM = {
    "type": "object",
    "required": ["file"],
    "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "the picture's file"},
        "purpose": {"type": "string", "maxLength": MAX_PURPOSE, "description": "yours to choose; told again"},
    },
}

Id = Annotated[str, Path(description="the upload's id", examples=[_EXAMPLE_ID])]


@router.post(
    "",
    response_model=FileObject,
    responses={**example(_FILE), **openai_wrong(400, 401, 413, 415, 429)},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {FORM: {"schema": _FORM, "example": {"file": "(the picture's bytes)", "purpose": "vision"}}},
        }
    },
)
async def upload(front: FrontOf, caller: Who, request: Request) -> FileObject:
    """Keeps a picture for an hour, for requests that name its id. Only the API key that sent it can use it."""
    form = await read_form(request, front.settings.max_body)
    unknown = sorted(form.keys() - {"file", "purpose"})
    if unknown:
        raise InvalidRequest.of("body", unknown[0], "the fields file, purpose")
    files, purpose = form.get("file", []), form.get("purpose", ["vision"])[0]
    if len(files) != 1 or not isinstance(files[0], bytes):
        raise InvalidRequest.of("file", f"{len(files)} values", "one file")
    if not isinstance(purpose, str) or len(purpose) > MAX_PURPOSE:
        raise InvalidRequest.of("purpose", purpose, f"text of at most {MAX_PURPOSE} characters")
    async with developed(front, caller, files[:1], field="file"):  # what is none is refused at once
        pass
    return _object(front.uploads.add(caller.name, files[0], purpose))


@router.get("/{file}", response_model=FileObject, responses={**example(_FILE), **openai_wrong(401, 404)})
async def look(file: Id, front: FrontOf, caller: Who) -> FileObject:
    """An upload, while it is kept."""
    return _object(front.uploads.get(caller.name, file))


@router.delete(
    "/{file}",
    response_model=FileDeleted,
    responses={**example({"id": _EXAMPLE_ID, "object": "file", "deleted": True}), **openai_wrong(401, 404)},
)
async def delete(file: Id, front: FrontOf, caller: Who) -> FileDeleted:
    """Forgets an upload before its time."""
    front.uploads.remove(caller.name, file)
    return FileDeleted(id=file)


def _object(upload: Upload) -> FileObject:
    assert upload.expires - upload.created == KEPT_SECONDS
    return FileObject(
        id=upload.id,
        bytes=len(upload.data),
        created_at=int(upload.created),
        expires_at=int(upload.expires),
        filename=upload.id,
        purpose=upload.purpose,
    )

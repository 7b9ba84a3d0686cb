"""What OpenAI's routes say alike: errors, and bodies on the OpenAPI page."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from triptych.server.intake.forms import FORM

__all__ = ["one_file", "openai_wrong", "request_body", "some_files"]

_FILE = {"type": "string", "format": "binary"}


class OpenAIErrorDetail(BaseModel):
    """What was wrong, in OpenAI's words."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorBody(BaseModel):
    """Every error's body."""

    error: OpenAIErrorDetail

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "error": {
                        "message": "size: given 70; allowed: multiples of 8, such as 72",
                        "type": "invalid_request_error",
                        "param": "size",
                        "code": "invalid_request",
                    }
                }
            ]
        }
    )


def openai_wrong(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route may answer when something is wrong, for the OpenAPI page."""
    return {status: {"model": OpenAIErrorBody} for status in statuses}


def request_body(
    model: type[BaseModel], example: dict[str, Any], *, files: dict[str, dict[str, Any]] | None = None,
    needed: tuple[str, ...] = (), json: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """A body for the OpenAPI page: as JSON unless told otherwise, and as a form where it may bring `files`, of which
    those in `needed` cannot be left out."""
    schema = model.model_json_schema()
    content: dict[str, Any] = {"application/json": {"schema": schema, "example": example}} if json else {}
    if files is not None:
        form = {**schema, "properties": {**schema["properties"], **files}}
        form["required"] = [*schema.get("required", ()), *needed]
        content[FORM] = {"schema": form, "example": example}
    return {"requestBody": {"required": True, "content": content}}


def one_file(description: str) -> dict[str, Any]:
    """A file of a form, for the OpenAPI page."""
    return {**_FILE, "description": description}


def some_files(description: str) -> dict[str, Any]:
    """Files of a form under one name, for the OpenAPI page."""
    return {"type": "array", "items": _FILE, "minItems": 1, "description": description}

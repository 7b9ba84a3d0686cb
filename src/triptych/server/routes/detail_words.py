"""What cache-dit's and LightX2V's routes say alike: errors, and fields that the model has no use for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, Field

from triptych.errors import TriptychError

__all__ = ["body_of", "detail_wrong", "example", "in_words", "without_effect"]


class DetailBody(BaseModel):
    """Every error's body."""

    detail: str = Field(description="what was wrong, with the field if one was")
    code: str
    field: str | None


def detail_wrong(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route may answer when something is wrong, for the OpenAPI page."""
    return {status: {"model": DetailBody} for status in statuses}


def example(*values: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """Examples of what a route answers when all is well, for the OpenAPI page."""
    found = {str(number): {"value": value} for number, value in enumerate(values, 1)}
    return {200: {"content": {"application/json": {"examples": found}}}}


def body_of(model: type[BaseModel], *examples: dict[str, Any]) -> dict[str, Any]:
    """A JSON body with examples, for the OpenAPI page."""
    found = {str(number): {"value": value} for number, value in enumerate(examples, 1)}
    content = {"application/json": {"schema": model.model_json_schema(), "examples": found}}
    return {"requestBody": {"required": True, "content": content}}


@contextlib.contextmanager
def in_words(names: Mapping[str, str]) -> Iterator[None]:
    """An error that names one of our fields names the API's own instead."""
    try:
        yield
    except TriptychError as error:
        error.field = names.get(error.field or "", error.field)
        raise


def without_effect(name: str, why: str) -> str:
    """What a client is told of a field that was taken and does nothing."""
    return f"{name} has no effect: {why}"

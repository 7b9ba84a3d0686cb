"""OpenAI's API: which model is served."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter
from fastapi import Path as Name
from pydantic import BaseModel, Field

from triptych.errors import ModelNotFound
from triptych.model import Topology
from triptych.server.front import FrontOf, Who
from triptych.server.routes.openai_words import openai_wrong

__all__ = ["router"]

router = APIRouter(prefix="/v1/models", tags=["openai"])


class ModelObject(BaseModel):
    """A model."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="when its files were written, in seconds since the epoch")
    owned_by: str = "triptych"
    workflows: list[str] = Field(description="what it can be asked to do")

    model_config = {
        "json_schema_extra": {
            "examples": [
                {
                    "id": "emoji",
                    "object": "model",
                    "created": 1767225600,
                    "owned_by": "triptych",
                    "workflows": ["text2image"],
                }
            ]
        }
    }


class ModelList(BaseModel):
    """All models of a deployment, of which there is one."""

    object: Literal["list"] = "list"
    data: list[ModelObject]

    model_config = {
        "json_schema_extra": {
            "examples": [
                {
                    "object": "list",
                    "data": [
                        {
                            "id": "emoji",
                            "object": "model",
                            "created": 1767225600,
                            "owned_by": "triptych",
                            "workflows": ["text2image"],
                        }
                    ],
                }
            ]
        }
    }


def _model(topology: Topology) -> ModelObject:
    source = topology.source
    files = [Path(source.folder) / name for name in ("model_index.json", "modular_model_index.json")]
    written = [path.stat().st_mtime for path in files if path.is_file()]
    return ModelObject(id=source.name, created=int(max(written, default=0)), workflows=list(topology.workflows))


@router.get("", response_model=ModelList, responses=openai_wrong(401))
def models(front: FrontOf, caller: Who) -> ModelList:
    """The deployment's model."""
    return ModelList(data=[_model(front.door.topology)])


@router.get("/{model:path}", response_model=ModelObject, responses=openai_wrong(401, 404))
def model(model: Annotated[str, Name(description="its name")], front: FrontOf, caller: Who) -> ModelObject:
    """The deployment's model, by its name."""
    found = _model(front.door.topology)
    if model != found.id:
        raise ModelNotFound(f"given {model[:80]!r}; allowed: {found.id!r}", field="model")
    return found

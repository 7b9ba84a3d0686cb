"""Whether jobs can be run, and the state of the cluster that runs them."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from triptych.server.front import Admin, FrontOf
from triptych.server.views import Health, wrong

__all__ = ["router"]

router = APIRouter()


@router.get("/health", tags=["server"], response_model=Health, responses={503: {"model": Health}})
async def health(front: FrontOf) -> JSONResponse:
    """200 when every stage has a worker that is ready; 503 names those that have none."""
    missing = list(front.door.missing_stages())
    status = "draining" if front.draining else "unavailable" if missing else "ok"
    found = Health(status=status, missing=missing)
    return JSONResponse(found.model_dump(), 200 if status == "ok" else 503)


@router.get("/v1/cluster", tags=["server"], responses=wrong(401, 403))
def cluster(front: FrontOf, admin: Admin) -> Response:
    """Stages, workers and queues."""
    return Response(msgspec.json.encode(front.door.status()), media_type="application/json")

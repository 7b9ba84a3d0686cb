"""Whether jobs can be run, and the state of the cluster that runs them."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from triptych.server.front import Admin, FrontOf
from triptych.server.views import Health, wrong

__all__ = ["router"]

router = APIRouter()

_CLUSTER = {
    "coordinator": "b1f0c2",
    "uptime": 3600.2,
    "stages": [
        {
            "stage": "denoise", "waiting": 2, "running": 4, "workers": 1, "credits": 4, "done": 310, "per_minute": 22.0,
            "unit_seconds": 0.31, "task_seconds": 2.6,
        }
    ],
    "workers": [
        {
            "name": "denoise", "incarnation": "7c1e", "slot": "denoise", "host": "local", "pid": 4321, "device": "cpu",
            "stages": ["denoise"], "state": "busy", "tasks": 4, "done": 310, "failed": 0, "memory_bytes": 480000000,
            "free_bytes": 9000000000, "kept": 2, "kept_bytes": 65536, "weights": {"denoise": 7340032}, "last_seen": 0.4,
            "caches": [
                {"cache": "previews", "hits": 1239, "misses": 1, "stage": "denoise"},
                {"cache": "transfer", "hits": 308, "misses": 2},
            ],
        }
    ],
    "jobs": {"queued": 2, "running": 4, "done": 306, "failed": 1, "cancelled": 3},
    "totals": {
        "submitted": 316, "rejected": 0, "done": 306, "failed": 1, "cancelled": 3, "retries": 1, "resumes": 1,
        "remade": 0, "workers_lost": 1, "digest_failures": 0, "quarantined": 0,
    },
    "missing": [],
    "fetching": 0,
    "draining": False,
}  # fmt: skip


@router.get("/health", tags=["server"], response_model=Health, responses={503: {"model": Health}})
async def health(front: FrontOf) -> JSONResponse:
    """200 when every stage has a worker that is ready; 503 names those that have none."""
    missing = list(front.door.missing_stages())
    status = "draining" if front.draining else "unavailable" if missing else "ok"
    found = Health(status=status, missing=missing)
    return JSONResponse(found.model_dump(), 200 if status == "ok" else 503)


@router.get(
    "/v1/cluster",
    tags=["server"],
    responses={
        200: {"content": {"application/json": {"schema": {"type": "object"}, "example": _CLUSTER}}},
        **wrong(401, 403),
    },
)
def cluster(front: FrontOf, admin: Admin) -> Response:
    """Stages, workers and queues."""
    return Response(msgspec.json.encode(front.door.status()), media_type="application/json")

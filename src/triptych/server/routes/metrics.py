"""What Prometheus reads."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder

from triptych.server.front import Admin, FrontOf
from triptych.server.views import wrong

__all__ = ["router"]

router = APIRouter()

_EXAMPLE = """# HELP triptych_queue_length Jobs that wait for a stage.
# TYPE triptych_queue_length gauge
triptych_queue_length{stage="denoise"} 3.0
"""


@router.get(
    "/metrics",
    tags=["server"],
    response_class=Response,
    responses={
        200: {
            "content": {
                "text/plain": {"schema": {"type": "string"}, "example": _EXAMPLE},
                "application/openmetrics-text": {"schema": {"type": "string"}, "example": f"{_EXAMPLE}# EOF\n"},
            }
        },
        **wrong(401, 403),
    },
)
def metrics(front: FrontOf, admin: Admin, request: Request) -> Response:
    """Numbers of requests, jobs, stages, workers and transfers, in Prometheus' text format or, if asked for by
    `Accept`, OpenMetrics."""
    encode, kind = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(front.meters.registry), headers={"Content-Type": kind})

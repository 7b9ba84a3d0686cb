"""The application: every API's routes on one engine."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.types import ASGIApp

from triptych.config import ServeSection
from triptych.server.door import Door
from triptych.server.errors import add_handlers
from triptych.server.follow import Follower
from triptych.server.front import Front
from triptych.server.intake.darkroom import Darkroom
from triptych.server.intake.fetch import Fetcher
from triptych.server.locks.guard import Guard
from triptych.server.locks.keys import KeyRing
from triptych.server.locks.rates import Rates
from triptych.server.routes import (
    cachedit,
    health,
    jobs,
    lightx2v,
    metrics,
    openai_images,
    openai_models,
    openai_videos,
    uploads,
    vae,
)
from triptych.server.seeing.metrics import Meters
from triptych.server.seeing.visits import Visits

__all__ = ["create_app"]


class _App(FastAPI):
    """The application behind its guard, outside of what answers when all else fails."""

    def __init__(self, settings: ServeSection, version: str) -> None:
        super().__init__(title="Triptych", version=version, redoc_url=None)
        self._settings = settings

    def build_middleware_stack(self) -> ASGIApp:
        guarded = Guard(super().build_middleware_stack(), self._settings, self.docs_url)
        return Visits(guarded, self.state.front.meters.count)


_ROUTERS = (
    health.router, metrics.router, jobs.router, openai_images.router, openai_models.router, openai_videos.router,
    cachedit.router, lightx2v.router, uploads.router, vae.router,
)  # fmt: skip


def create_app(
    door: Door, settings: ServeSection, *, version: str, keys: KeyRing | None = None, refuses_missing: bool = True
) -> FastAPI:
    """The application on an engine; it neither opens nor closes that. `keys`: who may come in (None: everybody);
    `refuses_missing`: new jobs are refused while a stage has no worker, instead of waiting for one."""
    app = _App(settings, version)
    app.state.front = Front(
        door, settings, keys or KeyRing(), Rates(settings.rates), Follower(door.watch),
        Fetcher(settings.image_urls), Darkroom(), Meters(door), refuses_missing,
    )  # fmt: skip
    add_handlers(app)
    for router in _ROUTERS:
        app.include_router(router)
    return app

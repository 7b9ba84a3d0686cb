"""The application: every API's routes on one engine."""

from __future__ import annotations

from fastapi import FastAPI

from triptych.config import ServeSection
from triptych.server.door import Door
from triptych.server.errors import add_handlers
from triptych.server.follow import Follower
from triptych.server.front import Front
from triptych.server.locks.keys import KeyRing
from triptych.server.locks.rates import Rates
from triptych.server.routes import health, jobs

__all__ = ["create_app"]

_ROUTERS = (health.router, jobs.router)


def create_app(
    door: Door, settings: ServeSection, *, version: str, keys: KeyRing | None = None, refuses_missing: bool = True
) -> FastAPI:
    """The application on an engine; it neither opens nor closes that. `keys`: who may come in (None: everybody);
    `refuses_missing`: new jobs are refused while a stage has no worker, instead of waiting for one."""
    app = FastAPI(title="Triptych", version=version, redoc_url=None)
    app.state.front = Front(
        door, settings, keys or KeyRing(), Rates(settings.rates), Follower(door.watch), refuses_missing
    )
    add_handlers(app)
    for router in _ROUTERS:
        app.include_router(router)
    return app

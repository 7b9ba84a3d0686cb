"""What the routes of one application share, and who calls them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from triptych.config import ServeSection
from triptych.server.door import Door
from triptych.server.follow import Follower
from triptych.server.intake.fetch import Fetcher
from triptych.server.intake.pictures import Darkroom
from triptych.server.locks.keys import Caller, KeyRing
from triptych.server.locks.rates import Rates
from triptych.server.seeing.metrics import Meters
from triptych.server.seeing.visits import visit_of
from triptych.server.uploads import Uploads

__all__ = ["Admin", "Front", "FrontOf", "Who"]


@dataclass(eq=False)
class Front:
    """What the routes share."""

    door: Door
    settings: ServeSection
    keys: KeyRing
    rates: Rates
    follower: Follower
    fetcher: Fetcher
    darkroom: Darkroom
    meters: Meters
    refuses_missing: bool = True
    """new jobs are refused while a stage has no worker"""
    uploads: Uploads = field(default_factory=Uploads)
    draining: bool = False
    """about to stop: what runs ends well, and nothing new is taken"""


async def front_of(request: Request) -> Front:
    """What the routes of this application share."""
    return request.app.state.front


FrontOf = Annotated[Front, Depends(front_of)]

_BEARER = HTTPBearer(auto_error=False, description="an API key, where the deployment has any")


async def _caller(request: Request, front: FrontOf, _: Annotated[object, Depends(_BEARER)]) -> Caller:
    caller, visit = front.keys.caller(request.headers.get("authorization")), visit_of(request.scope)
    visit.client = caller.name
    return replace(caller, visit=visit)


Who = Annotated[Caller, Depends(_caller)]
"""Who calls; without a key that is known, where there are keys, the route is refused with 401."""


async def _admin(caller: Who) -> Caller:
    return caller.as_admin()


Admin = Annotated[Caller, Depends(_admin)]
"""An admin; others are refused with 403 once there are keys."""

"""What the routes of one application share, and who calls them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from triptych.config import ServeSection
from triptych.server.door import Door
from triptych.server.follow import Follower
from triptych.server.locks.keys import Caller, KeyRing
from triptych.server.locks.rates import Rates

__all__ = ["Admin", "Front", "FrontOf", "Who"]


@dataclass(eq=False)
class Front:
    """What the routes share."""

    door: Door
    settings: ServeSection
    keys: KeyRing
    rates: Rates
    follower: Follower
    refuses_missing: bool = True
    """new jobs are refused while a stage has no worker"""
    draining: bool = False
    """about to stop: what runs ends well, and nothing new is taken"""


def front_of(request: Request) -> Front:
    """What the routes of this application share."""
    return request.app.state.front


FrontOf = Annotated[Front, Depends(front_of)]

_BEARER = HTTPBearer(auto_error=False, description="an API key, where the deployment has any")


def _caller(request: Request, front: FrontOf, _: Annotated[object, Depends(_BEARER)]) -> Caller:
    return front.keys.caller(request.headers.get("authorization"))


Who = Annotated[Caller, Depends(_caller)]
"""Who calls; without a key that is known, where there are keys, the route is refused with 401."""


def _admin(caller: Who) -> Caller:
    return caller.as_admin()


Admin = Annotated[Caller, Depends(_admin)]
"""An admin; others are refused with 403 once there are keys."""

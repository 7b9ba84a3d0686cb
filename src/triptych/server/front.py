"""What the routes of one application share, and who calls them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, TypeVar

import anyio
import anyio.to_thread
from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from triptych.config import ServeSection
from triptych.server.door import Door
from triptych.server.follow import Follower
from triptych.server.intake.darkroom import Darkroom
from triptych.server.intake.fetch import Fetcher
from triptych.server.locks.keys import Caller, KeyRing
from triptych.server.locks.rates import Rates
from triptych.server.seeing.metrics import Meters
from triptych.server.seeing.visits import visit_of
from triptych.server.uploads import Uploads

__all__ = ["Admin", "Front", "FrontOf", "Who"]

T = TypeVar("T")
MAX_SLOW = 16
"""Threads for what may take long; the others stay free for what does not."""


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
    _slow: anyio.CapacityLimiter = field(default_factory=partial(anyio.CapacityLimiter, MAX_SLOW))
    _ending: set[asyncio.Future[bool]] = field(default_factory=set)

    async def slowly(self, function: Callable[..., T], *args: Any) -> T:
        """Calls what may wait for a disk, another machine or a worker, on a thread of the few that are for that."""
        return await anyio.to_thread.run_sync(partial(function, *args), limiter=self._slow)

    def cancel(self, job: str) -> None:
        """Ends a job soon, which nobody waits for: it writes to the disk, and a task that is cancelled may not wait."""
        self._soon(self.door.cancel, job)

    def forget(self, job: str) -> None:
        """Forgets a job soon, which nobody will ask for again."""
        self.follower.forget(job)
        self._soon(self.door.forget, job)

    def _soon(self, function: Callable[[str], bool], job: str) -> None:
        ending = asyncio.get_running_loop().run_in_executor(None, function, job)
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)


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

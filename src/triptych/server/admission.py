"""Every API's way to a job: whether it is taken, and waiting for its end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Container
from dataclasses import dataclass

from fastapi import Request as HttpRequest
from starlette.concurrency import run_in_threadpool

from triptych.errors import InvalidRequest, NoWorker
from triptych.request import Request
from triptych.server.door import JobView
from triptych.server.errors import ClientClosedRequest, Conflict, Draining, JobNotFound
from triptych.server.failures import UNDER_WAY, check_done
from triptych.server.front import Front
from triptych.server.locks.bounds import check_bounds
from triptych.server.locks.keys import Caller

__all__ = ["Wanted", "begin", "begin_by", "begin_or_replay", "finish", "made_before", "view_of", "while_connected"]


@dataclass(frozen=True)
class Wanted:
    """A job as a client asks for it. `deadline`: seconds after which nobody wants it any more. `key`: the client's own
    name for it (its Idempotency-Key) with the digest of what was asked; the same again gives the same job."""

    request: Request
    preview: bool = False
    priority: int = 0
    deadline: float | None = None
    exact: bool = False
    key: tuple[str, str] | None = None


async def begin(front: Front, caller: Caller, wanted: Wanted) -> str:
    """Takes a job and returns its id. Raises Draining, NoWorker, InvalidRequest, QueueFull, NotEnoughMemory, or what
    else is wrong with it; nothing has begun then."""
    return (await begin_or_replay(front, caller, wanted))[0]


async def begin_or_replay(front: Front, caller: Caller, wanted: Wanted) -> tuple[str, bool]:
    """The same, and whether it is a job that was taken before, by the same key for the same. Raises Conflict for the
    same key with something else."""
    return await run_in_threadpool(_begin_or_replay, front, caller, wanted)


def _begin_or_replay(front: Front, caller: Caller, wanted: Wanted) -> tuple[str, bool]:
    if wanted.key is None:
        return _begin(front, caller, wanted), False
    name, digest = wanted.key
    try:
        return _begin(front, caller, wanted, id=front.door.id_of(caller.name, name), digest=digest), False
    except InvalidRequest:
        if job := made_before(front, caller, wanted.key):  # the same came twice at once, and this one second
            return job, True
        raise


def made_before(front: Front, caller: Caller, key: tuple[str, str]) -> str | None:
    """The job that was taken before by the same key for the same, if there is one. Blocks; raises Conflict for the same
    key with something else."""
    name, digest = key
    job = front.door.id_of(caller.name, name)
    view = front.door.view(job)
    if view is not None and view.record.spec.digest != digest:
        raise Conflict("it was given before, with another body", field="idempotency-key")
    return None if view is None else job


def _begin(front: Front, caller: Caller, wanted: Wanted, **named: str) -> str:
    door = front.door

    def submit() -> str:
        return door.submit(
            wanted.request,
            preview=wanted.preview,
            client=caller.name,
            priority=wanted.priority,
            deadline=wanted.deadline,
            exact=wanted.exact,
            trace=caller.visit.trace,
            **named,
            check=functools.partial(check_bounds, front.settings.bounds, door.topology),
        ).id

    return begin_by(front, caller, submit)


def begin_by(front: Front, caller: Caller, submit: Callable[[], str], stages: Container[str] | None = None) -> str:
    """Takes a job that `submit` gives the id of, and that needs these stages (None: all). Blocks; raises like
    `begin`."""
    door = front.door
    if front.draining:
        raise Draining("the server is stopping and takes no more jobs")
    missing = [stage for stage in door.missing_stages() if stages is None or stage in stages]
    if missing and front.refuses_missing:
        raise NoWorker(f"no worker is ready for {', '.join(missing)}")
    with front.rates.taking(caller.name, lambda: door.under_way(caller.name)):
        job = caller.visit.job = submit()
    front.follower.begin(job, anew=True)
    return job


def view_of(front: Front, caller: Caller, job: str) -> JobView:
    """A job as it stands. Raises JobNotFound for one that is unknown, has expired, or is another's: which of these, a
    caller cannot tell."""
    view = front.door.view(job) if job.isascii() and job.isalnum() and len(job) <= 64 else None
    if view is None or view.record.spec.client != caller.name:
        raise JobNotFound("no such job, or it has expired", field="job")
    caller.visit.job = job
    return view


async def finish(front: Front, caller: Caller, job: str, http: HttpRequest, seconds: float | None = None) -> JobView:
    """Waits until a job is done, and returns it; after `seconds` as it is then, under way. A client that hangs up
    meanwhile cancels it. Raises what a job has failed with, like `check_done`."""
    async with while_connected(front, job, http):
        ended = await front.follower.ended(job, seconds)
    view = await run_in_threadpool(view_of, front, caller, job)
    if ended or view.record.state not in UNDER_WAY:
        check_done(view)
    return view


@contextlib.asynccontextmanager
async def while_connected(front: Front, job: str, http: HttpRequest, *, cancels: bool = True) -> AsyncIterator[None]:
    """Ends the block when the client hangs up, with ClientClosedRequest. That, or the block's failure, cancels the job
    if it `cancels`. The request's body must have been read."""
    waiting = asyncio.current_task()
    assert waiting is not None
    left = False

    async def watch() -> None:
        nonlocal left
        while (await http.receive())["type"] != "http.disconnect":
            pass
        left = True
        waiting.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    except BaseException:
        if cancels:
            front.cancel(job)
        if left:
            waiting.uncancel()
            raise ClientClosedRequest("the client hung up, and no longer waits for its job") from None
        raise
    finally:
        watching.cancel()

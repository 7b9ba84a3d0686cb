"""The client for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Any, TypeVar

import httpx2 as httpx

from triptych.client.shared import (
    ENDED,
    MAX_EVENT,
    PAGE,
    Ask,
    Flow,
    Follow,
    JobUpdate,
    KnownJob,
    RemoteResult,
    State,
    asked_whole,
    body_of,
    fetched,
    headers_of,
    health,
    path_of,
    submitted,
)
from triptych.errors import TriptychError

__all__ = ["AsyncClient", "AsyncRemoteJob"]

T = TypeVar("T")


class AsyncRemoteJob(KnownJob):
    """A job on a server. `info`: what the server last told of it."""

    def __init__(self, client: AsyncClient, info: dict[str, Any]) -> None:
        super().__init__(info)
        self._client = client

    async def refresh(self) -> AsyncRemoteJob:
        """Asks how it stands."""
        self.info = await self._client._run(asked_whole("GET", path_of(self.id), self._client.patience))
        return self

    async def events(self) -> AsyncGenerator[JobUpdate, None]:
        """How it gets on, from its first step to its end, over lost connections too. A job that fails or is cancelled
        is told as such, and raises nothing here."""
        follow, http = Follow(self.id, self._client.patience), self._client._http
        while follow.job is None:
            try:
                async with http.stream(**follow.arguments()) as response:
                    if not response.is_success:
                        await response.aread()
                        wait = follow.refused(response)
                    else:
                        follow.opened()
                        async for event in httpx.EventSource(response, MAX_EVENT):
                            if (update := follow.hear(event)) is not None:
                                self.info = follow.job or self.info
                                yield update
                        wait = 0.0 if follow.job else follow.broke(None)
            except httpx.TransportError as error:
                wait = 0.0 if follow.job else follow.broke(error)
            await asyncio.sleep(wait)

    async def result(self) -> RemoteResult:
        """Waits for its end and fetches what it made. Raises what it failed with, or Cancelled."""
        if self.state not in ENDED:
            async for _ in self.events():
                pass
        return await self._client._run(fetched(self.info, self._client.patience))

    async def cancel(self) -> AsyncRemoteJob:
        """Ends it before its next step; one that has ended is left alone."""
        self.info = await self._client._run(asked_whole("DELETE", path_of(self.id), self._client.patience))
        return self


class AsyncClient:
    """A Triptych server at `url`; use as a context manager. `api_key`: where the server wants one; `timeout`: seconds
    that one exchange may take; `patience`: seconds during which what may pass (a lost connection, a full queue) is
    tried again. What is wrong comes as the exceptions that the engine raises, and Unreachable."""

    def __init__(
        self, url: str = "http://127.0.0.1:8000", *, api_key: str | None = None, timeout: float = 60.0,
        patience: float = 60.0, transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:  # fmt: skip
        self.patience = patience
        self._http = httpx.AsyncClient(base_url=url, headers=headers_of(api_key), timeout=timeout, transport=transport)

    async def submit(
        self, prompt: str | Sequence[str], *, idempotency_key: str | None = None, **fields: Any
    ) -> AsyncRemoteJob:
        """Starts a job. `fields` are those of `Request`, and preview, priority, deadline and exact; pictures may be
        given as such, as bytes, paths or URLs. `idempotency_key`: the same again, with the same fields, is the same
        job."""
        body = await asyncio.to_thread(body_of, prompt, fields)
        return AsyncRemoteJob(self, await self._run(submitted(body, idempotency_key, self.patience)))

    async def generate(self, prompt: str | Sequence[str], **fields: Any) -> RemoteResult:
        """Runs a job to its end and fetches what it made. Raises what it fails with; whatever ends the waiting cancels
        the job."""
        job = await self.submit(prompt, **fields)
        try:
            return await job.result()
        except BaseException:
            if job.state not in ENDED:
                with contextlib.suppress(TriptychError):
                    await self._run(asked_whole("DELETE", path_of(job.id), 0.0))
            raise

    async def job(self, id: str) -> AsyncRemoteJob:
        """A job that was submitted before."""
        return AsyncRemoteJob(self, await self._run(asked_whole("GET", path_of(id), self.patience)))

    async def jobs(self, state: State | Sequence[State] | None = None) -> AsyncGenerator[AsyncRemoteJob, None]:
        """One's own jobs, newest first."""
        before = None
        while True:
            page = await self._run(
                asked_whole("GET", "/v1/jobs", self.patience, limit=PAGE, before=before, state=state)
            )
            for info in page["data"]:
                yield AsyncRemoteJob(self, info)
            if not page["has_more"]:
                return
            before = page["data"][-1]["id"]

    async def cancel(self, id: str) -> AsyncRemoteJob:
        """Ends a job before its next step."""
        return AsyncRemoteJob(self, await self._run(asked_whole("DELETE", path_of(id), self.patience)))

    async def health(self) -> dict[str, Any]:
        """Whether jobs can be run: `status` is ok, draining or unavailable, `missing` names the stages without a
        worker."""
        return await self._run(health())

    async def close(self) -> None:
        """Lets go of the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, flow: Flow[T]) -> T:
        try:
            asked = next(flow)
            while True:
                if not isinstance(asked, Ask):
                    await asyncio.sleep(asked)
                    asked = flow.send(None)
                    continue
                try:
                    response = await self._http.request(**asked.arguments())
                except httpx.TransportError as error:
                    asked = flow.throw(error)
                else:
                    asked = flow.send(response)
        except StopIteration as end:
            return end.value

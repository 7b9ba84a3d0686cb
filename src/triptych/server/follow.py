"""Jobs as the server's clients follow them: what has happened so far, and what happens next."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from starlette.concurrency import run_in_threadpool

from triptych.errors import InvalidRequest
from triptych.messages import Picture, Stepped
from triptych.server.errors import JobNotFound

if TYPE_CHECKING:
    from triptych.cluster import Outcome

__all__ = ["Follower", "Happening", "Watch"]

MAX_HAPPENINGS = 1024
"""Of one job; older ones are forgotten."""
MAX_ENDED = 512
"""Ended jobs whose happenings are still told to those who come back."""

Watch = Callable[[str, Callable[["Stepped | Outcome"], None]], Callable[[], None]]
"""How an engine lets itself be watched: a job, and who is told; returns what ends that."""


@dataclass(frozen=True)
class Happening:
    """Something that happened to a job: a unit of a stage was done, or (`stage` None) the job has ended. `number`
    counts up from 1 within the job. Of all previews only the newest is kept."""

    number: int
    stage: str | None
    step: int = 0
    steps: int = 0
    seconds: float = 0.0
    preview: Picture | None = None


class _Track:
    """One job's happenings. Written by the engine's threads, read by the loop's tasks."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kept: deque[Happening] = deque(maxlen=MAX_HAPPENINGS)
        self.count = 0
        self.ended = False
        self.bells: set[_Bell] = set()
        self.unwatch: Callable[[], None] = lambda: None

    def hear(self, event: Stepped | Outcome) -> None:
        with self.lock:
            self.count += 1
            if isinstance(event, Stepped):
                found = Happening(self.count, event.stage, event.step, event.steps, event.seconds, event.preview)
                if event.preview is not None:
                    self.forget_previews()
            else:
                found, self.ended = Happening(self.count, None), True
                if not self.bells:  # whoever listens may not have seen the last one yet
                    self.forget_previews()
            self.kept.append(found)
        self.ring()

    def ring(self) -> None:
        with self.lock:
            bells = [bell for bell in self.bells if self.ended or bell.every]
        for bell in bells:
            bell.ring()

    def forget_previews(self) -> None:
        """Lets go of the newest one, which is the only one that is kept."""
        for index in range(len(self.kept) - 1, -1, -1):
            if self.kept[index].preview is not None:
                self.kept[index] = replace(self.kept[index], preview=None)
                return

    def since(self, number: int) -> list[Happening]:
        with self.lock:
            return [one for one in self.kept if one.number > number]


class _Bell:
    """Wakes a task of the loop that made it: at every happening, or at the job's end alone, since each waking costs the
    loop something."""

    def __init__(self, every: bool) -> None:
        self.every = every
        self.heard = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def ring(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self.heard.set)


class Follower:
    """Remembers what happens to jobs from `begin` on, within bounds, for as many listeners as there are."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._tracks: OrderedDict[str, _Track] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self, job: str, anew: bool = False) -> None:
        """Follows a job from now on; one that is followed already is left alone, but `anew` what is known of an ended
        one is forgotten: it was of a former job of that id. May wait for the engine. Raises
        JobNotFound for a job that the engine does not know."""
        with self._lock:
            known = self._tracks.get(job)
            if known is not None and not (anew and known.ended):
                return
            track = self._tracks[job] = _Track()
        try:
            track.unwatch = self._watch(job, track.hear)
        except BaseException as error:
            self.forget(job)
            if isinstance(error, InvalidRequest):
                raise JobNotFound("no such job, or it has expired", field="job") from None
            raise
        self._trim()

    def count(self, job: str) -> int:
        """How much has happened to a job so far, as far as it was followed. Raises like `begin`."""
        self.begin(job)
        track = self._tracks.get(job)
        return 0 if track is None else track.count

    def forget(self, job: str) -> None:
        """Follows a job no longer; whoever listens hears its end."""
        with self._lock:
            track = self._tracks.pop(job, None)
        if track is not None:
            track.unwatch()
            track.ended = True
            track.ring()

    async def _track(self, job: str) -> _Track | None:
        if job not in self._tracks:
            await run_in_threadpool(self.begin, job)
        return self._tracks.get(job)

    def _trim(self) -> None:
        with self._lock:
            ended = [job for job, track in self._tracks.items() if track.ended and not track.bells]
            for job in ended[: max(0, len(ended) - MAX_ENDED)]:
                del self._tracks[job]

    async def happenings(
        self, job: str, after: int = 0, seconds: float | None = None
    ) -> AsyncGenerator[Happening | None]:
        """What has happened since happening `after` and what happens then, until the job's end; None whenever nothing
        happened for `seconds`. Raises like `begin`."""
        track = await self._track(job)
        if track is None:
            return
        with _listening(track, every=True) as bell:
            while True:
                bell.clear()
                ended = track.ended
                for one in track.since(after):
                    after = one.number
                    yield one
                    if one.stage is None:
                        return
                if ended:
                    return
                try:
                    await asyncio.wait_for(bell.wait(), seconds)
                except TimeoutError:
                    yield None

    async def ended(self, job: str, seconds: float | None = None) -> bool:
        """Waits until a job has ended, at most so long; whether it has. Raises like `begin`."""
        track = await self._track(job)
        if track is None:
            return True
        with _listening(track, every=False) as bell:
            if not track.ended:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(bell.wait(), seconds)
            return track.ended


@contextlib.contextmanager
def _listening(track: _Track, every: bool) -> Iterator[asyncio.Event]:
    bell = _Bell(every)
    with track.lock:
        track.bells.add(bell)
    try:
        yield bell.heard
    finally:
        with track.lock:
            track.bells.discard(bell)
            if track.ended and not track.bells:
                track.forget_previews()

"""What a worker says, in order, with what has to be published first published on a thread of its own."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from triptych.messages import Descriptor, FromWorker
from triptych.transfer import Exchange, Payload

logger = logging.getLogger(__name__)

MAX_WAITING = 64
"""Messages that wait for their payloads; at more the next unit waits, too."""


@dataclass(eq=False)
class _Item:
    job: str
    make: Callable[[], FromWorker | None]
    finish: Callable[[], None] | None = None
    dropped: bool = False


class Outbox:
    """Sends at once while nothing is being made, else in turn behind it. One thread gives it messages; `keep` and
    `release` may be called from any."""

    def __init__(self, send: Callable[[FromWorker], None], exchange: Exchange, *, inline: bool) -> None:
        """`inline`: publishing costs nothing, so do it on the caller's thread."""
        self._send = send
        self._exchange = exchange
        self._inline = inline
        self._lock = threading.Lock()
        self._waiting: list[_Item] = []
        self._queue: queue.Queue[_Item | None] = queue.Queue(MAX_WAITING)
        self._kept: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="triptych-outbox", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether everything it was given has been sent."""
        return not self._waiting

    @property
    def kept(self) -> int:
        """Payloads published and not yet released."""
        return len(self._kept)

    def send(self, job: str, message: FromWorker) -> None:
        """Sends a message of a job, behind what is under way."""
        self._take(_Item(job, lambda: message), here=True)

    def make(
        self,
        job: str,
        make: Callable[[], FromWorker | None],
        *,
        finish: Callable[[], None] | None = None,
        light: bool = True,
        idle: bool = False,
    ) -> None:
        """Sends what `make` gives (None: nothing), which may publish with `keep`. `finish` is called afterwards, and
        also if it was dropped before. Not `light`: it is work, never for the caller's thread; `idle`: the caller has
        nothing else to do, and a change of threads would only cost time."""
        self._take(_Item(job, make, finish), here=light and (self._inline or idle))

    def keep(self, payload: Payload) -> Descriptor:
        """Publishes a payload, to be kept until it is released. Raises WrongPayload or NotEnoughMemory."""
        descriptor = self._exchange.publish(payload)
        with self._lock:
            self._kept.add(descriptor.payload)
        return descriptor

    def release(self, payload: str) -> None:
        """Nobody needs that payload any more."""
        with self._lock:
            self._kept.discard(payload)
        self._exchange.release(payload)

    def release_all(self, payloads: frozenset[str] | None = None) -> None:
        """Lets go of all that is kept, or of those of `payloads` that still are."""
        for payload in self.names() if payloads is None else payloads & self.names():
            self.release(payload)

    def names(self) -> frozenset[str]:
        """What is kept."""
        with self._lock:
            return frozenset(self._kept)

    def drop(self, job: str | None = None) -> None:
        """Says nothing more of a job (None: of any) that has not been said yet."""
        with self._lock:
            for item in self._waiting:
                item.dropped = item.dropped or job is None or item.job == job

    def close(self, timeout: float = 5.0) -> None:
        """Ends its thread, after what waits has gone out or `timeout` seconds."""
        try:
            self._queue.put(None, timeout=timeout)
        except queue.Full:
            self.drop()
            return
        self._thread.join(timeout)

    def _take(self, item: _Item, here: bool) -> None:
        if here and not self._waiting:  # only the calling thread adds to it
            self._deliver(item)
            return
        with self._lock:
            self._waiting.append(item)
        self._queue.put(item)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._deliver(item)
            except Exception:  # of a send: a worker that cannot speak is noticed by its silence
                logger.exception("a message of job %s could not be sent", item.job)
            with self._lock:
                self._waiting.remove(item)

    def _deliver(self, item: _Item) -> None:
        try:
            before = self.names()
            message = None if item.dropped else item.make()
            if item.dropped:  # perhaps meanwhile: what it published is for nobody
                self.release_all(self.names() - before)
            elif message is not None:
                self._send(message)
        finally:
            if item.finish is not None:
                item.finish()

"""A worker's end of the line to its coordinator, and the one for a coordinator in the same process."""

from __future__ import annotations

import queue
import secrets
import threading
from collections.abc import Callable
from typing import Protocol

import msgspec

from triptych.messages import FromWorker, Goodbye, Hello, Refused, ToWorker

ENDED_SECONDS = 5.0


class Uplink(Protocol):
    """How a worker and its coordinator talk. `send` and `receive` may be called from different threads."""

    def send(self, message: FromWorker) -> None:
        """Says something; in order, and again after a lost connection came back. Does not wait for an answer."""
        ...

    def receive(self, timeout: float | None) -> ToWorker | None:
        """The next message, or None if none came within `timeout` seconds (None: waits)."""
        ...

    def hand_to(self, hear: Callable[[ToWorker], None] | None) -> None:
        """From now on `hear` gets every message, those first that came already and were not received, one at a time on
        whatever thread brings them; it must not wait for anything. None: nobody gets any more."""
        ...

    def close(self) -> None:
        """Hangs up. What was sent before still goes out, if that takes no longer than a moment."""
        ...


class LocalCoordinator(Protocol):
    """As much of a coordinator as a worker in its process needs."""

    def hello(self, hello: Hello, link: LocalLink) -> None:
        """A worker offers itself; answered over `link`."""
        ...

    def hear(self, incarnation: str, message: FromWorker) -> None:
        """A worker says something."""
        ...

    def left(self, incarnation: str, reason: str) -> None:
        """A worker is gone."""
        ...


class LocalLink:
    """The coordinator's end: what it sends is in the worker's queue at once."""

    def __init__(self, inbox: queue.SimpleQueue[ToWorker | None]) -> None:
        self._inbox = inbox

    def send(self, message: ToWorker) -> None:
        """Puts the message into the worker's queue."""
        self._inbox.put(message)

    def close(self) -> None:
        """Nothing to hang up."""


class InProcessUplink:
    """To a coordinator in the same process: what the worker says is heard on the thread that says it."""

    def __init__(self, coordinator: LocalCoordinator, hello: Hello) -> None:
        self._coordinator = coordinator
        self._hello = hello
        self._inbox: queue.SimpleQueue[ToWorker | None] = queue.SimpleQueue()
        """None ends its thread"""
        self._thread: threading.Thread | None = None
        self._gone = False
        coordinator.hello(hello, LocalLink(self._inbox))

    def send(self, message: FromWorker) -> None:
        """Tells the coordinator."""
        self._gone = self._gone or isinstance(message, Goodbye)
        self._coordinator.hear(self._hello.incarnation, message)

    def receive(self, timeout: float | None) -> ToWorker | None:
        """The next message, or None if none came within `timeout` seconds."""
        try:
            message = self._inbox.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(message, Refused) and message.again:
            self._hello = msgspec.structs.replace(self._hello, incarnation=secrets.token_hex(16))
            self._coordinator.hello(self._hello, LocalLink(self._inbox))
        return message

    def hand_to(self, hear: Callable[[ToWorker], None] | None) -> None:
        """On a thread of its own: the coordinator speaks while it holds its lock."""
        if self._thread is not None:
            self._inbox.put(None)
            self._thread.join(ENDED_SECONDS)
            self._thread = None
        if hear is not None:
            self._thread = threading.Thread(target=self._run, args=(hear,), name="triptych-listener", daemon=True)
            self._thread.start()

    def _run(self, hear: Callable[[ToWorker], None]) -> None:
        while (message := self.receive(None)) is not None:
            hear(message)

    def close(self) -> None:
        """Tells the coordinator that the worker is gone, unless it said so itself."""
        if not self._gone:
            self._gone = True
            self._coordinator.left(self._hello.incarnation, "its thread has ended")

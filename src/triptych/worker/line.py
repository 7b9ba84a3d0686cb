"""A worker's end of the line to its coordinator, and the one for a coordinator in the same process."""

from __future__ import annotations

import queue
import secrets
from typing import Protocol

import msgspec

from triptych.messages import FromWorker, Goodbye, Hello, Refused, ToWorker


class Uplink(Protocol):
    """How a worker and its coordinator talk. `send` and `receive` may be called from different threads."""

    def send(self, message: FromWorker, *, more: bool = False) -> None:
        """Says something; in order, and again after a lost connection came back. Does not wait for an answer. `more`:
        another one follows at once, and this one may wait for it."""
        ...

    def receive(self, timeout: float | None) -> ToWorker | None:
        """The next message, or None if none came within `timeout` seconds (None: waits)."""
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

    def __init__(self, inbox: queue.SimpleQueue[ToWorker]) -> None:
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
        self._inbox: queue.SimpleQueue[ToWorker] = queue.SimpleQueue()
        self._gone = False
        coordinator.hello(hello, LocalLink(self._inbox))

    def send(self, message: FromWorker, *, more: bool = False) -> None:
        """Tells the coordinator, whatever follows."""
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

    def close(self) -> None:
        """Tells the coordinator that the worker is gone, unless it said so itself."""
        if not self._gone:
            self._gone = True
            self._coordinator.left(self._hello.incarnation, "its thread has ended")

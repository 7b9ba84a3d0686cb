"""Sockets that one thread waits at and any thread may send by: each change of threads costs more than a send."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import zmq

__all__ = ["SharedSockets", "Source", "ZmqSource"]


class Source(Protocol):
    """Something that messages come from."""

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What to wait at until something has come; the same as long as it lives."""
        ...

    @property
    def has_more(self) -> bool:
        """Whether something has come of which the descriptors will not tell any more."""
        ...


class ZmqSource:
    """ZeroMQ sockets. Their descriptors tell of something only until they are used."""

    def __init__(self, *sockets: zmq.Socket[bytes]) -> None:
        self._sockets = sockets

    @property
    def descriptors(self) -> tuple[int, ...]:
        """One for each."""
        return tuple(int(one.FD) for one in self._sockets)

    @property
    def has_more(self) -> bool:
        """Asked of ZeroMQ."""
        return any(int(one.EVENTS) & zmq.POLLIN for one in self._sockets if not one.closed)


class SharedSockets:
    """Whoever has the turn uses the sockets, which are not thread-safe. The thread that waits takes the turn between
    two waits; others take it only if it is free, and ring otherwise."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._holder = 0
        self._sources: tuple[Source, ...] = ()
        self._poll = select.poll()
        self._more = False
        self._bell, self._button = socket.socketpair()
        for end in (self._bell, self._button):
            end.setblocking(False)

    def watch(self, sources: Iterable[Source]) -> None:
        """These are the sockets, in place of the former. Needs the turn, or that nobody waits yet."""
        self._sources = tuple(sources)
        self._poll = select.poll()
        for descriptor in [self._bell.fileno(), *(one for source in self._sources for one in source.descriptors)]:
            self._poll.register(descriptor, select.POLLIN)
        self._more = True

    def wait(self, seconds: float) -> None:
        """Until something may have come, somebody rings or that time is over. For one thread."""
        ready = self._poll.poll(0 if self._more else int(max(0.0, seconds) * 1000) + 1)
        if any(descriptor == self._bell.fileno() for descriptor, _ in ready):
            with contextlib.suppress(OSError):
                while len(self._bell.recv(4096)) == 4096:
                    pass

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """For the thread that waits."""
        with self._turn:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = 0
                self._more = self._have_more()

    def attempt(self, use: Callable[[], None]) -> None:
        """Calls `use` at once if nobody else has the turn; otherwise wakes the thread that waits, which is to do it
        then."""
        if self._holder == threading.get_ident():
            use()
        elif self._turn.acquire(blocking=False):
            try:
                use()
                more = self._have_more()
            finally:
                self._turn.release()
            if more:
                self.ring()
        else:
            self.ring()

    def ring(self) -> None:
        """Wakes the thread that waits."""
        with contextlib.suppress(OSError):  # full: it will wake anyway; closed: nobody is left to wake
            self._button.send(b"\0")

    def close(self) -> None:
        """No more of it; the sockets are their owner's to close."""
        self._sources = ()
        self._bell.close()
        self._button.close()

    def _have_more(self) -> bool:
        return any(source.has_more for source in self._sources)

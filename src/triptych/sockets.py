"""ZeroMQ sockets that one thread waits at and any thread may send by: each change of threads costs more than a send."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable, Iterator

import zmq

__all__ = ["SharedSockets"]


class SharedSockets:
    """Whoever has the turn uses the sockets, which are not thread-safe. The thread that waits takes the turn between
    two waits; others take it only if it is free, and ring otherwise.

    Its descriptors tell of a socket only until the socket is used, so each use ends with a look at what has come.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._holder = 0
        self._sockets: tuple[zmq.Socket[bytes], ...] = ()
        self._poller = zmq.Poller()
        self._more = False
        self._bell, self._button = socket.socketpair()
        for end in (self._bell, self._button):
            end.setblocking(False)

    def watch(self, sockets: Iterable[zmq.Socket[bytes]]) -> None:
        """These are the sockets, in place of the former. Needs the turn, or that nobody waits yet."""
        self._sockets = tuple(sockets)
        self._poller = zmq.Poller()
        for descriptor in [self._bell.fileno(), *(int(one.FD) for one in self._sockets)]:
            self._poller.register(descriptor, zmq.POLLIN)
        self._more = True

    def wait(self, seconds: float) -> None:
        """Until something may have come, somebody rings or that time is over. For one thread."""
        if not self._more:
            self._poller.poll(int(max(0.0, seconds) * 1000) + 1)
        with contextlib.suppress(OSError):
            while self._bell.recv(4096):
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
        """Calls `use` at once if nobody has the turn, else wakes the thread that waits, which is to do it then. Within
        that thread's own turn it does nothing."""
        if self._turn.acquire(blocking=False):
            try:
                use()
                more = self._have_more()
            finally:
                self._turn.release()
            if more:
                self.ring()
        elif self._holder != threading.get_ident():
            self.ring()

    def ring(self) -> None:
        """Wakes the thread that waits."""
        with contextlib.suppress(OSError):  # full: it will wake anyway; closed: nobody is left to wake
            self._button.send(b"\0")

    def close(self) -> None:
        """No more of it; the sockets are their owner's to close."""
        self._sockets = ()
        self._bell.close()
        self._button.close()

    def _have_more(self) -> bool:
        return any(int(one.EVENTS) & zmq.POLLIN for one in self._sockets if not one.closed)

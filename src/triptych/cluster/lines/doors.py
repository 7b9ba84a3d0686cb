"""What a listener listens at: Unix sockets in a folder of ours, TCP ports with keys."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple, Protocol

import zmq

from triptych.line import MAX_FRAME, MAX_QUEUED, BadFrame
from triptych.sockets import Source, ZmqSource
from triptych.stream import GREETING, Stream, await_room

__all__ = ["Came", "Door", "UnixDoor", "ZmqDoor", "router"]

MAX_CONNECTIONS = 4096 + 64
MAX_IDENTITY = 255
MAX_FRAMES = 256
"""that are taken of ZeroMQ in one turn"""
LINGER_SECONDS = 0.5
PAUSE_SECONDS = 1.0
"""without new connections, once one could not be taken"""
NAMELESS_SECONDS = 5.0
"""that a connection may take to say who it is"""

_log = logging.getLogger(__name__)


class Came(NamedTuple):
    """A frame, who sent it, and the public key they came with: empty at a Unix socket."""

    identity: bytes
    user: str
    frame: bytes


class Door(Source, Protocol):
    """A place where workers join. For whoever has the turn."""

    @property
    def endpoint(self) -> str:
        """Where it really is, its port chosen if none was given."""
        ...

    def take(self) -> Iterator[Came]:
        """What has come."""
        ...

    def put(self, identity: bytes, frame: bytes) -> None:
        """Sends a frame; one that cannot be sent now may be lost."""
        ...

    def close(self) -> None:
        """Closes it; what was sent is given half a second to leave."""
        ...

    def release(self) -> None:
        """Leaves the place to others; only after ZeroMQ's context has ended."""
        ...


class ZmqDoor(ZmqSource):
    """A bound ROUTER socket, guarded by CURVE."""

    def __init__(self, socket: zmq.Socket[bytes], endpoint: str) -> None:
        super().__init__(socket)
        self.endpoint = endpoint
        self._socket = socket

    def take(self) -> Iterator[Came]:
        """See `Door`."""
        for _ in range(MAX_FRAMES):
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            if len(parts) == 2:
                yield Came(parts[0].bytes, str(parts[1].get("User-Id")), parts[1].bytes)

    def put(self, identity: bytes, frame: bytes) -> None:
        """See `Door`."""
        with contextlib.suppress(zmq.ZMQError):  # not connected now, or its buffers are full
            self._socket.send_multipart([identity, frame], zmq.NOBLOCK)

    def close(self) -> None:
        """See `Door`."""
        self._socket.close(linger=int(LINGER_SECONDS * 1000))

    def release(self) -> None:
        """Nothing to leave: the port is free."""


def router(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    """A socket for a `ZmqDoor`, to be given its keys and bound."""
    made = context.socket(zmq.ROUTER)
    made.set(zmq.ROUTER_MANDATORY, 1)
    made.set(zmq.ROUTER_HANDOVER, 1)  # a worker that reconnects takes its place from its dead connection
    made.set(zmq.SNDHWM, 2 * MAX_QUEUED)  # the lines' own bounds come first
    made.set(zmq.MAXMSGSIZE, MAX_FRAME)
    made.set(zmq.HEARTBEAT_IVL, 1000)
    made.set(zmq.HEARTBEAT_TIMEOUT, 5000)
    made.set(zmq.HANDSHAKE_IVL, 5000)
    return made


class _Peer:
    """A connection; who it is says its first frame."""

    def __init__(self, connection: socket.socket) -> None:
        self.stream = Stream(connection)
        self.identity = b""
        self.since = time.monotonic()
        self.gone = False


class UnixDoor:
    """A listening Unix socket, in a folder that lets nobody else in. `lock` is held: the place is ours. Raises
    OSError."""

    def __init__(self, path: Path, lock: IO[bytes]) -> None:
        self.endpoint = f"ipc://{path}"
        self._path, self._lock = path, lock
        self._peers: set[_Peer] = set()
        self._known: dict[bytes, _Peer] = {}
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            if path.is_socket():  # a dead listener's: what else lies there is not ours to remove
                path.unlink()
            self._socket.bind(str(path))
            path.chmod(0o600)
            self._socket.listen(128)
            self._socket.setblocking(False)
        except OSError:
            self._socket.close()
            raise
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._deaf_until = 0.0
        self.descriptors = (self._selector.fileno(),)  # of an epoll or a kqueue, which can be waited at itself

    @property
    def has_more(self) -> bool:
        """Never: its descriptor tells of what has come until it was taken."""
        return False

    def take(self) -> Iterator[Came]:
        """See `Door`."""
        if self._deaf_until and time.monotonic() > self._deaf_until:
            self._deaf_until = 0.0
            self._selector.register(self._socket, selectors.EVENT_READ)
        for key, events in self._selector.select(0):
            if key.data is None:
                self._accept()
                continue
            peer: _Peer = key.data
            for frame in () if peer.gone else self._served(peer, events):
                if peer.identity:
                    yield Came(peer.identity, "", frame)
                else:
                    self._name(peer, frame)
                if peer.gone:
                    break

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except BlockingIOError:
            return
        except OSError as error:  # short of descriptors, for example
            _log.warning("a worker's connection could not be taken: %s", error)
            self._deaf_until = time.monotonic() + PAUSE_SECONDS
            self._selector.unregister(self._socket)
            return
        late = time.monotonic() - NAMELESS_SECONDS
        for peer in [one for one in self._peers if not one.identity and one.since < late]:
            self._drop(peer)
        if len(self._peers) >= MAX_CONNECTIONS:
            connection.close()
            return
        peer = _Peer(connection)
        self._peers.add(peer)
        self._selector.register(connection, selectors.EVENT_READ, peer)
        self._send(peer, GREETING)

    def _served(self, peer: _Peer, events: int) -> list[bytes]:
        """What has come from it, though it may not take any more; its end is seen here only."""
        frames: list[bytes] = []
        try:
            frames = peer.stream.receive()
        except OSError:
            self._drop(peer)
        except BadFrame as error:
            _log.warning("hung up on %.64s: %s", peer.identity.decode(errors="replace"), error)
            self._drop(peer)
        if events & selectors.EVENT_WRITE and not peer.gone:
            self._push(peer, peer.stream.push)
        return frames

    def _name(self, peer: _Peer, identity: bytes) -> None:
        """A worker that comes back takes its place from its dead connection."""
        if not 0 < len(identity) <= MAX_IDENTITY:
            self._drop(peer)
            return
        before = self._known.get(identity)
        if before is not None:
            self._drop(before)
        peer.identity, self._known[identity] = identity, peer

    def put(self, identity: bytes, frame: bytes) -> None:
        """See `Door`."""
        peer = self._known.get(identity)
        if peer is not None:
            self._send(peer, frame)

    def _send(self, peer: _Peer, frame: bytes) -> None:
        self._push(peer, lambda: peer.stream.send(frame))

    def _push(self, peer: _Peer, send: Callable[[], None]) -> None:
        with contextlib.suppress(OSError):  # what it said before it left is still to be read
            send()
            await_room(self._selector, peer.stream, peer)

    def _drop(self, peer: _Peer, linger: float = 0.0) -> None:
        peer.gone = True
        self._peers.discard(peer)
        if self._known.get(peer.identity) is peer:
            del self._known[peer.identity]
        self._selector.unregister(peer.stream.connection)
        peer.stream.close(linger)

    def close(self) -> None:
        """See `Door`."""
        until = time.monotonic() + LINGER_SECONDS
        for peer in list(self._peers):
            self._drop(peer, max(0.0, until - time.monotonic()))
        self._selector.close()
        self._socket.close()

    def release(self) -> None:
        """See `Door`."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        self._lock.close()

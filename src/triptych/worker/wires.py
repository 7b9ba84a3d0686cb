"""What a worker's line runs over: a Unix socket to a coordinator on the same host, ZeroMQ with CURVE to any other."""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import selectors
import socket
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import zmq
from zmq.utils.monitor import recv_monitor_message

from triptych.line import MAX_FRAME, MAX_QUEUED, BadFrame
from triptych.sockets import Source, ZmqSource
from triptych.stream import GREETING, MAX_PATH, Stream, await_room

__all__ = ["CurveKeys", "Event", "UnixWire", "Wire", "ZmqWire", "open_wire"]

HANDSHAKE_SECONDS = 5.0
FAILED_HANDSHAKES = 3
MAX_FRAMES = 64
"""that are taken of ZeroMQ in one turn"""
HUNG_UP = (errno.EPIPE, errno.ECONNRESET)  # a coordinator that is only slow or stopped gives another error
NO_GREETING = (zmq.EVENT_DISCONNECTED, zmq.EVENT_CONNECTED)  # the one right after the other


class Event(enum.Enum):
    """What happened to a wire."""

    BACK = "it is connected; what was sent before may be lost"
    STRANGER = "what answers is no coordinator; the wire is of no use any more"
    HUNG_UP = "whatever is there has hung up again and again before it said who it is"
    NO_KEY = "the coordinator does not have our key on its list"


class CurveKeys(Protocol):
    """A client's pair and its server's public key, in Z85."""

    @property
    def public(self) -> str: ...
    @property
    def secret(self) -> str: ...
    @property
    def server(self) -> str: ...


class Wire(Source, Protocol):
    """A connection that comes back by itself. For whoever has the turn."""

    @property
    def impatient(self) -> bool:
        """It wants to be looked at soon, though nothing may come."""
        ...

    def take(self) -> Iterator[bytes | Event]:
        """What has come and what has happened."""
        ...

    def put(self, *frames: bytes) -> None:
        """Sends frames; what cannot be sent now may be lost."""
        ...

    def close(self, linger: float = 0.0) -> None:
        """Hangs up; what was sent is given `linger` seconds to leave."""
        ...


def open_wire(context: zmq.Context[zmq.Socket[bytes]], endpoint: str, identity: bytes, keys: CurveKeys | None) -> Wire:
    """To `ipc://PATH`, or where ZeroMQ can connect to. Raises ValueError for what is neither, and for bad keys."""
    scheme, _, rest = endpoint.partition("://")
    if scheme == "ipc":
        return UnixWire(rest, identity)
    return ZmqWire(context, endpoint, identity, keys)


class UnixWire:
    """To a listener's Unix socket."""

    def __init__(self, path: str, identity: bytes) -> None:
        if not 0 < len(os.fsencode(path)) <= MAX_PATH:
            raise ValueError(f"a Unix socket's path has 1 to {MAX_PATH} bytes")
        self._path, self._identity = path, identity
        self._stream: Stream | None = None
        self._greeted = False
        self._failed = 0
        self._selector = selectors.DefaultSelector()
        self.descriptors = (self._selector.fileno(),)

    @property
    def has_more(self) -> bool:
        """Never: its descriptor tells of what has come until it was taken."""
        return False

    @property
    def impatient(self) -> bool:
        """Until it is connected nobody tells when that can be tried again."""
        return not self._greeted

    def take(self) -> Iterator[bytes | Event]:
        """See `Wire`."""
        stream = self._stream or self._connect()
        if stream is None:
            return
        frames: list[bytes] = []
        try:
            for _, events in self._selector.select(0):
                frames = stream.receive()
                if events & selectors.EVENT_WRITE:
                    self._push(stream, stream.push)
        except OSError:
            self._failed += not self._greeted
            self._hang_up()
            if self._failed >= FAILED_HANDSHAKES:
                yield Event.HUNG_UP
            return
        except BadFrame:
            frames = [b""] if not self._greeted else []
            self._hang_up()
        for frame in frames:
            if self._greeted:
                yield frame
            elif frame == GREETING:
                self._greeted, self._failed = True, 0
                self.put(self._identity)
                yield Event.BACK
            else:
                yield Event.STRANGER
                return

    def _connect(self) -> Stream | None:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):  # nobody is there, or takes more just now
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.setblocking(False)
            connection.connect(self._path)
            self._selector.register(connection, selectors.EVENT_READ)
            self._stream = Stream(connection)
            stack.pop_all()
        return self._stream

    def put(self, *frames: bytes) -> None:
        """See `Wire`."""
        if self._stream is not None and self._greeted:
            stream = self._stream
            self._push(stream, lambda: stream.send(*frames))

    def _push(self, stream: Stream, send: Callable[[], None]) -> None:
        with contextlib.suppress(OSError):  # what was said before the other end left is still to be read
            send()
            await_room(self._selector, stream)

    def _hang_up(self, linger: float = 0.0) -> None:
        self._greeted = False
        if self._stream is not None:
            self._selector.unregister(self._stream.connection)
            self._stream.close(linger)
            self._stream = None

    def close(self, linger: float = 0.0) -> None:
        """See `Wire`."""
        self._hang_up(linger)
        self._selector.close()


class ZmqWire(ZmqSource):
    """A DEALER socket with its monitor."""

    impatient = False

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, identity: bytes, keys: CurveKeys | None
    ) -> None:
        self._dealer = context.socket(zmq.DEALER)
        self._monitor = self._dealer.get_monitor_socket()
        super().__init__(self._dealer, self._monitor)
        self._failed_handshakes = 0
        self._connections = 0
        self._last: int = 0
        try:
            _configure(self._dealer, identity)
            if keys is not None:
                self._dealer.curve_publickey = keys.public.encode()
                self._dealer.curve_secretkey = keys.secret.encode()
                self._dealer.curve_serverkey = keys.server.encode()
            _check_port(endpoint)
            self._dealer.connect(endpoint)
        except (zmq.ZMQError, ValueError) as error:
            self.close()
            raise ValueError(str(error)) from None

    def take(self) -> Iterator[bytes | Event]:
        """See `Wire`."""
        while (seen := self._seen()) is not None:
            event = seen["event"]
            # ZeroMQ does not try again after either of these.
            stranger = event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL or (event, self._last) == NO_GREETING
            self._last = event
            if stranger:
                yield Event.STRANGER
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._failed_handshakes = 0
                self._connections += 1
                if self._connections > 1:
                    yield Event.BACK
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                yield Event.NO_KEY
            elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and seen["value"] in HUNG_UP:
                self._failed_handshakes += 1
                if self._failed_handshakes >= FAILED_HANDSHAKES:
                    yield Event.HUNG_UP
        for _ in range(MAX_FRAMES):
            try:
                yield self._dealer.recv(zmq.NOBLOCK)
            except zmq.Again:
                return

    def _seen(self) -> Any:
        try:
            return recv_monitor_message(self._monitor, zmq.NOBLOCK)
        except zmq.Again:
            return None

    def put(self, *frames: bytes) -> None:
        """See `Wire`."""
        with contextlib.suppress(zmq.Again):  # its buffers are full
            for frame in frames:
                self._dealer.send(frame, zmq.NOBLOCK)

    def close(self, linger: float = 0.0) -> None:
        """See `Wire`."""
        self._dealer.disable_monitor()
        self._monitor.close(linger=0)
        self._dealer.close(linger=int(linger * 1000))


def _check_port(endpoint: str) -> None:
    """Raises ValueError for a TCP port that there cannot be: ZeroMQ takes the rest of its division by 65536."""
    port = endpoint.rpartition(":")[2]
    if endpoint.startswith("tcp:") and not (port.isdecimal() and 0 < int(port) < 1 << 16):
        raise ValueError("its port is none of 1 to 65535")


def _configure(dealer: zmq.Socket[bytes], identity: bytes) -> None:
    dealer.set(zmq.ROUTING_ID, identity)
    dealer.set(zmq.MAXMSGSIZE, MAX_FRAME)
    dealer.set(zmq.SNDHWM, 2 * MAX_QUEUED)  # the line's own bound comes first
    dealer.set(zmq.IPV6, 1)
    dealer.set(zmq.RECONNECT_IVL, 100)
    dealer.set(zmq.RECONNECT_IVL_MAX, 2000)
    dealer.set(zmq.CONNECT_TIMEOUT, 5000)
    dealer.set(zmq.HANDSHAKE_IVL, int(HANDSHAKE_SECONDS * 1000))
    dealer.set(zmq.HEARTBEAT_IVL, 1000)
    dealer.set(zmq.HEARTBEAT_TIMEOUT, 5000)

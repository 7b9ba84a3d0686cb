"""Frames over a Unix socket, between processes of one host: a send is one call, and no thread stands between who sends
and who hears, as two of ZeroMQ's do."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import sys
from typing import Any

from triptych.line import MAX_FRAME, BadFrame

__all__ = ["GREETING", "MAX_PATH", "Stream", "await_room"]

MAX_PATH = 107 if sys.platform == "linux" else 103
"""bytes of a Unix socket's path"""

GREETING = b"triptych coordinator"
"""The first frame that a listener sends; the first that a worker sends is its identity."""
MAX_UNSENT = 2 * MAX_FRAME
READ_BYTES = 1 << 18
_SIZE = struct.Struct("<I")


class Stream:
    """One end of a connection. Nothing waits; what is called after the connection broke raises OSError."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self._came = bytearray()
        self._unsent = bytearray()

    @property
    def stuck(self) -> bool:
        """Whether something could not be sent yet: `push` when the socket takes more."""
        return bool(self._unsent)

    def receive(self) -> list[bytes]:
        """The frames that have come. Raises BadFrame for what is none."""
        with contextlib.suppress(BlockingIOError):
            data = self.connection.recv(READ_BYTES)
            if not data:
                raise ConnectionResetError("the other end hung up")
            self._came += data
        frames, at = [], 0
        while len(self._came) - at >= _SIZE.size:
            (size,) = _SIZE.unpack_from(self._came, at)
            if size > MAX_FRAME:
                raise BadFrame(f"{size} bytes are more than a frame has")
            end = at + _SIZE.size + size
            if end > len(self._came):
                break
            frames.append(bytes(self._came[at + _SIZE.size : end]))
            at = end
        del self._came[:at]
        return frames

    def send(self, *frames: bytes) -> None:
        """Sends frames at once, or keeps what the socket does not take now; drops them while too much is kept."""
        whole = b"".join(part for frame in frames for part in (_SIZE.pack(len(frame)), frame))
        if self._unsent:
            if len(self._unsent) + len(whole) <= MAX_UNSENT:
                self._unsent += whole
            return
        sent = 0
        with contextlib.suppress(BlockingIOError):
            sent = self.connection.send(whole)
        if sent < len(whole):
            self._unsent += memoryview(whole)[sent:]

    def push(self) -> None:
        """Sends what was kept, as far as the socket takes it."""
        with contextlib.suppress(BlockingIOError):
            while self._unsent:
                del self._unsent[: self.connection.send(memoryview(self._unsent)[:READ_BYTES])]

    def close(self, linger: float = 0.0) -> None:
        """Hangs up; what was kept is given `linger` seconds to leave."""
        with contextlib.suppress(OSError):
            if self._unsent and linger:
                self.connection.settimeout(linger)
                self.connection.sendall(self._unsent)
        self.connection.close()


def await_room(selector: selectors.BaseSelector, stream: Stream, data: Any = None) -> None:
    """Has the selector tell of a stream that is stuck when the socket takes more, and no longer of one that is not."""
    wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if stream.stuck else 0)
    if selector.get_key(stream.connection).events != wanted:
        selector.modify(stream.connection, wanted, data)

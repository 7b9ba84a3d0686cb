"""What both ends of a line between a coordinator and a worker share: numbered frames, so that a connection that breaks
and comes back loses nothing and repeats nothing."""

from __future__ import annotations

import struct
from collections import deque
from typing import NamedTuple

__all__ = ["MAX_FRAME", "MAX_MESSAGE", "MAX_QUEUED", "BadFrame", "Line", "Taken", "aside", "first_body"]

MAX_MESSAGE = 64 << 20
"""bytes of one message; larger ones are refused by sender and receiver"""
MAX_FRAME = MAX_MESSAGE + 64
"""bytes of a frame, with its head"""

MAX_QUEUED = 4096
"""messages that one end has sent and the other not acknowledged; more, and the line is hung up"""

_HEAD = struct.Struct("<BQQ")  # kind, number, the last number received from the other end
_DATA, _IDLE, _AGAIN, _ASIDE = range(4)


class BadFrame(ValueError):
    """What came is no frame, or belongs to another conversation."""


class Taken(NamedTuple):
    """What a frame brought: a message for whoever listens, and frames to answer with."""

    body: bytes | None
    replies: list[bytes]


class Line:
    """One end of a conversation: numbers what it sends and keeps it until the other end has it. Not thread-safe."""

    def __init__(self) -> None:
        self._sent = 0
        self._received = 0
        self._asked = -1  # the last number before a gap whose filling has been asked for
        self._kept: deque[tuple[int, bytes]] = deque()
        self.kept_bytes = 0
        """bytes of the messages that the other end has not acknowledged"""
        self.owes = 0
        """messages received since a frame last left, which would have acknowledged them"""

    @property
    def kept(self) -> int:
        """How many messages the other end has not acknowledged."""
        return len(self._kept)

    def unacknowledged(self) -> list[bytes]:
        """Their bodies, oldest first."""
        return [body for _, body in self._kept]

    def send(self, body: bytes) -> bytes:
        """The frame for a message, which is kept until it is acknowledged."""
        self._sent += 1
        self._kept.append((self._sent, body))
        self.kept_bytes += len(body)
        return self._frame(_DATA, self._sent, body)

    def idle(self) -> bytes:
        """A frame that says how far this end is, for when there is nothing else to say."""
        return self._frame(_IDLE, self._sent)

    def resume(self) -> list[bytes]:
        """What to send after the connection came back: everything not acknowledged, and a request for the same. Nothing
        if the conversation has not begun."""
        if not self._sent:
            return []
        return [*self._repeat(), self._frame(_AGAIN, self._sent)]

    def take(self, frame: bytes) -> Taken:
        """Takes a frame from the other end. Raises BadFrame."""
        kind, number, acknowledged = _split(frame)
        if kind == _ASIDE:
            return Taken(frame[_HEAD.size :], [])
        if acknowledged > self._sent:
            raise BadFrame("it acknowledges what was never sent")
        while self._kept and self._kept[0][0] <= acknowledged:
            self.kept_bytes -= len(self._kept.popleft()[1])
        if kind == _DATA and number <= self._received + 1:
            fresh = number > self._received
            self._received += fresh
            self.owes += 1
            return Taken(frame[_HEAD.size :] if fresh else None, [])
        replies = self._repeat() if kind == _AGAIN else []
        if number > self._received and (kind != _DATA or self._asked != self._received):
            self._asked = self._received
            replies.append(self._frame(_AGAIN, self._sent))
        return Taken(None, replies)

    def _repeat(self) -> list[bytes]:
        return [self._frame(_DATA, number, body) for number, body in self._kept]

    def _frame(self, kind: int, number: int, body: bytes = b"") -> bytes:
        self.owes = 0
        return _HEAD.pack(kind, number, self._received) + body


def aside(body: bytes) -> bytes:
    """A frame outside of any conversation: for a peer that this end knows nothing of."""
    return _HEAD.pack(_ASIDE, 0, 0) + body


def first_body(frame: bytes) -> bytes | None:
    """The message of a frame that opens a conversation; None for any other. Raises BadFrame."""
    kind, number, _ = _split(frame)
    return frame[_HEAD.size :] if kind == _DATA and number == 1 else None


def _split(frame: bytes) -> tuple[int, int, int]:
    if len(frame) < _HEAD.size:
        raise BadFrame(f"{len(frame)} bytes are no frame")
    kind, number, acknowledged = _HEAD.unpack_from(frame)
    if kind > _ASIDE:
        raise BadFrame(f"no frame is of kind {kind}")
    return kind, number, acknowledged

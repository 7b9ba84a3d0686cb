"""The two EXIF entries that Triptych reads and the one it writes; read from bytes that nobody vouches for.

Pillow's own EXIF reader warns through Python's (process-wide) warnings on damaged blocks and follows every
offset; this one looks up single tags, stays inside the block and answers None to anything odd.
"""

from __future__ import annotations

import struct

__all__ = ["orientation", "user_comment", "with_user_comment"]

_PREFIX = b"Exif\x00\x00"
_ORIENTATION = 0x0112
_EXIF_POINTER = 0x8769
_USER_COMMENT = 0x9286
_MAX_ENTRIES = 1000
_BYTE, _SHORT, _LONG, _UNDEFINED = 1, 3, 4, 7


def orientation(block: bytes) -> int:
    """How a picture was held, 1 (upright) to 8, from its EXIF `block`; 1 where the block does not say."""
    value = _Directory.first(block).number(_ORIENTATION)
    return value if value is not None and 1 <= value <= 8 else 1


def user_comment(block: bytes) -> bytes | None:
    """The user comment of an EXIF `block`, its 8-byte character code included; None if it has none."""
    first = _Directory.first(block)
    pointer = first.number(_EXIF_POINTER)
    return _Directory(first.data, first.order, pointer).raw(_USER_COMMENT) if pointer else None


def with_user_comment(comment: bytes) -> bytes:
    """An EXIF block of nothing but a user comment, which begins with its 8-byte character code."""
    first = struct.pack("<4sIHHHIII", b"II*\x00", 8, 1, _EXIF_POINTER, _LONG, 1, 26, 0)
    second = struct.pack("<HHHIII", 1, _USER_COMMENT, _UNDEFINED, len(comment), 44, 0)
    return _PREFIX + first + second + comment


class _Directory:
    """One list of tags within `data`, whose integers are in byte `order`, beginning at `offset`."""

    def __init__(self, data: bytes, order: str, offset: int) -> None:
        self.data = data
        self.order = order
        self.offset = offset

    @classmethod
    def first(cls, block: bytes) -> _Directory:
        data = block.removeprefix(_PREFIX)
        order = {b"II*\x00": "<", b"MM\x00*": ">"}.get(data[:4])
        if order is None or len(data) < 8:
            return cls(b"", "<", 0)
        return cls(data, order, struct.unpack_from(order + "I", data, 4)[0])

    def _entry(self, tag: int) -> tuple[int, int, int] | None:
        """Type, count and the position of the value field of the entry of that tag."""
        if self.offset + 2 > len(self.data):
            return None
        (count,) = struct.unpack_from(self.order + "H", self.data, self.offset)
        for index in range(min(count, _MAX_ENTRIES)):
            at = self.offset + 2 + 12 * index
            if at + 12 > len(self.data):
                return None
            found, kind, items = struct.unpack_from(self.order + "HHI", self.data, at)
            if found == tag:
                return kind, items, at + 8
        return None

    def number(self, tag: int) -> int | None:
        """The single integer of that tag."""
        entry = self._entry(tag)
        if entry is None or entry[1] != 1 or entry[0] not in (_SHORT, _LONG):
            return None
        return struct.unpack_from(self.order + ("H" if entry[0] == _SHORT else "I"), self.data, entry[2])[0]

    def raw(self, tag: int) -> bytes | None:
        """The bytes of that tag, if they lie within the block."""
        entry = self._entry(tag)
        if entry is None or entry[0] not in (_BYTE, _UNDEFINED):
            return None
        _, size, at = entry
        if size > 4:
            (at,) = struct.unpack_from(self.order + "I", self.data, at)
        return self.data[at : at + size] if at + size <= len(self.data) else None

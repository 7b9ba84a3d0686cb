"""Pooled memory for payloads: pre-faulted segments that grow up to a budget, and slots in them.

A slot in a segment that others map begins with a label that says what lies in it. Its generation is wiped before the
slot is given to another payload, so that whoever still reads there notices.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import struct
import threading
import time
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import psutil

from triptych.errors import NotEnoughMemory

PAGE = mmap.PAGESIZE
LABEL = struct.Struct("<8sQQQ")
"""What a slot begins with: a magic, the generation (0: nothing is in it), the bytes of the header and of the body."""
MAGIC = b"triptych"
_POPULATE_READ, _POPULATE_WRITE = 22, 23
_SEALS = 0x1 | 0x2 | 0x4 | 0x10
"""No more seals, no shrinking, no growing, no writable mapping after ours."""


def round_up(size: int, unit: int) -> int:
    """The next multiple of a unit."""
    return -(-size // unit) * unit


@dataclass(eq=False)
class Segment:
    """One stretch of memory: of a sealed memfd where `fd` is not None."""

    index: int
    size: int
    memory: mmap.mmap
    bytes: np.ndarray
    fd: int | None = None
    free: list[tuple[int, int]] = field(default_factory=list)
    """(offset, size) of the gaps, in order"""

    @property
    def address(self) -> int:
        """Where it lies in this process."""
        return self.bytes.ctypes.data

    @property
    def is_empty(self) -> bool:
        """Whether nothing lies in it."""
        return self.free == [(0, self.size)]

    def take(self, size: int) -> int | None:
        """The offset of the first gap that is large enough, which is then smaller."""
        for index, (offset, gap) in enumerate(self.free):
            if gap >= size:
                self.free[index : index + 1] = [(offset + size, gap - size)] if gap > size else []
                return offset
        return None

    def give_back(self, offset: int, size: int) -> None:
        """Makes a gap of it, joined with its neighbours."""
        insort(self.free, (offset, size))
        joined: list[tuple[int, int]] = []
        for start, length in self.free:
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            else:
                joined.append((start, length))
        self.free = joined


@dataclass(eq=False, slots=True)
class Slot:
    """Reserved memory: `size` usable bytes from `start` in its segment."""

    segment: Segment
    start: int
    size: int
    taken: int
    """bytes of the segment that it takes, whole pages"""

    @property
    def view(self) -> np.ndarray:
        """Its bytes."""
        return self.segment.bytes[self.start : self.start + self.size]

    @property
    def address(self) -> int:
        """Where it lies in this process."""
        return self.segment.address + self.start

    def label(self, generation: int, head: int, body: int) -> None:
        """Says what lies in it; the generation comes last."""
        LABEL.pack_into(self.segment.memory, self.start, MAGIC, 0, head, body)
        struct.pack_into("<Q", self.segment.memory, self.start + len(MAGIC), generation)

    def wipe(self) -> None:
        """Says that nothing lies in it."""
        struct.pack_into("<Q", self.segment.memory, self.start + len(MAGIC), 0)


class Pool:
    """Slots in segments. `shared` segments are sealed memfds, to be handed to readers; the others are private to the
    process. `made` and `dropped` are called with every new and every given-up segment. Any thread may call."""

    def __init__(
        self,
        first_bytes: int,
        budget_bytes: int,
        *,
        shared: bool,
        made: Callable[[Segment], None] | None = None,
        dropped: Callable[[Segment], None] | None = None,
    ) -> None:
        self._first = round_up(first_bytes, PAGE)
        self._budget = round_up(budget_bytes, PAGE)
        self._shared = shared
        self._made, self._dropped = made, dropped
        self._segments: dict[int, Segment] = {}
        self._count = 0
        self._found = 0
        self._changed = threading.Condition()
        self._closed = False

    @property
    def bytes(self) -> int:
        """Bytes of all segments."""
        with self._changed:
            return sum(segment.size for segment in self._segments.values())

    @property
    def reserved(self) -> tuple[int, int]:
        """How many slots lay in segments that were there, and for how many one had to be made."""
        with self._changed:
            return self._found, self._count

    def segment(self, index: int) -> tuple[int, int] | None:
        """A duplicate of a segment's descriptor, for the caller to close, and its size; None if there is none."""
        with self._changed:
            segment = self._segments.get(index)
            return None if segment is None or segment.fd is None else (os.dup(segment.fd), segment.size)

    def live(self) -> list[int]:
        """The indices of the segments that there are."""
        with self._changed:
            return list(self._segments)

    def reserve(self, size: int, timeout: float) -> Slot:
        """A slot of `size` bytes. A full pool grows; where the budget forbids it, the call waits for others to be
        freed. Raises NotEnoughMemory after `timeout` seconds, or at once for what exceeds the whole budget."""
        taken = round_up(max(size, 1), PAGE)
        if taken > self._budget:
            raise NotEnoughMemory(f"a payload of {size} bytes exceeds the pool's budget of {self._budget} bytes")
        with self._changed:
            if not self._closed and (slot := self._take(size, taken)) is not None:
                return slot
            ends = time.monotonic() + timeout
            while True:
                if self._closed:
                    raise NotEnoughMemory("the pool is closed")
                if (slot := self._take(size, taken)) is not None:
                    return slot
                if not self._changed.wait(ends - time.monotonic()) and time.monotonic() >= ends:
                    raise NotEnoughMemory(f"no room for {size} bytes in a pool of {self._budget} in {timeout:g} s")

    def _take(self, size: int, taken: int) -> Slot | None:
        for segment in self._segments.values():
            if (start := segment.take(taken)) is not None:
                self._found += 1
                return Slot(segment, start, size, taken)
        segment = self._grow(taken)
        if segment is None:
            return None
        start = segment.take(taken)
        assert start is not None, "a new segment is large enough for what it was made for"
        return Slot(segment, start, size, taken)

    def _grow(self, taken: int) -> Segment | None:
        used = sum(segment.size for segment in self._segments.values())
        if used + taken > self._budget:
            for segment in [segment for segment in self._segments.values() if segment.is_empty]:
                self._drop(segment)
                used -= segment.size
        if used + taken > self._budget:
            return None
        size = min(max(self._first, taken), self._budget - used)
        segment = make_segment(self._count, size, shared=self._shared)
        self._count += 1
        self._segments[segment.index] = segment
        try:
            if self._made is not None:
                self._made(segment)
        except BaseException:
            self._drop(segment)
            raise
        return segment

    def free(self, slot: Slot) -> None:
        """Gives a slot back."""
        with self._changed:
            slot.segment.give_back(slot.start, slot.taken)
            self._changed.notify_all()

    def trim(self) -> int:
        """Gives up the segments in which nothing lies; returns their bytes. The pool grows again when it has to."""
        with self._changed:
            unused = [segment for segment in self._segments.values() if segment.is_empty]
            for segment in unused:
                self._drop(segment)
            return sum(segment.size for segment in unused)

    def _drop(self, segment: Segment) -> None:
        del self._segments[segment.index]
        if self._dropped is not None:
            self._dropped(segment)
        if segment.fd is not None:
            os.close(segment.fd)

    def close(self) -> None:
        """Lets go of all memory; what still has views of it keeps it until they are gone."""
        with self._changed:
            self._closed = True
            for segment in list(self._segments.values()):
                self._drop(segment)
            self._changed.notify_all()


def make_segment(index: int, size: int, *, shared: bool) -> Segment:
    """A pre-faulted segment. Raises NotEnoughMemory if the machine has less free."""
    available = psutil.virtual_memory().available
    if size > available:
        raise NotEnoughMemory(f"the pool wants {size} bytes more; this machine has {available} free")
    fd = os.memfd_create("triptych-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) if shared else None
    try:
        if fd is None:
            memory = _private(size)
        else:
            os.ftruncate(fd, size)
            memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED)
        array = np.frombuffer(memory, dtype=np.uint8)
        _prefault(memory, array)
        if fd is not None:
            _seal(fd)
    except OSError as error:
        if fd is not None:
            os.close(fd)
        raise NotEnoughMemory(f"no memory for a pool segment of {size} bytes ({error.strerror})") from None
    return Segment(index, size, memory, array, fd, [(0, size)])


def _private(size: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _seal(fd: int) -> None:
    """Called after our own mapping: the last seal forbids every further writable one."""
    import fcntl  # systems without memfd may not have it

    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)


def _prefault(memory: mmap.mmap, array: np.ndarray) -> None:
    try:
        memory.madvise(_POPULATE_WRITE)
    except (OSError, ValueError, AttributeError) as error:
        if getattr(error, "errno", errno.EINVAL) != errno.EINVAL:
            raise
        array[::PAGE] = 0


def prefault_read(memory: mmap.mmap) -> None:
    """Maps a private mapping's pages without copying any; where the system cannot, they are mapped one by one."""
    try:
        memory.madvise(_POPULATE_READ)
    except (OSError, ValueError, AttributeError):
        return

"""Pooled memory: slots do not overlap, come back whole, and the pool keeps to its budget."""

from __future__ import annotations

import mmap
import os
import random
import threading

import numpy as np
import pytest

from triptych.errors import NotEnoughMemory, Unsupported
from triptych.transfer.pool import PAGE, Pool, Segment, Slot, make_segment

linux = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no memfd")


def test_slots_are_apart_and_the_gaps_join_again() -> None:
    pool = Pool(64 * PAGE, 64 * PAGE, shared=False)
    chance = random.Random(3)
    held: list[tuple[Slot, int]] = []
    for number in range(400):
        if held and chance.random() < 0.5:
            slot, mark = held.pop(chance.randrange(len(held)))
            assert (slot.view == mark).all(), "another slot's bytes"
            pool.free(slot)
            continue
        try:
            slot = pool.reserve(chance.randrange(1, 9 * PAGE), 0.0)
        except NotEnoughMemory:
            continue
        slot.view[:] = number % 251
        held.append((slot, number % 251))
    for slot, _ in held:
        pool.free(slot)
    pool.free(pool.reserve(64 * PAGE, 0.0))
    assert pool.bytes == 64 * PAGE
    pool.close()


def test_it_grows_by_budget_and_not_beyond() -> None:
    pool = Pool(2 * PAGE, 600 * PAGE, shared=False)
    small = pool.reserve(2 * PAGE, 0.0)
    large = pool.reserve(500 * PAGE, 0.0)
    assert pool.bytes <= 600 * PAGE
    with pytest.raises(NotEnoughMemory, match="in a pool of"):
        pool.reserve(400 * PAGE, 0.01)
    with pytest.raises(NotEnoughMemory, match="exceeds the pool's budget"):
        pool.reserve(601 * PAGE, 10.0)
    pool.free(small)
    pool.free(large)
    # A segment that is empty makes way for one of the size that is wanted.
    assert pool.reserve(598 * PAGE, 0.0).size == 598 * PAGE
    pool.close()


def test_a_full_pool_is_waited_for() -> None:
    pool = Pool(4 * PAGE, 4 * PAGE, shared=False)
    first = pool.reserve(4 * PAGE, 0.0)
    got: list[Slot] = []
    waiting = threading.Thread(target=lambda: got.append(pool.reserve(PAGE, 30.0)))
    waiting.start()
    pool.free(first)
    waiting.join(30.0)
    assert got and got[0].size == PAGE
    pool.close()
    with pytest.raises(NotEnoughMemory, match="closed"):
        pool.reserve(PAGE, 0.0)


def test_a_segment_that_is_not_taken_does_not_stay() -> None:
    def refuse(segment: Segment) -> None:
        raise Unsupported("not this one")

    pool = Pool(4 * PAGE, 4 * PAGE, shared=False, made=refuse)
    for _ in range(2):
        with pytest.raises(Unsupported, match="not this one"):
            pool.reserve(PAGE, 0.0)
    assert pool.bytes == 0
    pool.close()


def test_more_than_the_machine_has_is_refused_at_once() -> None:
    with pytest.raises(NotEnoughMemory, match="this machine has"):
        make_segment(0, 2**50, shared=False)


@linux
def test_a_segment_cannot_be_cut_or_mapped_for_writing() -> None:
    """Truncation under a reader would be a SIGBUS; a reader that maps it for writing could change what is kept."""
    segment = make_segment(0, 4 * PAGE, shared=True)
    assert segment.fd is not None
    segment.bytes[5] = 7
    for size in (PAGE, 8 * PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(segment.fd, size)
    again = os.open(f"/proc/self/fd/{segment.fd}", os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(again, 4 * PAGE, flags=mmap.MAP_SHARED)
        with pytest.raises(PermissionError):
            os.pwrite(again, b"x", 5)
    finally:
        os.close(again)
        os.close(segment.fd)
    assert segment.bytes[5] == 7


@linux
def test_a_mapping_outlives_whoever_closes_it() -> None:
    """Access after a close would be a SIGSEGV: views keep the memory."""
    pool = Pool(4 * PAGE, 4 * PAGE, shared=True)
    view = pool.reserve(PAGE, 0.0).view
    view[:] = 9
    pool.close()
    assert int(np.asarray(view, dtype=np.int64).sum()) == 9 * PAGE


def test_trimming_gives_up_what_is_empty_and_nothing_else() -> None:
    dropped: list[Segment] = []
    pool = Pool(4 * PAGE, 64 * PAGE, shared=False, dropped=dropped.append)
    kept, freed = pool.reserve(4 * PAGE, 0.0), pool.reserve(8 * PAGE, 0.0)
    kept.view[:] = 7
    assert pool.trim() == 0
    pool.free(freed)
    assert pool.trim() == 8 * PAGE and pool.bytes == 4 * PAGE and dropped == [freed.segment]
    assert (kept.view == 7).all()
    assert pool.trim() == 0
    assert pool.reserve(8 * PAGE, 0.0).size == 8 * PAGE, "it grows again"
    pool.close()

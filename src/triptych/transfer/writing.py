"""Reserve, write, commit: a payload into a slot of the pool, and its header with the digests of what was written.

In a slot: a label, the header with its own digest after it, the body. Where the body begins follows from the sizes.
"""

from __future__ import annotations

import numpy as np
import torch
import xxhash

from triptych.errors import Damaged
from triptych.transfer.payload import ALIGNMENT, DIGEST_BYTES, Draft, encode_header, raw_bytes, small_bytes
from triptych.transfer.pool import LABEL, MAGIC, PAGE, Pool, round_up
from triptych.transfer.shelf import Kept
from triptych.transfer.staging import to_host

HEAD_START = round_up(LABEL.size, ALIGNMENT)
CHUNK = 2**20
"""copied and hashed while it is in the cache"""
SMALL = 2**16
_PADDING = bytes(ALIGNMENT)


def seal(header: bytes) -> bytes:
    """A header with its digest after it."""
    return header + xxhash.xxh3_128_digest(header)


def unseal(head: bytes) -> bytes:
    """The opposite. Raises Damaged."""
    header, digest = head[:-DIGEST_BYTES], head[-DIGEST_BYTES:]
    if xxhash.xxh3_128_digest(header) != digest:
        raise Damaged("the header was damaged on the way: its digest does not match")
    return header


def body_start(head: int, body: int) -> int:
    """Where in its slot a body begins, from the bytes of the header and of the body."""
    return round_up(HEAD_START + head, ALIGNMENT if body < SMALL else PAGE)


def commit(draft: Draft, pool: Pool, name: str, generation: int, timeout: float) -> Kept:
    """Writes a payload into the pool. Raises NotEnoughMemory if no room comes in time."""
    tensors = to_host(draft.tensors)
    if draft.body < SMALL:
        return _commit_small(draft, tensors, pool, name, generation, timeout)
    # Where the body begins must be known before the digests are: they come with the copying.
    head = len(encode_header(draft.header())) + DIGEST_BYTES
    start = body_start(head, draft.body)
    slot = pool.reserve(start + draft.body, timeout)
    try:
        sealed = seal(encode_header(draft.header(_write(draft, tensors, slot.view[start:]))))
        slot.segment.memory[slot.start + HEAD_START : slot.start + HEAD_START + head] = sealed
        slot.label(generation, head, draft.body)
    except BaseException:
        pool.free(slot)
        raise
    return Kept(name, generation, sealed, draft.body, start, slot)


def _commit_small(
    draft: Draft, tensors: list[torch.Tensor], pool: Pool, name: str, generation: int, timeout: float
) -> Kept:
    """All of it put together first and written at once: calls cost more than bytes here."""
    raw = [small_bytes(tensor) for tensor in tensors]
    head = seal(encode_header(draft.header([xxhash.xxh3_128_digest(item) for item in raw])))
    start = body_start(len(head), draft.body)
    parts = [LABEL.pack(MAGIC, generation, len(head), draft.body).ljust(HEAD_START, b"\0"), head]
    parts.append(bytes(start - HEAD_START - len(head)))
    for item in raw:
        parts += (item, _PADDING[: -len(item) % ALIGNMENT])
    whole = b"".join(parts)
    slot = pool.reserve(len(whole), timeout)
    slot.segment.memory[slot.start : slot.start + len(whole)] = whole
    return Kept(name, generation, head, draft.body, start, slot)


def _write(draft: Draft, tensors: list[torch.Tensor], body: np.ndarray) -> list[bytes]:
    digests = []
    for item, tensor in zip(draft.headers, tensors, strict=True):
        end = item.offset + item.nbytes
        target = body[item.offset : end]
        if not item.nbytes or tensor.is_contiguous():
            digests.append(_copied(raw_bytes(tensor), target))
        else:
            torch.from_numpy(target).view(tensor.dtype).view(tensor.shape).copy_(tensor)
            digests.append(xxhash.xxh3_128_digest(target.data))
        _pad(body, end)
    return digests


def _pad(body: np.ndarray, end: int) -> None:
    if end % ALIGNMENT:
        body[end : round_up(end, ALIGNMENT)] = 0  # no bytes of an earlier payload travel


def _copied(source: np.ndarray, target: np.ndarray) -> bytes:
    """Copies, and returns the digest of the copy."""
    if source.size <= CHUNK:
        np.copyto(target, source)
        return xxhash.xxh3_128_digest(target.data)
    hasher = xxhash.xxh3_128()
    for start in range(0, source.size, CHUNK):
        part = target[start : start + CHUNK]
        np.copyto(part, source[start : start + CHUNK])
        hasher.update(part.data)
    return hasher.digest()

"""The payload: named tensors and plain values of one task, and its form on a wire.

Wire form: a msgpack header (schema version, job, attempt, stage, values, per tensor dtype, shape, offset, bytes and
XXH3-128 digest), then a body of raw tensor bytes, each 64-byte aligned. XXH3 guards against accidents, not attackers.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import torch
import xxhash

from triptych.errors import Damaged, WrongPayload

SCHEMA = 1
ALIGNMENT = 64
MAX_TENSORS = 4096
MAX_DIMENSIONS = 16
MAX_DEPTH = 16
DIGEST_BYTES = 16

_TENSOR, _TUPLE = 1, 2
_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith(("torch.q", "torch.bits"))
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PADDING = bytes(ALIGNMENT)
_NO_DIGEST = bytes(DIGEST_BYTES)


@dataclass
class Payload:
    """One task's values: tensors, numbers, strings, None, and lists, tuples and dicts of these. `tags` are Modular
    Diffusers' kwargs_type names, each with the values that carry it."""

    values: dict[str, Any]
    tags: dict[str, list[str]] = field(default_factory=dict)
    job: str = ""
    attempt: int = 0
    stage: str = ""

    def check(self) -> Payload:
        """Returns itself. Raises WrongPayload naming the first value that is neither a tensor nor plain data."""
        for name, value in self.values.items():
            _check(name, value, 0)
        return self


class TensorHeader(msgspec.Struct, frozen=True, array_like=True):
    """One tensor in the body: `offset` and `nbytes` in bytes, `digest` its XXH3-128. `order` lists the dimensions as
    they lie in memory, outermost first ([]: as in the shape): convolutions compute in their input's own layout, and
    not to the same last bit in another."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    digest: bytes
    order: tuple[int, ...] = ()


class Header(msgspec.Struct, frozen=True):
    """What a payload's body holds and where."""

    schema: int
    job: str
    attempt: int
    stage: str
    values: Any
    tags: dict[str, list[str]]
    tensors: list[TensorHeader]
    body: int
    """The body's length in bytes, padding included."""

    def outline(self) -> dict[str, Any]:
        """The values with a TensorHeader in each tensor's place. Raises WrongPayload."""
        return _filled(self.values, self.tensors)


@dataclass(eq=False, slots=True)
class Draft:
    """A payload about to be written: all of its header but the digests, and the tensors in the body's order, laid out
    as they will lie there (dense ones contiguous)."""

    payload: Payload
    values: Any
    tensors: tuple[torch.Tensor, ...]
    headers: tuple[TensorHeader, ...]
    body: int

    def header(self, digests: Sequence[bytes] | None = None) -> Header:
        """The header; without digests its encoding has as many bytes as with them."""
        tensors = [
            TensorHeader(item.dtype, item.shape, item.offset, item.nbytes, digest, item.order)
            for item, digest in zip(self.headers, digests or [_NO_DIGEST] * len(self.headers), strict=True)
        ]
        payload = self.payload
        job, attempt, stage, tags = payload.job, payload.attempt, payload.stage, payload.tags
        return Header(SCHEMA, job, attempt, stage, self.values, tags, tensors, self.body)

    def copy(self) -> Payload:
        """The payload again, of tensors of its own that lie as they would on arrival."""
        tensors = [
            _ordered(tensor.clone(memory_format=torch.contiguous_format), item.order)
            for tensor, item in zip(self.tensors, self.headers, strict=True)
        ]
        payload = self.payload
        tags = {kind: list(names) for kind, names in payload.tags.items()}
        return Payload(_filled(self.values, tensors), tags, payload.job, payload.attempt, payload.stage)


def _check(path: str, value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise WrongPayload(f"{path} is nested deeper than {MAX_DEPTH}", field=path)
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_meta or value.dtype not in _NAMES:
            raise WrongPayload("a sparse, quantized or meta tensor cannot cross between stages", field=path)
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise WrongPayload(f"a {type(key).__name__} is no key that can cross between stages", field=path)
            _check(f"{path}.{key}", item, depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check(f"{path}[{index}]", item, depth + 1)
    elif isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise WrongPayload(f"{path} is an integer of more than 64 bits", field=path)
    elif not (value is None or isinstance(value, bool | int | float | str)):
        raise WrongPayload(f"a {type(value).__module__}.{type(value).__name__} cannot cross between stages", field=path)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested dicts, lists and tuples, in their order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def _memory_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """The permutation of dimensions that makes a dense tensor contiguous; () if it is, or if none does."""
    if tensor.is_contiguous():
        return ()
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tuple(order) if tensor.permute(order).is_contiguous() else ()


def raw_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The used bytes of a tensor of any dtype, shape, stride or device, as flat uint8; of a contiguous one on the
    host its own memory."""
    if not tensor.numel():
        return np.empty(0, dtype=np.uint8)
    flat = tensor.to("cpu").contiguous().view(-1)
    return flat.view(torch.uint8).numpy()


def small_bytes(tensor: torch.Tensor) -> bytes:
    """The same as `raw_bytes`, copied: for little of it, a third of the time."""
    dense = tensor.contiguous()
    return ctypes.string_at(dense.data_ptr(), dense.numel() * dense.itemsize)


def draft_payload(payload: Payload) -> Draft:
    """Plans how a payload will lie on the wire; copies nothing.

    Raises WrongPayload for values that are neither tensors nor plain data.
    """
    payload.check()
    draft = _Drafting()
    values = {name: draft.plain(value) for name, value in payload.values.items()}
    return Draft(payload, values, tuple(draft.tensors), tuple(draft.headers), draft.offset)


class _Drafting:
    """Puts values into their wire form, collecting the tensors. A closure that calls itself would keep them until the
    next garbage collection."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.headers: list[TensorHeader] = []
        self.offset = 0

    def plain(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._add(value)
        if isinstance(value, tuple):
            return msgspec.msgpack.Ext(_TUPLE, msgspec.msgpack.encode([self.plain(item) for item in value]))
        if isinstance(value, list):
            return [self.plain(item) for item in value]
        if isinstance(value, dict):
            return {key: self.plain(item) for key, item in value.items()}
        return value

    def _add(self, tensor: torch.Tensor) -> msgspec.msgpack.Ext:
        order = _memory_order(tensor)
        nbytes = tensor.numel() * tensor.itemsize
        self.headers.append(TensorHeader(_NAMES[tensor.dtype], tuple(tensor.shape), self.offset, nbytes, b"", order))
        laid_out = (tensor.permute(order) if order else tensor).detach()
        self.tensors.append(
            laid_out.resolve_conj().resolve_neg() if laid_out.is_conj() or laid_out.is_neg() else laid_out
        )
        self.offset += nbytes + -nbytes % ALIGNMENT
        return msgspec.msgpack.Ext(_TENSOR, (len(self.headers) - 1).to_bytes(4, "big"))


def encode_payload(payload: Payload) -> tuple[bytes, list[memoryview | bytes]]:
    """The header's bytes and the body as buffers to send one after another (padding included).

    Raises WrongPayload for values that are neither tensors nor plain data.
    """
    draft = draft_payload(payload)
    raw = [raw_bytes(tensor) for tensor in draft.tensors]
    body: list[memoryview | bytes] = []
    for item in raw:
        body += [item.data if item.nbytes else b"", _PADDING[: -item.nbytes % ALIGNMENT]]
    return encode_header(draft.header([xxhash.xxh3_128_digest(item.data) for item in raw])), body


def encode_header(header: Header) -> bytes:
    """A header's bytes."""
    return msgspec.msgpack.encode(header)


def decode_header(header: bytes | memoryview) -> Header:
    """The header, checked in itself: sizes agree with shapes, tensors lie in the body, in order, without overlap.

    Raises WrongPayload. Call it before allocating the body.
    """
    try:
        decoded = msgspec.msgpack.decode(header, type=Header)
    except (msgspec.DecodeError, RecursionError) as error:
        raise WrongPayload(f"unreadable header ({error})") from None
    if decoded.schema != SCHEMA:
        raise WrongPayload(f"schema {decoded.schema}, this side speaks {SCHEMA}")
    if len(decoded.tensors) > MAX_TENSORS:
        raise WrongPayload(f"{len(decoded.tensors)} tensors, at most {MAX_TENSORS}")
    end = 0
    for index, tensor in enumerate(decoded.tensors):
        dtype = _DTYPES.get(tensor.dtype)
        if dtype is None:
            raise WrongPayload(f"tensor {index} has the unknown dtype {tensor.dtype!r}")
        if len(tensor.shape) > MAX_DIMENSIONS or (tensor.shape and min(tensor.shape) < 0):
            raise WrongPayload(f"tensor {index} has the impossible shape {tensor.shape}")
        if tensor.order and sorted(tensor.order) != list(range(len(tensor.shape))):
            raise WrongPayload(f"tensor {index} has the impossible order {tensor.order}")
        if not tensor.nbytes and math.prod(max(size, 1) for size in tensor.shape) * dtype.itemsize >= 2**63:
            raise WrongPayload(f"tensor {index} has the impossible shape {tensor.shape}")  # empty, but torch counts
        if tensor.nbytes != math.prod(tensor.shape) * dtype.itemsize:
            raise WrongPayload(f"tensor {index} of shape {tensor.shape} cannot have {tensor.nbytes} bytes")
        if tensor.offset < end or tensor.offset % ALIGNMENT or tensor.offset + tensor.nbytes > decoded.body:
            raise WrongPayload(f"tensor {index} lies outside the body or over another")
        end = tensor.offset + tensor.nbytes
    return decoded


def decode_payload(header: bytes | memoryview, body: bytearray | memoryview) -> Payload:
    """The payload; its tensors are views of `body`, which must be writable and stay untouched.

    Raises WrongPayload if sizes disagree, Damaged if a digest does not match.
    """
    return fill_payload(decode_header(header), memoryview(body))


def fill_payload(header: Header, body: memoryview) -> Payload:
    """The payload of a checked header, as `decode_payload`."""
    if body.nbytes != header.body:
        raise WrongPayload(f"body of {body.nbytes} bytes, the header says {header.body}")
    tensors = [_tensor(body, item, index) for index, item in enumerate(header.tensors)]
    return Payload(_filled(header.values, tensors), header.tags, header.job, header.attempt, header.stage)


def _filled(values: Any, tensors: Sequence[Any]) -> dict[str, Any]:
    """A header's values with these in the tensors' places."""
    try:
        if not all(isinstance(name, str) for name in values):
            raise WrongPayload("values without names")
        return {name: _whole(value, tensors) for name, value in values.items()}
    except (IndexError, AttributeError, TypeError, msgspec.DecodeError, RecursionError) as error:
        raise WrongPayload(f"unreadable values ({error})") from None


def _whole(value: Any, tensors: Sequence[Any]) -> Any:
    if isinstance(value, msgspec.msgpack.Ext):
        if value.code == _TENSOR:
            return tensors[int.from_bytes(value.data, "big")]
        if value.code == _TUPLE:
            return tuple(_whole(item, tensors) for item in msgspec.msgpack.decode(value.data))
        raise WrongPayload(f"unknown kind of value {value.code}")
    if isinstance(value, list):
        return [_whole(item, tensors) for item in value]
    if isinstance(value, dict):
        return {key: _whole(item, tensors) for key, item in value.items()}
    return value


def _tensor(view: memoryview, item: TensorHeader, index: int) -> torch.Tensor:
    raw = view[item.offset : item.offset + item.nbytes]
    if xxhash.xxh3_128_digest(raw) != item.digest:
        raise Damaged(f"tensor {index} was damaged on the way: its digest does not match")
    dtype = _DTYPES[item.dtype]
    if not item.nbytes:
        return torch.empty(item.shape, dtype=dtype)
    flat = torch.frombuffer(raw, dtype=dtype)
    if not item.order:
        return flat if len(item.shape) == 1 else flat.view(item.shape)
    return _ordered(flat.view([item.shape[dimension] for dimension in item.order]), item.order)


def _ordered(laid_out: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """A tensor with its dimensions back in their places, from one that lies contiguously in `order`."""
    return laid_out.permute([order.index(dimension) for dimension in range(len(order))]) if order else laid_out


def payload_parts(payload: Payload) -> list[memoryview | bytes]:
    """A payload as a file's parts: the header's length (8 bytes, big-endian), header, body."""
    head, body = encode_payload(payload)
    return [len(head).to_bytes(8, "big"), head, *body]


def payload_of(data: bytes | memoryview) -> Payload:
    """What `payload_parts` gave, copied. Raises WrongPayload if it is something else, or damaged."""
    whole = memoryview(data)
    size = int.from_bytes(whole[:8], "big")
    if len(whole) < 8 + size:
        raise WrongPayload("no payload, or only its beginning", field="payload")
    body = torch.empty(len(whole) - 8 - size, dtype=torch.uint8)  # aligned as kernels like it
    body.numpy()[:] = whole[8 + size :]
    return decode_payload(bytes(whole[8 : 8 + size]), body.numpy().data)

"""The payload: named tensors and plain values of one task, and its form on a wire.

Wire form: a msgpack header (schema version, job, attempt, stage, values, per tensor dtype, shape, offset, bytes and
XXH3-128 digest), then a body of raw tensor bytes, each 64-byte aligned. XXH3 guards against accidents, not attackers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
import xxhash

from triptych.errors import WrongPayload

SCHEMA = 1
ALIGNMENT = 64
MAX_TENSORS = 4096
MAX_DIMENSIONS = 16
MAX_DEPTH = 16

_TENSOR, _TUPLE = 1, 2
_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith(("torch.q", "torch.bits"))
}


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


def _check(path: str, value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise WrongPayload(f"{path} is nested deeper than {MAX_DEPTH}", field=path)
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise WrongPayload(f"a {type(key).__name__} is no key that can cross between stages", field=path)
            _check(f"{path}.{key}", item, depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check(f"{path}[{index}]", item, depth + 1)
    elif isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise WrongPayload(f"{path} is an integer of more than 64 bits", field=path)
    elif not (value is None or isinstance(value, bool | int | float | str | torch.Tensor)):
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


def _raw(tensor: torch.Tensor, order: tuple[int, ...]) -> memoryview:
    """The used bytes of a tensor of any dtype, shape or stride, on the host."""
    laid_out = tensor.permute(order) if order else tensor
    flat = laid_out.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def encode_payload(payload: Payload) -> tuple[bytes, list[memoryview | bytes]]:
    """The header's bytes and the body as buffers to send one after another (padding included).

    Raises WrongPayload for values that are neither tensors nor plain data.
    """
    payload.check()
    headers: list[TensorHeader] = []
    body: list[memoryview | bytes] = []
    offset = 0

    def plain(value: Any) -> Any:
        nonlocal offset
        if isinstance(value, torch.Tensor):
            order = _memory_order(value)
            raw = _raw(value, order)
            dtype = str(value.dtype).removeprefix("torch.")
            digest = xxhash.xxh3_128_digest(raw)
            headers.append(TensorHeader(dtype, tuple(value.shape), offset, raw.nbytes, digest, order))
            padding = -raw.nbytes % ALIGNMENT
            body.extend((raw, bytes(padding)))
            offset += raw.nbytes + padding
            return msgspec.msgpack.Ext(_TENSOR, (len(headers) - 1).to_bytes(4, "big"))
        if isinstance(value, tuple):
            return msgspec.msgpack.Ext(_TUPLE, msgspec.msgpack.encode([plain(item) for item in value]))
        if isinstance(value, list):
            return [plain(item) for item in value]
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return value

    values = {name: plain(value) for name, value in payload.values.items()}
    header = Header(SCHEMA, payload.job, payload.attempt, payload.stage, values, payload.tags, headers, offset)
    return msgspec.msgpack.encode(header), body


def decode_header(header: bytes | memoryview) -> Header:
    """The header, checked in itself: sizes agree with shapes, tensors lie in the body, in order, without overlap.

    Raises WrongPayload. Call it before allocating the body.
    """
    try:
        decoded = msgspec.msgpack.decode(header, type=Header)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
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
        if len(tensor.shape) > MAX_DIMENSIONS or any(side < 0 for side in tensor.shape):
            raise WrongPayload(f"tensor {index} has the impossible shape {tensor.shape}")
        if tensor.order and sorted(tensor.order) != list(range(len(tensor.shape))):
            raise WrongPayload(f"tensor {index} has the impossible order {tensor.order}")
        if tensor.nbytes != math.prod(tensor.shape) * dtype.itemsize:
            raise WrongPayload(f"tensor {index} of shape {tensor.shape} cannot have {tensor.nbytes} bytes")
        if tensor.offset < end or tensor.offset % ALIGNMENT or tensor.offset + tensor.nbytes > decoded.body:
            raise WrongPayload(f"tensor {index} lies outside the body or over another")
        end = tensor.offset + tensor.nbytes
    return decoded


def decode_payload(header: bytes | memoryview, body: bytearray | memoryview) -> Payload:
    """The payload; its tensors are views of `body`, which must be writable and stay untouched.

    Raises WrongPayload if sizes disagree or a digest does not match.
    """
    decoded = decode_header(header)
    view = memoryview(body)
    if view.nbytes != decoded.body:
        raise WrongPayload(f"body of {view.nbytes} bytes, the header says {decoded.body}")
    tensors = [_tensor(view, item, index) for index, item in enumerate(decoded.tensors)]

    def whole(value: Any) -> Any:
        if isinstance(value, msgspec.msgpack.Ext):
            if value.code == _TENSOR:
                return tensors[int.from_bytes(value.data, "big")]
            if value.code == _TUPLE:
                return tuple(whole(item) for item in msgspec.msgpack.decode(value.data))
            raise WrongPayload(f"unknown kind of value {value.code}")
        if isinstance(value, list):
            return [whole(item) for item in value]
        if isinstance(value, dict):
            return {key: whole(item) for key, item in value.items()}
        return value

    try:
        values = {name: whole(value) for name, value in decoded.values.items()}
    except (IndexError, AttributeError, msgspec.DecodeError, RecursionError) as error:
        raise WrongPayload(f"unreadable values ({error})") from None
    return Payload(values, decoded.tags, decoded.job, decoded.attempt, decoded.stage)


def _tensor(view: memoryview, item: TensorHeader, index: int) -> torch.Tensor:
    raw = view[item.offset : item.offset + item.nbytes]
    if xxhash.xxh3_128_digest(raw) != item.digest:
        raise WrongPayload(f"tensor {index} was damaged on the way: its digest does not match")
    dtype = _DTYPES[item.dtype]
    if not item.nbytes:
        return torch.empty(item.shape, dtype=dtype)
    flat = torch.frombuffer(raw, dtype=torch.uint8).view(dtype)
    if not item.order:
        return flat.reshape(item.shape)
    laid_out = flat.reshape([item.shape[dimension] for dimension in item.order])
    return laid_out.permute([item.order.index(dimension) for dimension in range(len(item.shape))])

"""Frames between a stage process and its parent: a small msgpack message, and a payload where one belongs to it."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import torch
from PIL import Image

from triptych.errors import WrongPayload
from triptych.model import Trust
from triptych.request import StageName
from triptych.transfer import Payload, decode_payload, encode_payload

MAX_FRAME = 1 << 36
PICTURES = ("image", "mask_image")


@dataclass(frozen=True)
class StageSpec:
    """Which stage of which model to hold, and where. The same fields as `Engine.open`; `threads` are torch's."""

    model: str
    stage: StageName
    workflow: str | None = None
    device: str = "auto"
    dtype: str | None = None
    revision: str | None = None
    offline: bool = False
    trust: Trust = field(default_factory=Trust)
    threads: int | None = None


class Open(msgspec.Struct, tag=True, frozen=True):
    """Open a model and load one stage of it."""

    spec: StageSpec


class Opened(msgspec.Struct, tag=True, frozen=True):
    """The stage is loaded with these components (weights on a device) and no others."""

    components: tuple[str, ...]


class Run(msgspec.Struct, tag=True, frozen=True):
    """Run a task; its payload carries the fields and what came from the stage before."""

    job: str
    seed: int
    guidance_scale: float | None = None
    shift: float | None = None
    raw: bool = False


class Stepped(msgspec.Struct, tag=True, frozen=True):
    """A step of the running task is done."""

    step: int
    steps: int
    seconds: float


class Done(msgspec.Struct, tag=True, frozen=True):
    """The running task is done; its payload follows."""

    seconds: float
    steps: int
    peak_bytes: int


class Broken(msgspec.Struct, tag=True, frozen=True):
    """The order failed: the error's code, message and field."""

    code: str
    message: str
    field: str | None = None


Message = Open | Opened | Run | Stepped | Done | Broken
_CODER = msgspec.msgpack.Decoder(Message)


def send(connection: socket.socket, message: Message, payload: Payload | None = None) -> None:
    """Sends one frame. Raises WrongPayload for values that cannot cross, OSError when the peer is gone."""
    head, body = (b"", []) if payload is None else encode_payload(payload)
    text = msgspec.msgpack.encode(message)
    size = sum(memoryview(part).nbytes for part in body)
    sizes = b"".join(n.to_bytes(8, "big") for n in (len(text), len(head), size))
    connection.sendall(sizes + text + head)
    for part in body:
        connection.sendall(part)


def receive(connection: socket.socket) -> tuple[Message, Payload | None]:
    """The next frame. Raises EOFError when the peer is gone, WrongPayload when it cannot be read."""
    sizes = _exactly(connection, 24)
    text, head, size = (int.from_bytes(sizes[i : i + 8], "big") for i in (0, 8, 16))
    if max(text, head, size) > MAX_FRAME:
        raise WrongPayload(f"a frame of {max(text, head, size)} bytes, at most {MAX_FRAME}")
    message = _CODER.decode(_exactly(connection, text))
    if not head:
        return message, None
    header = bytes(_exactly(connection, head))
    return message, decode_payload(header, _exactly(connection, size))


def _exactly(connection: socket.socket, size: int) -> memoryview:
    # Torch aligns what it allocates: kernels may round differently over data that is not.
    view, got = torch.empty(size, dtype=torch.uint8).numpy().data, 0
    while got < size:
        count = connection.recv_into(view[got:])
        if not count:
            raise EOFError("the peer has closed the connection")
        got += count
    return view


def pack_task(fields: dict[str, Any], payload: Payload | None) -> Payload:
    """A task's fields and input as one payload; pictures among the fields become uint8 tensors."""
    plain = {name: value for name, value in fields.items() if name not in PICTURES}
    pictures = {name: _to_tensors(fields[name]) for name in PICTURES if name in fields}
    before = payload.values if payload is not None else None
    tags = payload.tags if payload is not None else {}
    return Payload({"fields": plain, "pictures": pictures, "before": before}, tags)


def unpack_task(packed: Payload) -> tuple[dict[str, Any], Payload | None]:
    """What `pack_task` packed."""
    pictures = {name: _to_images(value) for name, value in packed.values["pictures"].items()}
    before = packed.values["before"]
    return {**packed.values["fields"], **pictures}, None if before is None else Payload(before, packed.tags)


def _to_tensors(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_to_tensors(item) for item in value]
    return torch.from_numpy(np.array(value))


def _to_images(value: Any) -> Any:
    if isinstance(value, list):
        return [_to_images(item) for item in value]
    return Image.fromarray(value.numpy())

"""The ways of others, for benchmarks/transfer.py: pickle over a socket, base64 over HTTP, Mooncake alone."""

from __future__ import annotations

import base64
import contextlib
import http.client
import http.server
import importlib
import json
import pickle
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from triptych.messages import Ticket

_LENGTH = struct.Struct("<Q")


class Order(msgspec.Struct, omit_defaults=True):
    """What the consumer is told: the way, and what goes with it."""

    way: str
    ticket: Ticket | None = None
    data: bytes = b""
    http: int = 0
    mooncake: tuple[str, int] | None = None


_ENCODER, _DECODER = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Order)


def send(connection: socket.socket, order: Order) -> None:
    """An order as msgpack, its length before it."""
    data = _ENCODER.encode(order)
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive(connection: socket.socket) -> Order | None:
    """The next order, of which there is one at a time; None when the other side has closed."""
    first = connection.recv(2**16)
    if not first:
        return None
    (length,) = _LENGTH.unpack_from(first)
    if len(first) == _LENGTH.size + length:
        return _DECODER.decode(memoryview(first)[_LENGTH.size :])
    data = bytearray(_LENGTH.size + length)
    data[: len(first)] = first
    view = memoryview(data)[len(first) :]
    while view:
        view = view[connection.recv_into(view) :]
    return _DECODER.decode(memoryview(data)[_LENGTH.size :])


def over_pickle(connection: socket.socket, tensor: torch.Tensor) -> None:
    """As SGLang and others do between their processes."""
    send(connection, Order("pickle", data=pickle.dumps(tensor.numpy())))
    connection.recv(1)


def over_http(port: int, tensor: torch.Tensor) -> None:
    """As LightLLM's text encoder does where it has no shared memory."""
    body = json.dumps({"shape": list(tensor.shape), "data": base64.b64encode(tensor.numpy().data).decode()})
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/", body)
    connection.getresponse().read()
    connection.close()


class _Taker(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        torch.frombuffer(bytearray(base64.b64decode(told["data"])), dtype=torch.uint8).view(told["shape"])
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@contextlib.contextmanager
def http_server() -> Iterator[int]:
    """Takes tensors as base64 in JSON; gives its port."""
    server = http.server.HTTPServer(("127.0.0.1", 0), _Taker)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def echo(connection: socket.socket, size: int) -> Iterator[None]:
    """Answers each `size` bytes with one, until the other side closes."""

    def answer() -> None:
        while len(connection.recv(size, socket.MSG_WAITALL)) == size:
            connection.sendall(b"k")

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    yield
    thread.join(10)


@dataclass(frozen=True)
class BareMooncake:
    """Mooncake's engine over TCP with one registered buffer, written to without header or digest."""

    engine: Any
    buffer: torch.Tensor

    @classmethod
    def of(cls, size: int) -> BareMooncake:
        """An engine on loopback with a warm buffer."""
        engine = importlib.import_module("mooncake.engine").TransferEngine()
        buffer = torch.zeros(size, dtype=torch.uint8)
        if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") or engine.register_memory(buffer.data_ptr(), size):
            raise RuntimeError("Mooncake does not start")
        return cls(engine, buffer)

    @property
    def target(self) -> tuple[str, int]:
        """Where others write to."""
        return f"127.0.0.1:{self.engine.get_rpc_port()}", self.buffer.data_ptr()

    def write(self, session: str, address: int, tensor: torch.Tensor) -> None:
        """Copies the tensor into the registered buffer, as a producer must, and writes it over there."""
        mine = self.buffer[: tensor.numel()]
        mine.copy_(tensor)
        if self.engine.transfer_sync_write(session, mine.data_ptr(), address, tensor.numel()):
            raise RuntimeError("a Mooncake write failed")

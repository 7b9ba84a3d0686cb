"""Handing a tensor to another process, with its digest, beside a memcpy of its size and what others do.

A producer hands a payload over and waits for the acknowledgement, by every way in every round, so that whatever slows
the machine slows all of them. Figures are medians over the rounds; a fraction is the median memcpy of the same size in
the same rounds, between warm buffers, over the median handoff.

What is small costs what telling of it costs. `message` is that alone, in the same rounds: an order with as many bytes
to the other process and its acknowledgement, in Python, which takes twice a bare round trip and more. So a handoff of
1 KiB is measured in messages, and one of 1 MiB also by what it takes beyond one of 1 KiB.
"""

from __future__ import annotations

import argparse
import contextlib
import pickle
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: the repository's root is not on the path then
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks import Row, report  # noqa: E402
from benchmarks.transfer_peers import BareMooncake, Order, over_http, over_pickle, receive, send  # noqa: E402
from triptych.errors import Unsupported  # noqa: E402
from triptych.messages import Route, Ticket, ticket_for  # noqa: E402
from triptych.transfer import Exchange, Payload, TransferSettings, encode_payload  # noqa: E402
from triptych.transfer.payload import decode_header, draft_payload, encode_header  # noqa: E402

ROUNDS, WARM = 21, 3
KIB, MIB = 2**10, 2**20
SIZES = (KIB, MIB, 64 * MIB)
WARM_SEND = 32
"""small handoffs before each measured one of 1 KiB: it is the way that is measured, not cold caches"""
MESSAGES_LIMIT = 5.0
Handoff = Callable[[torch.Tensor], Any]


def exchanges() -> dict[str, Exchange]:
    """An exchange for each route that works here, each forced to it."""
    found: dict[str, Exchange] = {}
    routes: tuple[Route, ...] = ("memfd", "tcp", "mooncake")
    for route in routes:
        with contextlib.suppress(Unsupported):
            mooncake = route == "mooncake"
            found[route] = Exchange(TransferSettings(pool_bytes=160 * MIB, routes=(route,), mooncake=mooncake))
    return found


class Producer:
    """The measured side; its consumer is a process that this file starts."""

    def __init__(self, control: socket.socket, bare: socket.socket) -> None:
        self.control, self.bare = control, bare
        self.exchanges = exchanges()
        self.handed: list[tuple[Exchange, str]] = []
        told = receive(control)
        assert told is not None, "the consumer started"
        self.http_port = told.http
        self.mooncake = BareMooncake.of(max(SIZES)) if told.mooncake else None
        self.mooncake_target = told.mooncake

    def ways(self) -> dict[str, Handoff]:
        """Every way to hand a tensor over, by name."""
        ways: dict[str, Handoff] = {route: self._by(route) for route in self.exchanges}
        ways["pickle over a socket"] = lambda tensor: over_pickle(self.control, tensor)
        ways["base64 over HTTP"] = lambda tensor: over_http(self.http_port, tensor)
        if self.mooncake is not None:
            ways["bare Mooncake"] = self._bare_mooncake
        return ways

    def _by(self, route: str) -> Handoff:
        exchange = self.exchanges[route]

        def handoff(tensor: torch.Tensor) -> None:
            descriptor = exchange.publish(Payload({"x": tensor}))
            # Whoever reads the shared pool shows no token.
            ticket = Ticket(descriptor=descriptor) if route == "memfd" else ticket_for(descriptor, exchange.secret)
            send(self.control, Order(route, ticket))
            acknowledged(self.control)
            self.handed.append((exchange, descriptor.payload))

        return handoff

    def _bare_mooncake(self, tensor: torch.Tensor) -> None:
        assert self.mooncake is not None and self.mooncake_target is not None
        session, address = self.mooncake_target
        self.mooncake.write(session, address, tensor)
        send(self.control, Order("acknowledge"))
        acknowledged(self.control)

    def let_go(self) -> None:
        """Releases what was handed over and acknowledged."""
        for exchange, payload in self.handed:
            exchange.release(payload)
        self.handed.clear()

    def message(self, tensor: torch.Tensor) -> None:
        """An order that carries those bytes and asks for nothing: what Python's sockets and msgpack take by
        themselves."""
        send(self.control, Order("nothing", data=tensor.numpy().tobytes()))
        acknowledged(self.control)

    def round_trip(self, tensor: torch.Tensor) -> None:
        """The bare Unix socket: that many bytes there, one back."""
        self.bare.sendall(tensor.numpy().view(np.uint8).data)
        acknowledged(self.bare)


def acknowledged(connection: socket.socket) -> None:
    """Waits for the other side's byte."""
    if not connection.recv(1):
        raise ConnectionError("the consumer ended")


def consume(control: socket.socket, bare: socket.socket) -> None:
    """The other process: takes whatever comes and acknowledges it."""
    from benchmarks.transfer_peers import echo, http_server

    torch.set_num_threads(1)
    doors = exchanges()
    mooncake = BareMooncake.of(max(SIZES)) if "mooncake" in doors else None
    with http_server() as port, echo(bare, KIB):
        send(control, Order("ready", http=port, mooncake=mooncake.target if mooncake else None))
        while (order := receive(control)) is not None:
            got = None
            if order.ticket is not None:
                got = doors[order.way].fetch(order.ticket)
            elif order.way == "pickle":
                torch.from_numpy(pickle.loads(order.data))
            control.sendall(b"k")
            if got is not None:
                got.close()
    for door in doors.values():
        door.close()


@contextlib.contextmanager
def producer() -> Iterator[Producer]:
    """A producer with its consumer process."""
    control, theirs = socket.socketpair()
    bare, theirs_bare = socket.socketpair()
    fds = theirs.fileno(), theirs_bare.fileno()
    command = [sys.executable, str(Path(__file__)), "--consume", *map(str, fds)]
    with subprocess.Popen(command, pass_fds=fds) as process:
        theirs.close()
        theirs_bare.close()
        made = Producer(control, bare)
        yield made
        bare.close()
        control.close()
        process.wait(30)
    for exchange in made.exchanges.values():
        exchange.close()


def timed(made: Producer, run: Handoff, tensor: torch.Tensor) -> float:
    """Seconds of one call until its acknowledgement; of small ones, of the last of some."""
    for _ in range(WARM_SEND if tensor.nbytes <= KIB else 0):
        run(tensor)
        made.let_go()
    began = time.perf_counter()
    run(tensor)
    spent = time.perf_counter() - began
    made.let_go()
    return spent


def measure(made: Producer, rounds: int) -> dict[int, dict[str, float]]:
    """Median seconds by size and way; `memcpy` and `round trip` among them."""
    medians: dict[int, dict[str, float]] = {}
    for size in SIZES:
        tensor = torch.randint(0, 255, (size,), dtype=torch.uint8)
        target = np.zeros(size, dtype=np.uint8)
        ways: dict[str, Handoff] = {"memcpy": lambda tensor, target=target: np.copyto(target, tensor.numpy())}
        if size == KIB:
            ways |= {"round trip": made.round_trip, "message": made.message}
        ways |= made.ways()
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(WARM + rounds):
            for name, run in ways.items():
                spent = timed(made, run, tensor)
                if number >= WARM:
                    seconds[name].append(spent)
        medians[size] = {name: statistics.median(all_of) for name, all_of in seconds.items()}
    return medians


def header_rows() -> list[Row]:
    """Microseconds for the header of 16 tensors: planned and encoded, decoded and checked."""
    payload = Payload({f"tensor_{number}": torch.zeros(2, 3, 16, 16) for number in range(16)})
    head, _ = encode_payload(payload)
    found = []
    for what, run in (
        ("encode", lambda: encode_header(draft_payload(payload).header())),
        ("decode", lambda: decode_header(head)),
    ):
        seconds = []
        for _ in range(ROUNDS * 10):
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
        found.append(Row.at_most(f"{what} a header of 16 tensors", 1e6 * statistics.median(seconds), 100, "µs", 1))
    return found


def rows(medians: dict[int, dict[str, float]]) -> list[Row]:
    """The figures with targets, then every way's."""

    def fraction(size: int, way: str) -> float:
        return medians[size]["memcpy"] / medians[size][way]

    large, small = 64 * MIB, medians[KIB]
    beyond = medians[MIB]["memcpy"] / (medians[MIB]["memfd"] - small["memfd"])
    found = [
        Row.at_least("same host, 64 MiB, of a memcpy", fraction(large, "memfd"), 0.45),
        Row.at_least("same host, what 1 MiB takes beyond 1 KiB, of a memcpy", beyond, 0.25),
        Row("same host, 1 MiB, of a memcpy", f"{fraction(MIB, 'memfd'):.3f}"),
        Row.at_most("same host, 1 KiB, in messages of 1 KiB", small["memfd"] / small["message"], MESSAGES_LIMIT),
        Row("same host, 1 KiB, in bare Unix-socket round trips", f"{small['memfd'] / small['round trip']:.2f}"),
        Row("a message of 1 KiB, in bare Unix-socket round trips", f"{small['message'] / small['round trip']:.2f}"),
        Row.at_least("TCP over loopback, 64 MiB, of a memcpy", fraction(large, "tcp"), 0.15),
    ]
    if "bare Mooncake" in medians[large]:
        ratio = medians[large]["bare Mooncake"] / medians[large]["tcp"]
        found.append(Row.at_least("TCP over loopback, 64 MiB, of bare Mooncake TCP without digest", ratio, 1.0))
    else:
        found.append(Row("Mooncake", "not installed here"))
    for size, ways in medians.items():
        name = f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"
        for way, seconds in ways.items():
            found.append(Row(f"{name}, {way}", f"{1000 * seconds:.3f} ms, {fraction(size, way):.3f} of a memcpy"))
    return found


def main() -> int:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--save", action="store_true", help="write results/transfer.md")
    parser.add_argument("--consume", nargs=2, type=int, metavar="FD", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.consume:
        control, bare = (socket.socket(fileno=fd) for fd in given.consume)
        consume(control, bare)
        return 0
    with producer() as made:
        found = rows(measure(made, given.rounds))
    return report("transfer", header_rows() + found, save=given.save)


if __name__ == "__main__":
    sys.exit(main())

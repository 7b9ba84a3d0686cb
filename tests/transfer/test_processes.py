"""Unrelated processes: they hand over, die, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.transfer.peer import Peer, packed, unpacked
from triptych.errors import PayloadLost
from triptych.messages import Descriptor, ticket_for
from triptych.transfer import Exchange, Payload, TransferSettings
from triptych.transfer.local import own_folder

MIB = 2**20
SMALL: dict[str, Any] = {"pool_bytes": MIB, "budget_bytes": 64 * MIB, "stall_seconds": 20.0}
linux = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no memfd")


@pytest.mark.parametrize("route", [pytest.param("memfd", marks=linux), "tcp"])
def test_both_ways_between_two_processes(route: str) -> None:
    settings = TransferSettings(**SMALL, routes=(route,))  # pyright: ignore[reportArgumentType]
    with Peer(**SMALL, routes=[route]) as peer, Exchange(settings) as exchange:
        for size in (10, 5 * MIB):
            told = peer.ask("publish", size=size)
            ticket = ticket_for(unpacked(told["descriptor"], Descriptor), bytes.fromhex(peer.told["secret"]))
            with exchange.fetch(ticket) as got:
                assert got.route == route
                assert torch.equal(got.payload.values["x"], torch.arange(size, dtype=torch.float32))
            peer.ask("release", payload=ticket.descriptor.payload)
            descriptor = exchange.publish(Payload({"x": torch.arange(size, dtype=torch.float32)}))
            for _ in range(2):  # it writes into its input: the second time it must see the original
                answer = peer.ask("fetch", ticket=packed(ticket_for(descriptor, exchange.secret)))
                assert answer == {"good": True, "route": route}
            exchange.release(descriptor.payload)
        assert peer.ask("stats")["kept"] == 0
        assert exchange.stats().kept == 0


def mapped_pools() -> int:
    """How many mappings of pools this process has."""
    return Path("/proc/self/maps").read_text().count("triptych-pool")


@linux
def test_a_mapping_outlives_its_producer() -> None:
    """What was handed over stays readable; what comes after the death is told as lost; and nothing stays mapped."""
    with Peer(**SMALL) as peer, Exchange(TransferSettings(**SMALL)) as exchange:
        before = mapped_pools()
        secret = bytes.fromhex(peer.told["secret"])
        first, second, third = (
            ticket_for(unpacked(peer.ask("publish", size=size)["descriptor"], Descriptor), secret)
            for size in (20_000, 30_000, 9 * MIB)
        )
        with exchange.fetch(first) as got:
            assert got.route == "memfd"
            peer.kill()
            assert torch.equal(got.payload.values["x"], torch.arange(20_000, dtype=torch.float32))
            exchange.fetch(second).close()  # its segment is mapped already
            with pytest.raises(PayloadLost, match="does not answer"):
                exchange.fetch(third)
        del got
        exchange.peer_gone(peer.told["owner"])
        with pytest.raises(PayloadLost):
            exchange.fetch(second)
        assert mapped_pools() <= before
        # The dead process could not remove its socket; the next exchange that opens here does.
        (path,) = map(Path, peer.told["sockets"])
        assert path.exists()
        folder, _ = own_folder(None)
        folder.rmdir()
        assert not path.exists()
        path.parent.rmdir()


AFTERWARDS = """
import gc, sys, torch
from triptych.messages import ticket_for
from triptych.transfer import Exchange, Payload, TransferSettings

settings = TransferSettings(pool_bytes=2**20, budget_bytes=2**26, routes=(sys.argv[1],))
a, b = Exchange(settings), Exchange(settings)
sent = [torch.full((size,), 3.0) for size in (100, 3 * 2**20)]
descriptors = [a.publish(Payload({"x": one})) for one in sent]
fetched = [b.fetch(ticket_for(one, a.secret)) for one in descriptors]
views = [one.payload.values["x"] for one in fetched]
for one in descriptors:
    a.release(one.payload)
for late in (False, True):
    if late:
        b.close()
        a.close()
    fetched.pop().close()
    gc.collect()
    for view in views:  # what they hold is anybody's, but it is there, and may be written to
        view.sum().item()
        view.zero_()
print("whole")
"""


@pytest.mark.parametrize("route", ["tcp", pytest.param("memfd", marks=linux)])
def test_a_view_that_is_used_after_its_time_ends_no_process(route: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AFTERWARDS, route], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr


@linux
def test_a_killed_consumer_leaves_the_producer_whole() -> None:
    with Exchange(TransferSettings(**SMALL)) as exchange:
        descriptor = exchange.publish(Payload({"x": torch.arange(2 * MIB, dtype=torch.float32)}))
        files = len(os.listdir("/proc/self/fd"))
        for route in ("memfd", "tcp"):
            with Peer(**SMALL, routes=[route]) as peer:
                answer = peer.ask("fetch", ticket=packed(ticket_for(descriptor, exchange.secret)))
                assert answer == {"good": True, "route": route}
                peer.kill()
            exchange.peer_gone(peer.told["owner"])
        with exchange.fetch(ticket_for(descriptor, exchange.secret)) as got:
            assert torch.equal(got.payload.values["x"], torch.arange(2 * MIB, dtype=torch.float32))
        exchange.release(descriptor.payload)
        del got
        wait_for_threads()
        # One more: our own view of our own segment.
        assert len(os.listdir("/proc/self/fd")) <= files + 2


def wait_for_threads() -> None:
    ends = time.monotonic() + 30.0
    while any(thread.name == "transfer-send" for thread in threading.enumerate()):
        assert time.monotonic() < ends, "a connection's thread outlives its peer"
        time.sleep(0.01)


def test_a_stopped_producer_costs_a_time_limit_and_is_read_again_when_it_goes_on() -> None:
    settings = TransferSettings(**{**SMALL, "stall_seconds": 0.5}, routes=("tcp",))
    with Peer(**SMALL, routes=["tcp"]) as peer, Exchange(settings) as exchange:
        descriptor = unpacked(peer.ask("publish", size=1000)["descriptor"], Descriptor)
        secret = bytes.fromhex(peer.told["secret"])
        peer.process.send_signal(signal.SIGSTOP)
        with pytest.raises(PayloadLost):
            exchange.fetch(ticket_for(descriptor, secret))
        peer.process.send_signal(signal.SIGCONT)
        exchange.fetch(ticket_for(descriptor, secret)).close()

"""Peers that stop in the middle: every wait ends, and memory that a late write may hit is not used again."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch

from tests.transfer.test_exchange import mooncake_missing
from triptych.errors import PayloadLost
from triptych.messages import Address, Descriptor, ticket_for
from triptych.transfer import Exchange, Payload, TransferSettings
from triptych.transfer.counts import Credits
from triptych.transfer.mooncake import Mooncake
from triptych.transfer.shelf import Kept
from triptych.transfer.wire import NOT_PUT, PUT, Next

MIB = 2**20
SMALL: dict[str, Any] = {"pool_bytes": MIB, "budget_bytes": 16 * MIB}


class Silent:
    """Listens, takes connections and what they say, sends `first`, and then nothing."""

    def __init__(self, first: bytes = b"", hang_up: bool = False) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.at = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._held: list[socket.socket] = []
        self._first, self._hang_up = first, hang_up
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            connection.recv(4096)
            connection.sendall(self._first)
            if self._hang_up:
                connection.close()
            else:
                self._held.append(connection)

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for connection in self._held:
            connection.close()


def at(descriptor: Descriptor, where: str) -> Descriptor:
    addresses = tuple(Address(route=one.route, at=where) for one in descriptor.addresses)
    return msgspec.structs.replace(descriptor, addresses=addresses)


@pytest.fixture
def reader() -> Iterator[Exchange]:
    with Exchange(TransferSettings(**SMALL, routes=("tcp",), stall_seconds=0.3, connect_seconds=2.0)) as exchange:
        yield exchange


@pytest.mark.parametrize("part", ["nothing", "half a header", "half a body"])
@pytest.mark.parametrize("hang_up", [False, True], ids=["stalls", "hangs up"])
def test_a_peer_that_stops_costs_a_time_limit(part: str, hang_up: bool, reader: Exchange) -> None:
    from triptych.transfer.wire import ANSWER, GOOD, MAGIC

    with Exchange(TransferSettings(**SMALL, routes=("tcp",))) as a:
        descriptor = a.publish(Payload({"x": torch.ones(50_000)}))
        kept = a._shelf._kept[descriptor.payload]
        whole = ANSWER.pack(MAGIC, GOOD, descriptor.head, descriptor.body) + kept.head + bytes(kept.view)
        first = {"nothing": 0, "half a header": 40, "half a body": 100_000}[part]
        with Silent(whole[:first], hang_up) as silent:
            began = time.monotonic()
            with pytest.raises(PayloadLost, match="broke"):
                reader.fetch(ticket_for(at(descriptor, silent.at), a.secret))
            assert time.monotonic() - began < 10.0
    # A closed socket writes nothing any more: the buffer is free at once.
    assert reader.stats().quarantined == 0
    assert reader._arriving.bytes == 0 or reader._arriving._segments[0].is_empty


def test_nobody_there_is_told_at_once(reader: Exchange) -> None:
    with Exchange(TransferSettings(**SMALL, routes=("tcp",))) as a:
        descriptor = a.publish(Payload({"x": torch.ones(10)}))
    with pytest.raises(PayloadLost, match="does not answer"):
        reader.fetch(ticket_for(descriptor, a.secret))
    for where, why in (("a..b:1", "does not answer"), ("a:²", "no address")):
        with pytest.raises(PayloadLost, match=why):
            reader.fetch(ticket_for(at(descriptor, where), a.secret))


def test_an_idle_connection_that_died_is_not_the_peers_death() -> None:
    settings = TransferSettings(**SMALL, routes=("tcp",))
    with Exchange(settings) as a, Exchange(settings) as b:
        b.fetch(ticket_for(a.publish(Payload({"x": torch.ones(10)})), a.secret)).close()
        (idle,) = next(iter(b._client._idle.values()))
        idle.shutdown(socket.SHUT_RDWR)
        b.fetch(ticket_for(a.publish(Payload({"x": torch.ones(10)})), a.secret)).close()
        ends = time.monotonic() + 30.0
        while a.stats().sent != {"tcp": 2}:  # counted a moment after the last byte has left
            assert time.monotonic() < ends, a.stats()
            time.sleep(0.01)


def test_connections_are_kept_until_the_peer_is_gone() -> None:
    settings = TransferSettings(**SMALL, routes=("tcp",))
    with Exchange(settings) as a, Exchange(settings) as b:
        for _ in range(5):
            b.fetch(ticket_for(a.publish(Payload({"x": torch.ones(10)})), a.secret)).close()
        assert [len(many) for many in b._client._idle.values()] == [1]
        b.peer_gone(a.owner)
        assert not b._client._idle


def test_what_the_dead_leave_behind_is_tidied_up() -> None:
    settings = TransferSettings(**SMALL, routes=("tcp",))
    with Exchange(settings) as b:
        for _ in range(2):
            with Exchange(settings) as a:
                b.fetch(ticket_for(a.publish(Payload({"x": torch.ones(10)})), a.secret)).close()
                b.tidy()
                assert len(b._client._idle) == 1, "it lives"
        ends = time.monotonic() + 10.0
        while b._client._idle and time.monotonic() < ends:
            b.tidy()
        assert not b._client._idle


def test_release_during_a_transfer_waits_for_it() -> None:
    settings = TransferSettings(**SMALL, routes=("tcp",))
    with Exchange(settings) as a:
        descriptor = a.publish(Payload({"x": torch.ones(10)}))
        with a._shelf.lend(descriptor.payload, descriptor.generation, ticket_for(descriptor, a.secret).token) as kept:
            a.release(descriptor.payload)
            assert kept.slot is not None and not kept.slot.segment.is_empty
        assert kept.slot is None


def test_credits_bound_what_is_in_flight() -> None:
    credits = Credits(number=2, size=100, timeout=0.05)
    with credits.take("a", 60):
        with pytest.raises(PayloadLost, match="did not end"), credits.take("a", 60):
            pass
        with credits.take("a", 40), credits.take("b", 500), pytest.raises(PayloadLost), credits.take("a", 0):
            pass
    with credits.take("a", 10_000):
        pass


# Mooncake: what its engine gets wrong is done around it.


class Engine:
    """Stands for Mooncake's: its outcomes are given."""

    def __init__(self, *statuses: int) -> None:
        self.statuses, self.submitted = list(statuses), 0

    def transfer_submit_write(self, *_: Any) -> int:
        self.submitted += 1
        return self.submitted

    def transfer_check_status(self, batch: int) -> int:
        return self.statuses[min(batch, len(self.statuses)) - 1]


def engine_of(*statuses: int) -> tuple[Mooncake, Engine]:
    made, engine = object.__new__(Mooncake), Engine(*statuses)
    made._engine, made._lock, made._stall, made.protocol = engine, threading.Lock(), 0.1, "tcp"
    return made, engine


def a_kept(exchange: Exchange) -> Kept:
    descriptor = exchange.publish(Payload({"x": torch.ones(5000)}))
    return exchange._shelf._kept[descriptor.payload]


def test_a_write_that_fails_at_once_is_tried_twice_more() -> None:
    """Rejected transfers make the next good one fail."""
    with Exchange(TransferSettings(**SMALL, routes=("tcp",))) as exchange:
        kept, how = a_kept(exchange), Next("peer", "127.0.0.1:1", 4096, 5.0)
        mooncake, engine = engine_of(-1, -1, 1)
        assert mooncake.write(kept, how) == PUT and engine.submitted == 3
        mooncake, engine = engine_of(-1)
        assert mooncake.write(kept, how) == NOT_PUT and engine.submitted == 3


def test_a_late_write_leaves_both_buffers_in_quarantine() -> None:
    """Its time limit does not stop it: it may land after the buffer was given to another payload."""
    if reason := mooncake_missing():
        pytest.skip(reason)
    settings = TransferSettings(**SMALL, routes=("mooncake",), mooncake=True, stall_seconds=0.1)
    with Exchange(settings) as a, Exchange(settings) as b:
        assert a._mooncake is not None and a.stats().mooncake == "tcp"
        descriptor = a.publish(Payload({"x": torch.ones(5000)}))
        real, a._mooncake._engine = a._mooncake._engine, Engine(0)
        with pytest.raises(PayloadLost, match="not over in"):
            b.fetch(ticket_for(descriptor, a.secret))
        a._mooncake._engine = real
        wait_for(lambda: a.stats().quarantined == 1)
        assert b.stats().quarantined == 1
        a.release(descriptor.payload)
        b.fetch(ticket_for(a.publish(Payload({"x": torch.zeros(5000)})), a.secret)).close()
        assert a.stats().quarantined == b.stats().quarantined == 1
        a.peer_gone(b.owner)
        b.peer_gone(a.owner)
        assert a.stats().quarantined == b.stats().quarantined == 0
        assert b._arriving._segments[0].is_empty


def test_a_failed_mooncake_write_goes_over_tcp() -> None:
    if reason := mooncake_missing():
        pytest.skip(reason)
    settings = TransferSettings(**SMALL, routes=("mooncake", "tcp"), mooncake=True)
    with Exchange(settings) as a, Exchange(settings) as b:
        assert a._mooncake is not None
        descriptor = a.publish(Payload({"x": torch.ones(5000)}))
        real, a._mooncake._engine = a._mooncake._engine, Engine(-1)
        with b.fetch(ticket_for(descriptor, a.secret)) as got:
            assert got.route == "tcp" and (got.payload.values["x"] == 1).all()
        a._mooncake._engine = real
        with b.fetch(ticket_for(a.publish(Payload({"x": torch.ones(5000)})), a.secret)) as got:
            assert got.route == "mooncake"


def wait_for(condition: Any) -> None:
    ends = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.005)

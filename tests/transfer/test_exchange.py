"""Every route hands over what was published, to whoever has a ticket and to nobody else, and keeps the original."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from triptych.errors import Damaged, InvalidRequest, NotEnoughMemory, PayloadLost, Unsupported, WrongPayload
from triptych.messages import Address, Ticket, ticket_for
from triptych.transfer import Exchange, Header, Neighbours, Payload, TensorHeader, TransferSettings
from triptych.transfer.mooncake import load_engine
from triptych.transfer.settings import has_memfd

MIB = 2**20
SMALL_POOL: dict[str, Any] = {"pool_bytes": MIB, "budget_bytes": 16 * MIB, "stall_seconds": 20.0}


def mooncake_missing() -> str:
    """Why Mooncake cannot run here; empty if it can."""
    try:
        load_engine()
    except Unsupported as error:
        return error.message
    return ""


ROUTES: dict[str, dict[str, Any]] = {
    "reference": {"routes": ("reference",)},
    "reference, pooled": {"routes": ("reference", "memfd")},
    "reference, heap": {"routes": ("reference", "tcp")},
    "memfd": {"routes": ("memfd",)},
    "tcp": {"routes": ("tcp",)},
    "tls": {"routes": ("tcp",), "tls": True},
    "mooncake": {"routes": ("mooncake",), "mooncake": True},
}
WIRES = ("memfd", "tcp", "tls", "mooncake")


class Pair:
    """Two exchanges of one process."""

    def __init__(self, **settings: Any) -> None:
        neighbours = Neighbours()
        self.settings = TransferSettings(**{**SMALL_POOL, **settings})
        self.a, self.b = (Exchange(self.settings, neighbours=neighbours) for _ in range(2))

    def ticket(self, payload: Payload) -> Ticket:
        return ticket_for(self.a.publish(payload), self.a.secret)

    def close(self) -> None:
        self.a.close()
        self.b.close()


@pytest.fixture
def pairs() -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def pair(route: str, **settings: Any) -> Pair:
        if "memfd" in ROUTES[route]["routes"] and not has_memfd():
            pytest.skip("this system has no memfd")
        if route == "mooncake" and (reason := mooncake_missing()):
            pytest.skip(reason)
        made.append(Pair(**{**ROUTES[route], **settings}))
        return made[-1]

    yield pair
    for one in made:
        one.close()


def every_kind() -> dict[str, Any]:
    """A value of every kind that crosses."""
    dtypes = ["float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"]
    dtypes += ["float8_e5m2fnuz", "int8", "uint8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "bool"]
    dtypes += ["complex64", "complex128"]
    values: dict[str, Any] = {
        name: torch.arange(64, dtype=torch.uint8).view(getattr(torch, name)).clone()
        for name in dtypes
        if name != "bool"
    }
    values["bool"] = torch.tensor([True, False, True])
    grid = torch.arange(24.0).view(2, 3, 4)
    values |= {"0-d": torch.tensor(2.5), "empty": torch.empty(3, 0, 2), "transposed": grid.transpose(0, 2)}
    values |= {"strided": grid[:, ::2], "expanded": torch.arange(3.0).expand(4, 3)}
    values["channels last"] = torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    values["conjugate"] = torch.tensor([1 + 2j, 3 - 1j]).conj()
    values["imaginary"] = torch.tensor([1 + 2j, 3 - 1j]).conj().imag
    values["large, transposed"] = torch.rand(300, 400).t()
    values["large, strided"] = torch.rand(400, 400)[:, ::3]
    values["gradient"] = torch.ones(3, requires_grad=True)
    values["nested"] = [1, 2.5, "three", None, (torch.ones(2), {"deep": torch.zeros(1)})]
    return values


def same(got: Any, wanted: Any) -> bool:
    if isinstance(wanted, torch.Tensor):
        wanted = wanted.detach().resolve_conj().resolve_neg()
        return (
            got.dtype == wanted.dtype
            and got.shape == wanted.shape
            and torch.equal(*(one.contiguous().view(-1).view(torch.uint8) for one in (got, wanted)))
        )
    if isinstance(wanted, list | tuple):
        return type(got) is type(wanted) and all(map(same, got, wanted))
    if isinstance(wanted, dict):
        return list(got) == list(wanted) and all(same(got[name], wanted[name]) for name in wanted)
    return type(got) is type(wanted) and got == wanted


@pytest.mark.parametrize("route", ROUTES)
def test_everything_crosses_bit_for_bit(route: str, pairs: Callable[..., Pair]) -> None:
    pair = pairs(route)
    sent = Payload(every_kind(), {"kind": ["0-d"]}, job="j", attempt=3, stage="encode")
    with pair.b.fetch(pair.ticket(sent)) as got:
        assert got.route == route.partition(",")[0].replace("tls", "tcp")
        payload = got.payload
        assert same(payload.values, sent.values)
        assert (payload.tags, payload.job, payload.attempt, payload.stage) == ({"kind": ["0-d"]}, "j", 3, "encode")
        assert payload.values["channels last"].stride() == sent.values["channels last"].stride()
        assert got.seconds > 0 and got.bytes > 0
    assert pair.b.stats().received == {got.route: 1}
    assert pair.b.stats().open == 0


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("size", [100, 3 * MIB], ids=["small", "large"])
def test_a_consumer_cannot_change_what_is_kept(route: str, size: int, pairs: Callable[..., Pair]) -> None:
    """A stage that computes in place: the next attempt, at the same time or later, sees what was published, and so
    does the next payload that lies in the same place."""
    pair = pairs(route)
    original = torch.arange(size, dtype=torch.float32) if size < MIB else torch.rand(size // 4)
    kept = original.clone()
    descriptor = pair.a.publish(Payload({"x": original}))
    first = pair.b.fetch(ticket_for(descriptor, pair.a.secret))
    first.payload.values["x"].fill_(-1.0)
    with pair.b.fetch(ticket_for(descriptor, pair.a.secret)) as second:
        assert torch.equal(second.payload.values["x"], kept)
        second.payload.values["x"].mul_(2.0)
        assert (first.payload.values["x"] == -1.0).all()
    first.close()
    with pair.b.fetch(ticket_for(descriptor, pair.a.secret)) as third:
        assert torch.equal(third.payload.values["x"], kept)
        third.payload.values["x"].zero_()
    pair.a.release(descriptor.payload)
    with pair.b.fetch(pair.ticket(Payload({"x": kept + 1}))) as fresh:
        assert torch.equal(fresh.payload.values["x"], kept + 1)


@pytest.mark.parametrize("route", ROUTES)
def test_what_was_released_is_lost(route: str, pairs: Callable[..., Pair]) -> None:
    """A reader with an old descriptor must not read what lies in the slot now."""
    pair = pairs(route)
    old = pair.ticket(Payload({"x": torch.zeros(5000)}))
    pair.a.release(old.descriptor.payload)
    pair.a.release(old.descriptor.payload)  # acknowledgements may come twice
    new = pair.ticket(Payload({"x": torch.ones(5000)}))
    with pytest.raises(PayloadLost, match=r"no longer kept|let go of"):
        pair.b.fetch(old)
    with pair.b.fetch(new) as got:
        assert (got.payload.values["x"] == 1).all()
    assert pair.b.stats().lost == 1
    assert pair.a.stats().kept == 1


@pytest.mark.parametrize("route", WIRES)
def test_a_flipped_byte_is_told_and_counted(route: str, pairs: Callable[..., Pair]) -> None:
    pair = pairs(route, corrupt_every=2)
    for values in ({"x": torch.rand(5000)}, {"x": torch.rand(MIB // 8)}, {"n": 5}):
        pair.b.fetch(pair.ticket(Payload(dict(values)))).close()
        descriptor = pair.a.publish(Payload(dict(values)))
        with pytest.raises(Damaged, match="digest does not match"):
            pair.b.fetch(ticket_for(descriptor, pair.a.secret))
        with pair.b.fetch(ticket_for(descriptor, pair.a.secret)) as again:
            assert same(again.payload.values, values)
        with pytest.raises(Damaged):
            pair.b.fetch(ticket_for(descriptor, pair.a.secret))
    assert pair.b.stats().damaged == 6
    assert pair.b.stats().open == 0


@pytest.mark.parametrize("route", ROUTES)
def test_sizes_are_refused_before_memory_is_given(route: str, pairs: Callable[..., Pair]) -> None:
    pair = pairs(route)
    descriptor = pair.a.publish(Payload({"x": torch.zeros(1000), "n": 2}))

    def too_large(header: Header) -> None:
        outline = header.outline()
        assert isinstance(outline["x"], TensorHeader) and outline["n"] == 2
        if outline["x"].shape != (10,):
            raise WrongPayload(f"shape {outline['x'].shape}", field="x")

    with pytest.raises(WrongPayload, match="x: shape"):
        pair.b.fetch(ticket_for(descriptor, pair.a.secret), check=too_large)
    with pytest.raises(WrongPayload, match="at most 3999"):
        pair.b.fetch(ticket_for(descriptor, pair.a.secret), limit=3999)
    assert pair.b.stats().arriving_bytes == 0
    pair.b.fetch(ticket_for(descriptor, pair.a.secret), limit=4096, check=lambda header: None).close()


@pytest.mark.parametrize("route", WIRES)
def test_larger_than_the_pool_still_passes(route: str, pairs: Callable[..., Pair]) -> None:
    pair = pairs(route, pool_bytes=MIB, budget_bytes=12 * MIB)
    for mib in (9, 3, 10):
        ticket = pair.ticket(Payload({"x": torch.full((mib * MIB,), mib, dtype=torch.uint8)}))
        with pair.b.fetch(ticket) as got:
            assert int(got.payload.values["x"].sum()) == mib * mib * MIB
        pair.a.release(ticket.descriptor.payload)
    assert pair.a.stats().pool_bytes <= 12 * MIB
    assert pair.b.stats().arriving_bytes <= 12 * MIB


def test_a_used_up_budget_is_told(pairs: Callable[..., Pair]) -> None:
    pair = pairs("memfd", budget_bytes=4 * MIB, reserve_seconds=0.05)
    first = pair.a.publish(Payload({"x": torch.zeros(3 * MIB, dtype=torch.uint8)}))
    with pytest.raises(NotEnoughMemory, match="no room"):
        pair.a.publish(Payload({"x": torch.zeros(2 * MIB, dtype=torch.uint8)}))
    pair.a.release(first.payload)
    pair.a.publish(Payload({"x": torch.zeros(2 * MIB, dtype=torch.uint8)}))


def test_the_best_open_route_is_taken(pairs: Callable[..., Pair]) -> None:
    neighbours = Neighbours()
    with (
        Exchange(TransferSettings(**SMALL_POOL), neighbours=neighbours) as a,
        Exchange(TransferSettings(**SMALL_POOL), neighbours=neighbours) as beside,
        Exchange(TransferSettings(**SMALL_POOL)) as same_host,
        Exchange(TransferSettings(**SMALL_POOL, routes=("tcp",))) as forced,
    ):
        descriptor = a.publish(Payload({"x": torch.ones(9)}))
        for exchange, route in ((a, "reference"), (beside, "reference"), (same_host, "memfd"), (forced, "tcp")):
            if route == "memfd" and not has_memfd():
                route = "tcp"
            with exchange.fetch(ticket_for(descriptor, a.secret)) as got:
                assert got.route == route
        elsewhere = tuple(
            Address(route=one.route, at="another-machine" + one.at) if one.route == "memfd" else one
            for one in descriptor.addresses
        )
        moved = msgspec.structs.replace(descriptor, addresses=elsewhere)
        with same_host.fetch(ticket_for(moved, a.secret)) as got:
            assert got.route == "tcp", "another machine's memory cannot be mapped"


def test_where_no_route_leads_is_said() -> None:
    with (
        Exchange(TransferSettings(**SMALL_POOL, routes=("tcp",))) as a,
        Exchange(TransferSettings(**SMALL_POOL, routes=("reference",))) as b,
    ):
        ticket = ticket_for(a.publish(Payload({"x": torch.ones(9)})), a.secret)
        with pytest.raises(PayloadLost, match="none of its routes is open here"):
            b.fetch(ticket)


@pytest.mark.parametrize("route", WIRES)
def test_many_threads_at_once(route: str, pairs: Callable[..., Pair]) -> None:
    pair = pairs(route, credits=2)
    wrong: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(8):
                sent = torch.full((20_000 + number,), float(number * 100 + turn))
                ticket = pair.ticket(Payload({"x": sent}))
                with pair.b.fetch(ticket) as got:
                    assert torch.equal(got.payload.values["x"], sent)
                    got.payload.values["x"].zero_()
                pair.a.release(ticket.descriptor.payload)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert not wrong
    assert pair.a.stats().kept == 0 and pair.b.stats().open == 0


def open_files() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}").partition(":")[0])
        except OSError:
            continue  # the listing's own
    return sorted(found)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted in /proc")
@pytest.mark.parametrize("route", ["memfd", "tcp", "tls"])
def test_a_consumer_lets_go_of_producers_that_are_gone(route: str) -> None:
    settings = TransferSettings(**{**SMALL_POOL, **ROUTES[route]})

    def fetch_from_another(b: Exchange) -> int:
        with Exchange(settings, neighbours=Neighbours()) as a:
            b.fetch(ticket_for(a.publish(Payload({"x": torch.ones(MIB)})), a.secret)).close()
        gc.collect()
        return len(open_files())

    with Exchange(settings, neighbours=Neighbours()) as b:
        counts = [fetch_from_another(b) for _ in range(6)]
    assert counts[-1] <= counts[1], counts


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted in /proc")
@pytest.mark.parametrize("route", ["reference, pooled", "memfd", "tcp", "tls"])
def test_nothing_is_left_after_close(route: str, tmp_path: Path) -> None:
    settings = TransferSettings(**{**SMALL_POOL, **ROUTES[route]})
    neighbours = Neighbours()

    def use() -> None:
        folder = tmp_path / "run"
        with (
            Exchange(settings, neighbours=neighbours, folder=folder) as a,
            Exchange(settings, neighbours=neighbours, folder=folder) as b,
        ):
            for size in (10, MIB):
                descriptor = a.publish(Payload({"x": torch.ones(size)}))
                b.fetch(ticket_for(descriptor, a.secret)).close()
        gc.collect()
        assert not folder.exists()

    use()
    files, threads = open_files(), threading.active_count()
    maps = Path("/proc/self/maps").read_text().count("triptych-pool")
    for _ in range(3):
        use()
    assert open_files() == files
    assert threading.active_count() == threads
    assert Path("/proc/self/maps").read_text().count("triptych-pool") == maps == 0


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"budget_bytes": 2**60}, "transfer.budget_bytes"),
        ({"pool_bytes": 2**40, "budget_bytes": MIB}, "transfer.budget_bytes"),
        ({"pool_bytes": 0}, "transfer.pool_bytes"),
        ({"routes": ("pigeon",)}, "transfer.routes"),
        ({"routes": ()}, "transfer.routes"),
        ({"routes": ("mooncake",)}, "transfer.mooncake"),
        ({"host": "0.0.0.0"}, "transfer.host"),
        ({"port": 70000}, "transfer.port"),
        ({"stall_seconds": 0.0}, "transfer.stall_seconds"),
        ({"connect_seconds": 1e12}, "transfer.connect_seconds"),
        ({"host": "0.0.0.0", "advertise": ""}, "transfer.advertise"),
        ({"advertise": "::"}, "transfer.advertise"),
        ({"corrupt_every": 0}, "transfer.corrupt_every"),
        ({"mooncake_protocol": "nonsense"}, "transfer.mooncake_protocol"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match="allowed") as refused:
        TransferSettings(**given)
    assert refused.value.field == field


def test_a_port_in_use_is_one_clear_line() -> None:
    with Exchange(TransferSettings(**SMALL_POOL, routes=("tcp",))) as a:
        port = int(a.addresses[0].at.rpartition(":")[2])
        with pytest.raises(Unsupported, match=r"cannot listen on 127\.0\.0\.1"):
            Exchange(TransferSettings(**SMALL_POOL, routes=("tcp",), port=port))


@pytest.mark.parametrize("route", ROUTES)
def test_trimming_keeps_what_is_kept_or_held_and_everything_crosses_afterwards(
    route: str, pairs: Callable[..., Pair]
) -> None:
    pair = pairs(route)
    sent = torch.rand(3 * MIB // 4)
    ticket = pair.ticket(Payload({"x": sent}))
    with pair.b.fetch(pair.ticket(Payload({"x": sent}))) as held:
        assert pair.a.trim() == 0
        pair.b.trim()
        assert torch.equal(held.payload.values["x"], sent)
        with pair.b.fetch(ticket) as got:
            assert torch.equal(got.payload.values["x"], sent)
    for name in list(pair.a._shelf._kept):
        pair.a.release(name)
    held_bytes = pair.a.stats().pool_bytes
    freed, give_up = pair.a.trim(), time.monotonic() + 10
    while pair.a.stats().pool_bytes and time.monotonic() < give_up:  # a reader's last word may still be on its way
        time.sleep(0.02)
        freed += pair.a.trim()
    assert freed == held_bytes and pair.a.stats().pool_bytes == 0
    pair.b.trim()
    assert pair.b.stats().arriving_bytes == 0
    with pair.b.fetch(pair.ticket(Payload({"x": sent}))) as got:
        assert torch.equal(got.payload.values["x"], sent)

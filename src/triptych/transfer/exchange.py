"""A process's door to payloads: it keeps what it publishes until it is told to let go, and fetches what others keep.

The way of a payload is reserve, write, commit with a new generation, fetch, acknowledge; the last comes from the
coordinator as `release` once the consumer's own output is safe.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from triptych.errors import Damaged, PayloadLost
from triptych.messages import Address, Descriptor, Route, Ticket
from triptych.transfer.arrival import Arrival, Check, Fetched
from triptych.transfer.client import DataClient, Session
from triptych.transfer.counts import Counts, Credits, ExchangeStats
from triptych.transfer.local import SegmentReader, Segments, SegmentServer, boot_id, own_folder, place_of
from triptych.transfer.mooncake import Mooncake
from triptych.transfer.neighbours import Neighbour, Neighbours
from triptych.transfer.payload import Payload, draft_payload
from triptych.transfer.pool import LABEL, MAGIC, Pool
from triptych.transfer.server import DataServer, Told
from triptych.transfer.settings import TransferSettings
from triptych.transfer.shelf import Kept, Shelf
from triptych.transfer.wire import LATE, Next, Unreachable
from triptych.transfer.writing import HEAD_START, body_start, commit

NEAR = 2**20
"""A body of at most so many bytes is sooner fetched than another thread is told to."""
COPIED = 2**15
"""A body of at most so many bytes is copied sooner than its pages are watched."""
Landed = tuple[Payload, Route, Callable[[], None]]
"""A payload, how it came, and how its memory is given back."""


class Exchange:
    """Keeps payloads for others and fetches theirs. Any thread may call anything.

    `owner` names it, tickets for its payloads are made with `secret`, `addresses` say how it is reached. `folder` is a
    0700 folder for its Unix socket, made if it is not there; None: one of its own, removed on close. `neighbours` are
    the exchanges of the same process that share it. Raises Unsupported for what this system lacks.
    """

    def __init__(
        self,
        settings: TransferSettings | None = None,
        *,
        folder: Path | None = None,
        neighbours: Neighbours | None = None,
    ) -> None:
        self.settings = settings = settings or TransferSettings()
        self.owner = secrets.token_hex(8)
        self.secret = secrets.token_bytes(32)
        self._routes = settings.open_routes
        self._counts = Counts()
        self._credits = Credits(settings.credits, settings.credit_bytes, settings.reserve_seconds)
        self._numbers = itertools.count(1)
        self._neighbours = neighbours or Neighbours()
        self._boot = boot_id()
        with contextlib.ExitStack() as stack:
            self._open(folder, stack)
            self._stack = stack.pop_all()

    def _open(self, folder: Path | None, stack: contextlib.ExitStack) -> None:
        settings = self.settings
        self._mooncake = Mooncake(settings) if "mooncake" in self._routes else None
        if (mooncake := self._mooncake) is not None:
            stack.callback(mooncake.close)
        sizes = settings.pool_bytes, settings.budget_bytes
        made, dropped = (None, None) if mooncake is None else (mooncake.register, mooncake.unregister)
        self._pool = Pool(*sizes, shared="memfd" in self._routes, made=made, dropped=dropped)
        self._arriving = Pool(*sizes, shared=False, made=made, dropped=dropped)
        self._shelf = Shelf(self._pool, self.secret)
        session = None if mooncake is None else Session(mooncake.session, mooncake.seconds)
        self._client = DataClient(settings, self._arriving, self.owner, session)
        for close in (self._arriving.close, self._pool.close, self._shelf.clear, self._client.close):
            stack.callback(close)
        addresses = [Address(route="reference", at=self._neighbours.token)] if "reference" in self._routes else []
        self._neighbours.add(self.owner, Neighbour(self._shelf, self._pool))
        stack.callback(self._neighbours.remove, self.owner)
        self._socket = ""
        self._reader = SegmentReader(settings.connect_seconds) if "memfd" in self._routes else None
        if self._reader is not None:
            stack.callback(self._reader.close)
            self._socket = self._serve_segments(folder, stack)
            addresses.append(Address(route="memfd", at=self._socket))
        if {"tcp", "mooncake"} & set(self._routes):
            told = Told(self._counts.on_sent, self._counts.on_refused)
            server = DataServer(settings, self._shelf, told, self._write_by_mooncake if mooncake else None)
            stack.callback(server.close)
            addresses += [
                Address(route=route, at=server.address) for route in ("mooncake", "tcp") if route in self._routes
            ]
        self.addresses = tuple(addresses)

    def _serve_segments(self, folder: Path | None, stack: contextlib.ExitStack) -> str:
        place, made = own_folder(folder)
        if made:
            stack.callback(_remove, place)
        server = SegmentServer(self._pool, place, self.owner)
        stack.callback(server.close)
        return f"{self._boot}:{server.path}"

    def publish(self, payload: Payload) -> Descriptor:
        """Keeps a payload for whoever has a ticket. Its bytes are copied, unless nothing but references is served:
        then its tensors must stay as they are.

        Raises WrongPayload for what cannot cross, NotEnoughMemory if the pool's budget is used up and nothing is
        released in time.
        """
        draft = draft_payload(payload)
        number = next(self._numbers)
        name = f"{self.owner}-{number}"
        if self._routes == ("reference",):
            kept = Kept(name, number, body=draft.body, draft=draft)
        else:
            kept = commit(draft, self._pool, name, number, self.settings.reserve_seconds)
        self._shelf.put(kept)
        return Descriptor(
            payload=name,
            generation=number,
            head=len(kept.head),
            body=kept.body,
            owner=self.owner,
            addresses=self._addresses_of(kept),
        )

    def _addresses_of(self, kept: Kept) -> tuple[Address, ...]:
        slot = kept.slot
        if slot is None or not self._socket:
            return self.addresses
        at = f"{self._socket}#{slot.segment.index}:{slot.start}:{slot.taken}"
        return tuple(Address(route="memfd", at=at) if one.route == "memfd" else one for one in self.addresses)

    def fetch(self, ticket: Ticket, *, limit: int | None = None, check: Check | None = None) -> Fetched:
        """The payload that a ticket is for, by the best route that leads there. `limit`: bytes of body that are
        allowed. `check` gets the header and raises to refuse it; both before memory is given.

        Raises PayloadLost if it cannot be had, Damaged for a digest that does not match, WrongPayload for what is
        refused, NotEnoughMemory if no room comes in time.
        """
        began = time.perf_counter()
        descriptor = ticket.descriptor
        try:
            payload, route, give_back = self._land(ticket, limit, check)
        except Damaged:
            self._counts.on_damaged()
            raise
        except PayloadLost:
            self._counts.on_lost()
            raise
        self._counts.on_received(route, descriptor.body)
        return Fetched(payload, route, time.perf_counter() - began, descriptor.body, self._closing(give_back))

    def is_near(self, descriptor: Descriptor) -> bool:
        """Whether fetching takes but a moment: it is this exchange's own, or not large and in memory that is mapped."""
        if descriptor.owner == self.owner:
            return True
        if self._reader is None or descriptor.body > NEAR:
            return False
        return any(
            address.route == "memfd" and self._leads_there(address) and self._reader.knows(descriptor.owner, address.at)
            for address in descriptor.addresses
        )

    def _closing(self, give_back: Callable[[], None]) -> Callable[[], None]:
        def close() -> None:
            give_back()
            self._counts.on_closed()

        return close

    def _land(self, ticket: Ticket, limit: int | None, check: Check | None) -> Landed:
        reasons = []
        for route in self._routes:
            for address in ticket.descriptor.addresses:
                if address.route != route or not self._leads_there(address):
                    continue
                arrival = Arrival(ticket.descriptor, limit, check, self._spoils(route))
                try:
                    return self._land_by(address, ticket, arrival)
                except Unreachable as error:
                    reasons.append(f"{route}: {error.message}")
        why = "; ".join(reasons) or f"none of its routes is open here ({', '.join(self._routes)})"
        raise PayloadLost(f"payload {ticket.descriptor.payload} cannot be reached: {why}")

    def _leads_there(self, address: Address) -> bool:
        if address.route == "reference":
            return address.at == self._neighbours.token
        return address.route != "memfd" or (bool(self._boot) and address.at.startswith(f"{self._boot}:"))

    def _spoils(self, route: Route) -> bool:
        every = self.settings.corrupt_every
        return every is not None and route != "reference" and self._counts.next_arrival() % every == 0

    def _land_by(self, address: Address, ticket: Ticket, arrival: Arrival) -> Landed:
        if address.route == "reference":
            return self._by_reference(ticket.descriptor, arrival)
        if address.route == "memfd":
            return self._by_memfd(address.at, arrival)
        descriptor = ticket.descriptor
        with self._credits.take(descriptor.owner, descriptor.body):
            arrived = self._client.fetch(ticket, address.at, arrival.look, mooncake=address.route == "mooncake")
        try:
            payload = arrival.fill(arrived.slot.view.data[: descriptor.body])
        except BaseException:
            self._arriving.free(arrived.slot)
            raise
        route: Route = "mooncake" if arrived.by_mooncake else "tcp"
        return payload, route, lambda: self._arriving.free(arrived.slot)

    def _by_reference(self, descriptor: Descriptor, arrival: Arrival) -> Landed:
        neighbour = self._neighbours.find(descriptor.owner)
        if neighbour is None:
            raise Unreachable(f"{descriptor.owner} is closed")
        with neighbour.shelf.pin(descriptor.payload, descriptor.generation) as kept:
            if kept.draft is not None:
                arrival.approve(kept.draft.header())
                return kept.draft.copy(), "reference", _nothing
            arrival.look(kept.head)
            if self._reader is None or kept.slot is None or kept.slot.segment.fd is None:
                return arrival.fill(memoryview(bytearray(kept.view))), "reference", _nothing
            slot = kept.slot

            def segments(index: int) -> Segments:
                found = neighbour.pool.segment(index)
                if found is None:
                    raise PayloadLost(f"segment {index} is gone")
                return *found, neighbour.pool.live()

            place = slot.segment.index, slot.start, slot.taken
            payload, give_back = self._read(arrival, self._reader, place, segments)
            return payload, "reference", give_back

    def _by_memfd(self, at: str, arrival: Arrival) -> Landed:
        reader = self._reader
        assert reader is not None, "the memfd route is open only with a reader"
        path, index, start, size = place_of(at)
        payload, give_back = self._read(arrival, reader, (index, start, size), lambda index: reader.ask(path, index))
        return payload, "memfd", give_back

    def _read(
        self, arrival: Arrival, reader: SegmentReader, place: tuple[int, int, int], ask: Callable[[int], Segments]
    ) -> tuple[Payload, Callable[[], None]]:
        """Reads a payload where it lies."""
        descriptor = arrival.descriptor
        start = body_start(descriptor.head, descriptor.body)
        end = start + descriptor.body
        if end > place[2]:
            raise PayloadLost(f"payload {descriptor.payload} is larger than its place")
        if descriptor.body <= COPIED:
            copied = reader.copy(descriptor.owner, *place, end, ask)
            if copied is not None:
                _require_label(copied, descriptor)
                arrival.look(bytes(copied[HEAD_START : HEAD_START + descriptor.head]))
                return arrival.fill(memoryview(copied)[start:end]), _nothing
        borrowed = reader.borrow(descriptor.owner, *place, ask)
        data = borrowed.bytes.data
        try:
            _require_label(data, descriptor)
            arrival.look(bytes(data[HEAD_START : HEAD_START + descriptor.head]))
            try:
                payload = arrival.fill(data[start:end])
            finally:
                # Whatever was read is worth nothing if the slot was given away meanwhile.
                _require_label(data, descriptor)
        except BaseException:
            reader.give_back(borrowed)
            raise
        return payload, lambda: reader.give_back(borrowed)

    def _write_by_mooncake(self, kept: Kept, how: Next) -> int:
        assert self._mooncake is not None, "the mooncake route is open only with an engine"
        outcome = self._mooncake.write(kept, how)
        if outcome == LATE:
            self._shelf.hold(kept, how.owner)
        return outcome

    def release(self, payload: str) -> None:
        """Its consumer's output is safe: its memory may be used again. Unknown names are ignored."""
        self._shelf.release(payload)

    def peer_gone(self, owner: str) -> None:
        """That exchange is dead: its connections close, its pool is unmapped, and buffers that it might still have
        written to or read from come back."""
        self._client.peer_gone(owner)
        self._shelf.peer_gone(owner)
        if self._reader is not None:
            self._reader.peer_gone(owner)

    def tidy(self) -> None:
        """Lets go of what those left behind that died unnoticed: to be called now and then."""
        self._client.tidy()

    def trim(self) -> int:
        """Gives up memory in which no payload lies; returns its bytes. Mappings of others' memory go, too, so that what
        they give up is free."""
        if self._reader is not None:
            self._reader.trim()
        return self._pool.trim() + self._arriving.trim()

    def reserved(self) -> tuple[int, int]:
        """How often memory for a payload was found in the pools, and how often it had to be made."""
        kept, arriving = self._pool.reserved, self._arriving.reserved
        return kept[0] + arriving[0], kept[1] + arriving[1]

    def stats(self) -> ExchangeStats:
        """What it holds and has done."""
        counts = self._counts
        kept, kept_bytes, held = self._shelf.count()
        return ExchangeStats(
            kept=kept,
            kept_bytes=kept_bytes,
            pool_bytes=self._pool.bytes,
            arriving_bytes=self._arriving.bytes,
            open=counts.open,
            sent=dict(counts.sent),
            sent_bytes=dict(counts.sent_bytes),
            received=dict(counts.received),
            received_bytes=dict(counts.received_bytes),
            damaged=counts.damaged,
            lost=counts.lost,
            refused=counts.refused,
            quarantined=held + self._client.quarantined,
            mooncake=None if self._mooncake is None else self._mooncake.protocol,
        )

    def close(self) -> None:
        """Lets go of everything: connections, threads, files, memory that no view uses any more."""
        self._stack.close()

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _require_label(data: bytearray | memoryview, descriptor: Descriptor) -> None:
    label = LABEL.unpack_from(data)
    if label != (MAGIC, descriptor.generation, descriptor.head, descriptor.body):
        raise PayloadLost(f"payload {descriptor.payload} was let go of: its place holds generation {label[1]}")


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def _nothing() -> None:
    """There is nothing to give back."""

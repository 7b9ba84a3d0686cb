"""The side that fetches over a data connection: into pooled memory, after the header has been looked at."""

from __future__ import annotations

import contextlib
import itertools
import selectors
import socket
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from triptych.errors import PayloadLost
from triptych.messages import Ticket
from triptych.transfer.pool import Pool, Slot
from triptych.transfer.settings import TransferSettings
from triptych.transfer.wire import (
    ANSWER,
    GOOD,
    LATE,
    LOST,
    MAGIC,
    PUT,
    Ask,
    Interrupted,
    Next,
    client_connection,
    receive_exactly,
    receive_into,
    send_message,
)

Look = Callable[[bytes], None]
"""Looks at a header before anything is allocated; raises to refuse it."""


@dataclass(frozen=True)
class Session:
    """Our side of a Mooncake write: its name for peers, and how long one may take for so many bytes."""

    name: str
    seconds: Callable[[int], float]


@dataclass(frozen=True)
class Arrived:
    """A body in a slot of the arriving pool."""

    head: bytes
    slot: Slot
    by_mooncake: bool


class DataClient:
    """Fetches over data connections, which are kept for the next time. Any thread may call."""

    def __init__(self, settings: TransferSettings, pool: Pool, owner: str, session: Session | None) -> None:
        self._settings, self._pool, self._owner, self._session = settings, pool, owner, session
        self._idle: OrderedDict[tuple[str, str], list[socket.socket]] = OrderedDict()
        self._quarantine: dict[str, list[Slot]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def fetch(self, ticket: Ticket, at: str, look: Look, *, mooncake: bool) -> Arrived:
        """The payload's header and body. Raises Unreachable before anything was said, PayloadLost, NotEnoughMemory,
        and what `look` raises."""
        peer = ticket.descriptor.owner, at
        connection, used = self._connection(peer)
        try:
            try:
                head = self._ask(connection, ticket, body=not mooncake)
            except (ConnectionError, TimeoutError):
                if not used:
                    raise
                # The peer may have closed an idle connection: that says nothing of the peer itself.
                connection.close()
                connection = self._new(at)
                head = self._ask(connection, ticket, body=not mooncake)
            look(head)
            arrived = self._body(connection, ticket, head, mooncake)
        except (OSError, struct.error) as error:
            connection.close()
            raise Interrupted(f"the connection to {at.partition('#')[0]} broke ({error})") from None
        except BaseException:
            connection.close()
            raise
        self._keep(peer, connection)
        return arrived

    def _ask(self, connection: socket.socket, ticket: Ticket, *, body: bool) -> bytes:
        descriptor = ticket.descriptor
        send_message(connection, Ask(descriptor.payload, descriptor.generation, ticket.token, body))
        magic, status, head, size = ANSWER.unpack(receive_exactly(connection, ANSWER.size))
        if magic != MAGIC or status not in (GOOD, LOST):
            raise PayloadLost("the other side speaks something else")
        if status == LOST:
            raise PayloadLost(f"payload {descriptor.payload} is no longer kept")
        if (head, size) != (descriptor.head, descriptor.body):
            raise PayloadLost(f"payload {descriptor.payload} is not of the size that was announced")
        return receive_exactly(connection, head)

    def _body(self, connection: socket.socket, ticket: Ticket, head: bytes, mooncake: bool) -> Arrived:
        size = ticket.descriptor.body
        slot = self._pool.reserve(size, self._settings.reserve_seconds)
        try:
            if mooncake and size and self._put(connection, ticket, slot):
                return Arrived(head, slot, True)
            if mooncake and size and "tcp" not in self._settings.open_routes:
                raise Interrupted(f"Mooncake could not write {size} bytes into {self._session and self._session.name}")
            if mooncake:
                send_message(connection, Next(self._owner))
            view = slot.view.data
            if size and not receive_into(connection, view):
                raise ConnectionError("the connection ended before the body")
        except _Late as late:
            with self._lock:
                self._quarantine.setdefault(ticket.descriptor.owner, []).append(slot)
            raise Interrupted(str(late)) from None
        except BaseException:
            self._pool.free(slot)
            raise
        return Arrived(head, slot, False)

    def _put(self, connection: socket.socket, ticket: Ticket, slot: Slot) -> bool:
        """Has the peer write into the slot; False if it could not. Raises _Late where it may still do so."""
        assert self._session is not None, "the mooncake route is open only with a session"
        seconds = self._session.seconds(slot.size)
        send_message(connection, Next(self._owner, self._session.name, slot.address, seconds))
        connection.settimeout(seconds + self._settings.stall_seconds)
        try:
            outcome = receive_exactly(connection, 1)[0]
        except OSError as error:
            raise _Late(f"the connection broke during a Mooncake write ({error})") from None
        connection.settimeout(self._settings.stall_seconds)
        if outcome == LATE:
            raise _Late(f"a Mooncake write of {slot.size} bytes was not over in {seconds:.1f} s")
        return outcome == PUT

    def _connection(self, peer: tuple[str, str]) -> tuple[socket.socket, bool]:
        with self._lock:
            if idle := self._idle.get(peer):
                return idle.pop(), True
        return self._new(peer[1]), False

    def _new(self, at: str) -> socket.socket:
        return client_connection(at, self._settings.connect_seconds, self._settings.stall_seconds)

    def _keep(self, peer: tuple[str, str], connection: socket.socket) -> None:
        dropped = []
        with self._lock:
            dropped += self._hung_up()
            if self._closed:
                dropped.append(connection)
            else:
                self._idle.setdefault(peer, []).append(connection)
                self._idle.move_to_end(peer)
            while sum(map(len, self._idle.values())) > self._settings.max_connections:
                dropped += self._idle.popitem(last=False)[1]
        for one in dropped:
            one.close()

    def _hung_up(self) -> list[socket.socket]:
        """Takes out the idle connections that their peers have closed, as the dead do: on others nothing comes."""
        with selectors.DefaultSelector() as selector:
            for one in itertools.chain.from_iterable(self._idle.values()):
                selector.register(one, selectors.EVENT_READ)
            closed = {key.fileobj for key, _ in selector.select(0)}
        found: list[socket.socket] = []
        for peer, many in list(self._idle.items()):
            found += (one for one in many if one in closed)
            many[:] = (one for one in many if one not in closed)
            if not many:
                del self._idle[peer]
        return found

    @property
    def quarantined(self) -> int:
        """Slots that a late write may still hit."""
        with self._lock:
            return sum(map(len, self._quarantine.values()))

    def tidy(self) -> None:
        """Closes the idle connections of those that have died and of whom nobody told."""
        with self._lock:
            dropped = self._hung_up()
        for one in dropped:
            one.close()

    def peer_gone(self, owner: str) -> None:
        """Closes its connections and takes its slots back."""
        with self._lock:
            gone = [self._idle.pop(peer) for peer in list(self._idle) if peer[0] == owner]
            slots = self._quarantine.pop(owner, [])
        for connection in (one for many in gone for one in many):
            connection.close()
        for slot in slots:
            self._pool.free(slot)

    def close(self) -> None:
        """Hangs up."""
        with self._lock:
            self._closed = True
            owners = {owner for owner, _ in self._idle}
        for owner in owners:
            with contextlib.suppress(OSError):
                self.peer_gone(owner)


class _Late(Exception):
    """A write that was given up and may still land."""

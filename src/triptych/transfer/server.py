"""The side that sends: data connections, each thread of which serves one peer from the pool's memory."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from triptych.errors import PayloadLost, Unsupported
from triptych.messages import Route
from triptych.transfer.settings import TransferSettings
from triptych.transfer.shelf import BadTicket, Kept, Shelf
from triptych.transfer.wire import (
    ANSWER,
    GOOD,
    LATE,
    LOST,
    MAGIC,
    NOT_PUT,
    PUT,
    Ask,
    Next,
    join_address,
    receive_message,
    send_view,
    server_context,
    tune,
)

logger = logging.getLogger(__name__)

IDLE_SECONDS = 300.0
"""how long a connection may ask for nothing before it is closed"""
PAUSE_SECONDS = 0.1
Write = Callable[[Kept, Next], int]
"""Writes a body into a peer's memory and says how it went."""


@dataclass(frozen=True)
class Told:
    """What the server tells of its work: a body sent (route and bytes), a connection refused."""

    sent: Callable[[Route, int], None]
    refused: Callable[[], None]


class DataServer:
    """Sends kept payloads to whoever shows a ticket's token, once per ticket. A connection without a good one is
    dropped without an answer."""

    def __init__(self, settings: TransferSettings, shelf: Shelf, told: Told, write: Write | None) -> None:
        self._settings, self._shelf, self._told, self._write = settings, shelf, told, write
        self._context: ssl.SSLContext | None = None
        fingerprint = ""
        if settings.tls:
            self._context, fingerprint = server_context()
        self._socket = _listen(settings)
        port = self._socket.getsockname()[1]
        self.address = join_address(settings.advertise or settings.host, port, fingerprint)
        self._connections: set[socket.socket] = set()
        self._idle: dict[socket.socket, None] = {}
        """those that were served and now ask for nothing, the longest so first"""
        self._threads: set[threading.Thread] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._accepting = threading.Thread(target=self._accept, name="transfer-accept", daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._socket.accept()
            except TimeoutError:
                continue
            except OSError as error:
                if not self._closed:  # this process may be short of descriptors, or the peer has left already
                    logger.warning("a data connection could not be taken: %s", error)
                    time.sleep(PAUSE_SECONDS)
                continue
            with self._lock:
                if self._closed or (self._is_full() and not self._make_room()):
                    connection.close()
                    continue
                self._connections.add(connection)
                thread = threading.Thread(target=self._serve, args=(connection,), name="transfer-send", daemon=True)
                self._threads.add(thread)
                thread.start()

    def _is_full(self) -> bool:
        return len(self._connections) >= self._settings.max_connections

    def _make_room(self) -> bool:
        """Hangs up on who has asked for nothing for longest; False if all are busy, or have yet to show a ticket."""
        for connection in self._idle:
            del self._idle[connection]
            self._connections.discard(connection)
            _shut(connection)
            return True
        return False

    def _serve(self, raw: socket.socket) -> None:
        connection = raw
        try:
            tune(raw, self._settings.connect_seconds)
            if self._context is not None:
                connection = self._context.wrap_socket(raw, server_side=True)
                self._replace(raw, connection)
            while (ask := receive_message(connection, Ask)) is not None:
                connection.settimeout(self._settings.stall_seconds)
                with self._lock:
                    self._idle.pop(connection, None)
                self._answer(connection, ask)
                connection.settimeout(IDLE_SECONDS)
                with self._lock:
                    self._idle[connection] = None
        except (BadTicket, msgspec.DecodeError):
            self._told.refused()
        except OSError:
            pass  # the peer left or stalled; it knows, and its ticket is used up
        finally:
            connection.close()
            with self._lock:
                self._connections.discard(connection)
                self._idle.pop(connection, None)
                self._threads.discard(threading.current_thread())

    def _replace(self, raw: socket.socket, wrapped: socket.socket) -> None:
        with self._lock:
            self._connections.discard(raw)
            self._connections.add(wrapped)
            if self._closed:
                raise ConnectionError("closing")

    def _answer(self, connection: socket.socket, ask: Ask) -> None:
        try:
            with self._shelf.lend(ask.payload, ask.generation, ask.token) as kept:
                if kept.slot is None:
                    raise PayloadLost("it lies in no pool")
                connection.sendall(ANSWER.pack(MAGIC, GOOD, len(kept.head), kept.body) + kept.head)
                if ask.body:
                    self._send(connection, kept)
                else:
                    self._send_as_told(connection, kept)
        except BadTicket:
            raise
        except PayloadLost:
            connection.sendall(ANSWER.pack(MAGIC, LOST, 0, 0))

    def _send(self, connection: socket.socket, kept: Kept) -> None:
        send_view(connection, kept.view)
        self._told.sent("tcp", kept.body)

    def _send_as_told(self, connection: socket.socket, kept: Kept) -> None:
        """Writes the body where the peer wants it; after a failed write it may still ask for it here."""
        while (how := receive_message(connection, Next)) is not None:
            if not how.session:
                return self._send(connection, kept)
            outcome = NOT_PUT if self._write is None else self._write(kept, how)
            connection.sendall(bytes([outcome]))
            if outcome == PUT:
                return self._told.sent("mooncake", kept.body)
            if outcome == LATE:
                break
        raise ConnectionError("the peer gave up")

    def close(self) -> None:
        """Stops listening and hangs up on everybody."""
        with self._lock:
            self._closed = True
            connections, threads = list(self._connections), list(self._threads)
        for one in [self._socket, *connections]:
            _shut(one)
        self._accepting.join(5.0)
        for thread in threads:
            thread.join(5.0)
        self._socket.close()


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        # Not the encrypted socket's own, which would let a thread that is sending go on in plain text.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _listen(settings: TransferSettings) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listening = socket.create_server((settings.host, settings.port), family=family, backlog=128)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        raise Unsupported(f"cannot listen on {where} ({error.strerror or error})", field="transfer.host") from None
    listening.settimeout(1.0)  # where closing does not wake accept, this does
    return listening

"""The coordinator's ends of its workers' lines: one thread that listens, hears, sends, and drives the clock."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol

import msgspec
import zmq

from triptych.cluster.jobs import Link
from triptych.cluster.lines.doors import Door
from triptych.cluster.lines.endpoints import open_door
from triptych.cluster.lines.keys import AllowList, ServerKeys
from triptych.cluster.lines.zap import Gate
from triptych.line import MAX_MESSAGE, MAX_QUEUED, BadFrame, Line, aside, first_body
from triptych.messages import PROTOCOL, FromWorker, Hello, Refused, ToWorker, decode_from_worker, encode, protocol_of
from triptych.sockets import SharedSockets, ZmqSource

__all__ = ["Listener"]

MAX_QUEUED_BYTES = 2 * MAX_MESSAGE
MAX_LINKS = 4096
STOPPED_SECONDS = 2.0
STUMBLED_SECONDS = 0.1
MANY = 64  # messages heard that an acknowledgement waits for no longer

_log = logging.getLogger(__name__)


class Hears(Protocol):
    """What a listener needs of a coordinator. Called on the listener's thread only."""

    def hello(self, hello: Hello, link: Link) -> None: ...
    def hear(self, incarnation: str, message: FromWorker) -> None: ...
    def left(self, incarnation: str, reason: str) -> None: ...
    def tick(self) -> None: ...


class NetworkLink:
    """A line to one worker over a listener's socket. See `Link`."""

    def __init__(self, door: Door, incarnation: str, user: str, queue: Callable[[NetworkLink, bytes | None], None]):
        self.door = door
        self.incarnation = incarnation
        self.user = user
        """the public key it came with; empty on a Unix socket"""
        self.line = Line()
        self.waiting = 0
        """messages handed over that the listener's thread has not taken up"""
        self.waiting_bytes = 0
        self.unanswered = False
        """something came since the last tick; silence would tell the worker that nobody is here"""
        self.broken = ""
        """why it has to be hung up"""
        self.closed = False
        self._queue = queue

    def send(self, message: ToWorker) -> None:
        """Sends, in order, from any thread; a worker that does not take what it is sent is hung up."""
        if self.broken or self.closed:
            return
        body = encode(message)
        if len(body) > MAX_MESSAGE:
            self.broken = f"a message of {len(body)} bytes; at most {MAX_MESSAGE} are sent"
        elif (
            self.waiting + self.line.kept >= MAX_QUEUED or self.waiting_bytes + self.line.kept_bytes > MAX_QUEUED_BYTES
        ):
            self.broken = "it does not take what it is sent"
        self._queue(self, body)

    def close(self) -> None:
        """Hangs up when everything sent before is on its way."""
        self._queue(self, None)


class Listener:
    """Listens for workers from construction until `close`, and calls `coordinator.tick()` every `tick_seconds`.

    `endpoints`: `ipc://PATH` (its folder 0700 and ours), `tcp://HOST:PORT` or `HOST:PORT` (only with keys; port 0: any
    free one). Raises InvalidRequest or Unsupported if one cannot be opened.
    """

    def __init__(
        self, coordinator: Hears, endpoints: Sequence[str], keys: ServerKeys | None = None, tick_seconds: float = 0.25
    ) -> None:
        self._coordinator = coordinator
        self._tick_seconds = tick_seconds
        self._context = zmq.Context()
        self._allowed = AllowList(keys.clients) if keys is not None else None
        self._gate = Gate(self._context, self._allowed) if self._allowed is not None else None
        self._doors: list[Door] = []
        self._links: dict[str, NetworkLink] = {}
        self._lock = threading.Lock()
        self._outgoing: deque[tuple[NetworkLink, bytes | None]] = deque()
        self._shared = SharedSockets()
        self._open = True
        self._last = self._due = 0.0
        try:
            for endpoint in endpoints:
                self._doors.append(open_door(self._context, endpoint, keys))
        except BaseException:
            self._close_sockets()
            raise
        self._shared.watch([*self._doors, *([ZmqSource(self._gate.socket)] if self._gate else [])])
        self._thread = threading.Thread(target=self._run, name="triptych-listener", daemon=True)
        self._thread.start()

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Where it listens, with the ports that were chosen."""
        return tuple(door.endpoint for door in self._doors)

    def close(self) -> None:
        """Sends what is queued, hangs up and stops listening. Closing twice is fine."""
        self._open = False
        self._shared.ring()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _run(self) -> None:
        self._last = time.monotonic()
        self._due = self._last + self._tick_seconds
        try:
            while self._open:
                try:
                    self._shared.wait(self._due - time.monotonic())
                    with self._shared.turn():
                        self._turn()
                except Exception:  # nobody would be heard any more, and no clock be driven
                    _log.exception("the listener stumbled")
                    time.sleep(STUMBLED_SECONDS)
        finally:
            with self._shared.turn():
                self._flush()
                self._close_sockets()

    def _turn(self) -> None:
        if self._gate is not None:
            self._gate.answer()
        for door in self._doors:
            for identity, user, frame in door.take():
                self._take(door, identity, user, frame)
        self._flush()
        now = time.monotonic()
        if now - self._last > STOPPED_SECONDS:  # we were stopped, not the workers silent: they are heard first
            self._due = now + STOPPED_SECONDS
        if now >= self._due:
            self._tick()
            self._due = time.monotonic() + self._tick_seconds
        self._last = now

    def _tick(self) -> None:
        if self._allowed is not None and self._gate is not None and self._allowed.refresh():
            self._gate.report()
            for link in list(self._links.values()):
                if link.user and self._allowed.name_of(link.user) is None:
                    self._hang_up(link, Refused(reason="its key is no longer on the list"))
        for link in self._links.values():
            if link.unanswered:
                link.unanswered = False
                self._put(link, link.line.idle())
        self._tell(self._coordinator.tick)
        self._flush()

    def _take(self, door: Door, identity: bytes, user: str, frame: bytes) -> None:
        incarnation = identity.decode(errors="replace")
        link = self._links.get(incarnation)
        try:
            if link is None:
                link = self._meet(door, identity, user, frame)
            if link is None:
                return
            if link.user != user:
                raise BadFrame("another key than at its Hello")
            link.door, link.unanswered = door, True
            body, replies = link.line.take(frame)
            for reply in replies or ([link.line.idle()] if link.line.owes >= MANY else []):
                self._put(link, reply)
            if body is not None:
                self._hear(link, decode_from_worker(body))
        except (BadFrame, msgspec.DecodeError) as error:
            _log.warning("dropped what %.64s sent: %s", incarnation, error)

    def _meet(self, door: Door, identity: bytes, user: str, frame: bytes) -> NetworkLink | None:
        """A new link if the frame opens a conversation; otherwise its sender is told to begin one."""
        body = first_body(frame)
        protocol = PROTOCOL if body is None else protocol_of(body)
        hello = decode_from_worker(body) if body is not None and protocol in (None, PROTOCOL) else None
        if user and self._allowed is not None and self._allowed.name_of(user) is None:
            refused = Refused(reason="its key is no longer on the list")
        elif protocol not in (None, PROTOCOL):
            refused = Refused(reason=f"it speaks protocol {protocol}; this coordinator speaks {PROTOCOL}")
            _log.warning("refused %.64s: %s", identity.decode(errors="replace"), refused.reason)
        elif not isinstance(hello, Hello):
            refused = Refused(reason="it is not known here, or was taken for dead", again=True)
        elif hello.incarnation.encode() != identity:
            refused = Refused(reason="its connection is not that of its incarnation")
        elif len(self._links) >= MAX_LINKS:
            refused = Refused(reason=f"{MAX_LINKS} workers are here already", again=True)
        else:
            self._links[hello.incarnation] = link = NetworkLink(door, hello.incarnation, user, self._queue)
            return link
        door.put(identity, aside(encode(refused)))
        return None

    def _hear(self, link: NetworkLink, message: FromWorker) -> None:
        if isinstance(message, Hello):
            if not self._tell(lambda: self._coordinator.hello(message, link)):
                self._hang_up(link, Refused(reason="the coordinator failed", again=True))
        else:
            self._tell(lambda: self._coordinator.hear(link.incarnation, message))

    def _tell(self, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception:
            _log.exception("the coordinator failed; what it was told is lost")
            return False
        return True

    def _queue(self, link: NetworkLink, body: bytes | None) -> None:
        with self._lock:
            link.waiting += 1
            link.waiting_bytes += len(body or b"")
            self._outgoing.append((link, body))
        self._shared.attempt(self._flush_messages)

    def _flush_messages(self) -> None:
        """On any thread, which may be within the coordinator: what would have to be told to that is left alone."""
        while self._outgoing:
            link, body = self._outgoing[0]
            if body is None or link.broken or link.closed:
                self._shared.ring()
                return
            self._take_up()
            self._put(link, link.line.send(body))

    def _take_up(self) -> tuple[NetworkLink, bytes | None]:
        """The oldest message. Needs the turn."""
        with self._lock:
            link, body = self._outgoing.popleft()
            link.waiting -= 1
            link.waiting_bytes -= len(body or b"")
        return link, body

    def _flush(self) -> None:
        while self._outgoing:
            link, body = self._take_up()
            if link.closed:
                continue
            if link.broken:
                self._hang_up(link, Refused(reason=link.broken, again=True))
            elif body is not None:
                self._put(link, link.line.send(body))
            else:
                self._put(link, link.line.idle())
                self._forget(link)

    def _hang_up(self, link: NetworkLink, refused: Refused) -> None:
        _log.warning("hung up on %s: %s", link.incarnation, refused.reason)
        self._put(link, aside(encode(refused)))
        self._forget(link)
        self._tell(lambda: self._coordinator.left(link.incarnation, refused.reason))

    def _forget(self, link: NetworkLink) -> None:
        link.closed = True
        self._links.pop(link.incarnation, None)

    def _put(self, link: NetworkLink, frame: bytes) -> None:
        # What is lost because it cannot be sent now the line repeats when the worker is heard of again.
        link.door.put(link.incarnation.encode(), frame)

    def _close_sockets(self) -> None:
        self._open = False
        for closing in [*self._doors, *([self._gate] if self._gate else [])]:
            closing.close()
        self._shared.close()
        self._context.term()
        for door in self._doors:
            door.release()

"""A worker's line to a coordinator elsewhere: one thread that sends, hears, reconnects, and knows when to give up."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

import msgspec
import zmq

from triptych.errors import InvalidRequest, Unsupported
from triptych.line import MAX_MESSAGE, MAX_QUEUED, BadFrame, Line
from triptych.messages import (
    Checkpointed,
    Failed,
    FromWorker,
    Goodbye,
    Heartbeat,
    Hello,
    Loading,
    Refused,
    Run,
    Stepped,
    Stop,
    TaskDone,
    ToWorker,
    Welcome,
    decode_from_worker,
    decode_to_worker,
    encode,
)
from triptych.sockets import SharedSockets
from triptych.worker.wires import CurveKeys, Event, Wire, open_wire

__all__ = ["ProcessUplink"]

PING_SECONDS = 1.0
SOFT_OUTBOX = 256  # above it, news of the moment is dropped
MANY = 64
AT_ONCE = 1 << 20
"""bytes of frames, about, that leave in one call: each may wake the coordinator"""
STEPS_SECONDS = 0.02
FLUSH_SECONDS = 2.0
MAX_BACK_OFF = 5.0
RECONNECT_SECONDS = 0.5
STOPPED_SECONDS = 2.0  # a pause of the loop longer than this was a stopped process, not a silent coordinator
NEWS = (Heartbeat, Stepped, Loading)
CARRIED = (TaskDone, Checkpointed, Failed)

_log = logging.getLogger(__name__)


class ProcessUplink:
    """The worker's end. Says `hello` at once, and again, as a new incarnation, whenever the coordinator does not know
    it (any more); the worker sees that by the Refused(again=True) and the Welcome it receives. A connection that comes
    back loses and repeats nothing. All methods may be called from any thread.

    When no coordinator has been heard for `orphan_seconds`, the worker receives Stop, or Refused if there never was
    one; likewise Refused when keys do not fit. Once it was told Stop or has said Goodbye, it says Hello to nobody.
    Raises InvalidRequest for an endpoint or keys that cannot be used.
    """

    def __init__(
        self, endpoint: str, hello: Hello, keys: CurveKeys | None = None, orphan_seconds: float = 60.0
    ) -> None:
        self._endpoint = endpoint if "://" in endpoint else f"tcp://{endpoint}"
        if keys is None and self._endpoint.startswith("tcp:"):
            raise InvalidRequest(f"{endpoint} is joined with a key file (`triptych keys`), none was given", field="key")
        self._hello = hello
        self._keys = keys
        self._orphan_seconds = orphan_seconds
        self._ping_seconds = min(PING_SECONDS, orphan_seconds / 4)
        self._context = zmq.Context()
        self._inbox: queue.SimpleQueue[ToWorker] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._outbox: deque[bytes] = deque()
        self._shared = SharedSockets()
        self._handing = threading.RLock()
        self._hear: Callable[[ToWorker], None] | None = None
        self._closing = threading.Event()
        self._ended = False
        self._welcomed = False
        self._leaving = False
        self._leave_by = 0.0
        self._heard = self._said = self._last = time.monotonic()
        self._rung = 0.0
        self._back_off = 0.0
        self._line = Line()
        try:
            self._wire = self._connect()
        except BaseException:
            self._close_rest()
            raise
        self._say_hello()
        self._thread = threading.Thread(target=self._run, name="triptych-uplink", daemon=True)
        self._thread.start()

    @property
    def incarnation(self) -> str:
        """The one that it last said Hello as."""
        return self._hello.incarnation

    def send(self, message: FromWorker) -> None:
        """Sends a message, or queues it; never waits. While nobody takes them, news of the moment (heartbeats, steps)
        is dropped.

        Raises Unsupported for a message over MAX_MESSAGE bytes.
        """
        body = encode(message)
        if len(body) > MAX_MESSAGE:
            raise Unsupported(f"a {type(message).__name__} of {len(body)} bytes; at most {MAX_MESSAGE} are sent")
        with self._lock:
            waiting = len(self._outbox) + self._line.kept
            if self._ended or (waiting >= SOFT_OUTBOX and isinstance(message, NEWS)):
                return
            self._outbox.append(body)
            self._leaving = self._leaving or isinstance(message, Goodbye)
        if waiting >= MAX_QUEUED:
            self._end(Stop())
        if not self._may_wait(message):
            self._rung = time.monotonic()
            self._shared.attempt(self._flush)

    def _may_wait(self, message: FromWorker) -> bool:
        """A step that ends soon after something was sent, or a task came, goes with what is sent next, or with the
        loop's next turn: telling of it alone costs more than a step may."""
        return isinstance(message, Stepped) and time.monotonic() - self._rung < STEPS_SECONDS

    def receive(self, timeout: float | None) -> ToWorker | None:
        """The next order; None when none came within `timeout` seconds. With None it waits for one, and gives Stop when
        the line has ended and none can come any more."""
        while True:
            with contextlib.suppress(queue.Empty):
                return self._inbox.get(timeout=1.0 if timeout is None else max(0.0, timeout))
            if timeout is not None:
                return None
            if self._ended and self._inbox.empty():
                return Stop()

    def hand_to(self, hear: Callable[[ToWorker], None] | None) -> None:
        """See `Uplink.hand_to`."""
        with self._handing, contextlib.suppress(queue.Empty):
            self._hear = hear or _ignore
            while True:
                self._hear(self._inbox.get_nowait())

    def _hand_over(self, message: ToWorker) -> None:
        with self._handing:
            (self._hear or self._inbox.put)(message)

    def close(self) -> None:
        """Sends what is queued, for at most two seconds, and hangs up. Closing twice is fine."""
        self._closing.set()
        self._shared.ring()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> ProcessUplink:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _connect(self) -> Wire:
        try:
            wire = open_wire(self._context, self._endpoint, self._hello.incarnation.encode(), self._keys)
        except ValueError as error:
            allowed = f"tcp://HOST:PORT or ipc://PATH, and CURVE keys ({error})"
            raise InvalidRequest.of("join", self._endpoint, allowed) from None
        self._shared.watch([wire])
        return wire

    def _connect_anew(self, pause: float) -> None:
        self._wire.close()
        self._closing.wait(pause)
        self._wire = self._connect()

    def _say_hello(self) -> None:
        """Begins a conversation. Results that the other end of the former one may not have heard of follow."""
        with self._lock:
            unsaid = [*self._line.unacknowledged(), *self._outbox]
            self._line = Line()
            carried = [body for body in unsaid if isinstance(decode_from_worker(body), CARRIED)]
            self._outbox = deque([encode(self._hello), *carried])

    def _run(self) -> None:
        try:
            while not self._is_done():
                self._shared.wait(0.05 if self._closing.is_set() or self._wire.impatient else 0.25)
                with self._shared.turn():
                    self._turn(time.monotonic())
        except Exception:
            _log.exception("the line to the coordinator broke")
            self._end(Stop())
        finally:
            with self._shared.turn():
                self._ended = True
                self._wire.close(linger=0.1)
                self._close_rest()

    def _turn(self, now: float) -> None:
        if now - self._last > STOPPED_SECONDS:
            self._heard += now - self._last
        self._last = now
        self._listen(now)
        self._flush()
        self._mind(now)

    def _is_done(self) -> bool:
        if not self._closing.is_set():
            return self._ended
        self._leave_by = self._leave_by or time.monotonic() + FLUSH_SECONDS
        with self._lock:
            nothing_left = not self._outbox and not self._line.kept
        return self._ended or nothing_left or time.monotonic() > self._leave_by

    def _listen(self, now: float) -> None:
        wire = self._wire
        for one in wire.take():
            if isinstance(one, Event):
                self._heed(one)
            else:
                self._heard = now
                self._take(one)
            if self._wire is not wire:
                return

    def _heed(self, event: Event) -> None:
        """Sees to what happened to the connection."""
        if event is Event.BACK:
            for frame in self._line.resume():
                self._put(frame)
        elif event is Event.NO_KEY:
            self._end(Refused(reason=f"the coordinator at {self._endpoint} does not have this key on its list"))
        elif not self._welcomed:
            which = "is no coordinator"
            if self._keys is not None:
                which += ", or its key is not the one that the key file names"
            self._end(Refused(reason=f"what answers at {self._endpoint} {which}"))
        elif event is Event.STRANGER:  # a coordinator was there and may be again; the conversation goes on
            self._connect_anew(RECONNECT_SECONDS)
            for frame in self._line.resume():
                self._put(frame)

    def _take(self, frame: bytes) -> None:
        try:
            body, replies = self._line.take(frame)
            for reply in replies:
                self._put(reply)
            if body is not None:
                self._obey(decode_to_worker(body))
        except (BadFrame, msgspec.DecodeError) as error:
            _log.warning("dropped what the coordinator sent: %s", error)

    def _obey(self, message: ToWorker) -> None:
        refused = isinstance(message, Refused)
        if refused and not message.again:
            self._end(message)
        elif refused and self._leaving:  # of no concern to either any more
            self._end(Stop())
        elif not self._ended:
            if isinstance(message, Run):
                self._rung = time.monotonic()
            self._hand_over(message)
            self._leaving = self._leaving or isinstance(message, Stop)
            if isinstance(message, Welcome):
                self._welcomed, self._back_off = True, 0.0
            elif refused and not self._closing.is_set():
                self._come_again()

    def _come_again(self) -> None:
        self._hello = msgspec.structs.replace(self._hello, incarnation=_another(self._hello.incarnation))
        self._connect_anew(self._back_off)
        self._back_off = min(max(0.1, 2 * self._back_off), MAX_BACK_OFF)
        self._say_hello()

    def _flush(self) -> None:
        while not self._ended:
            frames, size = [], 0
            with self._lock:
                while self._outbox and size < AT_ONCE:
                    frames.append(self._line.send(self._outbox.popleft()))
                    size += len(frames[-1])
            if not frames:
                break
            self._put(*frames)

    def _mind(self, now: float) -> None:
        """Pings, acknowledges, and gives a coordinator up that is not there."""
        due = 0.05 if self._closing.is_set() else self._ping_seconds
        if not self._ended and (now - self._said >= due or self._line.owes >= MANY):
            self._put(self._line.idle())
        if now - self._heard > self._orphan_seconds and not self._ended:
            why = f"no coordinator answered at {self._endpoint} for {self._orphan_seconds:g} s"
            if self._welcomed:
                _log.warning(why)
            self._end(Stop() if self._welcomed else Refused(reason=why))

    def _put(self, *frames: bytes) -> None:
        self._said = time.monotonic()
        self._wire.put(*frames)  # what is lost the line repeats

    def _end(self, last: ToWorker) -> None:
        if not self._ended:
            self._ended = True
            self._hand_over(last)

    def _close_rest(self) -> None:
        self._ended = True
        self._shared.close()
        self._context.term()


def _ignore(message: ToWorker) -> None:
    """For whoever listens no more."""


def _another(incarnation: str) -> str:
    """The next incarnation: of the same process, but never used before."""
    base, _, count = incarnation.partition("~")
    return f"{base}~{int(count or 0) + 1}"

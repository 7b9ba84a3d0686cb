"""A worker: holds stages of one model on one device, takes tasks, drives them, and hands on what they made."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import queue
import secrets
import time
from collections.abc import Callable, Iterable, Iterator

import msgspec
import torch

from triptych.errors import Unsupported
from triptych.messages import (
    PROTOCOL,
    Cancel,
    Drain,
    Draining,
    Expect,
    Flush,
    FromWorker,
    Goodbye,
    Hello,
    Loading,
    PeerGone,
    Prove,
    Ready,
    Refused,
    Release,
    Run,
    SetPreview,
    Stop,
    ToWorker,
    Welcome,
)
from triptych.model import topology_to_bytes
from triptych.request import StageName
from triptych.stage import GatherStage, LoadProgress, StageInfo
from triptych.transfer import Exchange
from triptych.worker.caches import caches_used, flush_all, process_caches
from triptych.worker.desk import Arrived, Desk, Given
from triptych.worker.health import Proof, Pulse
from triptych.worker.inputs import Inputs
from triptych.worker.line import Uplink
from triptych.worker.opening import Opened, open_for, pin
from triptych.worker.outbox import Outbox
from triptych.worker.previews import Previews
from triptych.worker.settings import WorkerSettings

logger = logging.getLogger(__name__)

IDLE_SECONDS = 0.25
"""How often a worker with nothing to compute looks at the clock."""
AHEAD = 1
"""Tasks of a stage whose inputs come while it is full."""
TOLD = "it was told to stop"


class _Ended(Exception):
    """It was told to stop while it loaded."""


class Worker:
    """`run` is the worker's whole life, on the calling thread; `drain` and `stop` may be called from any.

    `connect` says Hello and gives the line; `opened` is the model, if it is open already (None: opened from the
    settings). Whoever gives the exchange closes it. `described` is given the model once it is open, with nothing loaded
    yet; `loaded` is called once all stages have loaded.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        connect: Callable[[Hello], Uplink],
        exchange: Exchange,
        opened: Opened | None = None,
        *,
        described: Callable[[Opened], None] | None = None,
        loaded: Callable[[], None] | None = None,
    ) -> None:
        self._settings = settings
        self._connect = connect
        self._exchange = exchange
        self._opened = opened
        self._described = described
        self._loaded = loaded
        self._uplink: Uplink | None = None
        self._inbox: queue.SimpleQueue[ToWorker | Given | Arrived] = queue.SimpleQueue()
        self._ready: Ready | None = None
        self._why = ""
        self._failed = False
        self._leave_by: float | None = None
        self._handed_back = 0
        self._to_prove = False

    def drain(self) -> None:
        """Finishes what it holds, waits until nobody needs what it keeps (at most the settings' `drain_seconds`), and
        leaves. While it still loads, it leaves after the component that is being read."""
        if self._ready is None:
            self._why = TOLD
        self._inbox.put(Drain())

    def stop(self) -> None:
        """Leaves after the unit that runs now, handing back what it holds."""
        self._why = TOLD
        self._inbox.put(Stop())

    def abandon(self) -> None:
        """Says Goodbye and hangs up while a unit still runs: for whoever ends the process now."""
        if self._uplink is not None:
            self._uplink.send(Goodbye(reason=self._why or TOLD))
            self._uplink.close()

    @torch.no_grad()
    def run(self) -> None:
        """Opens, says Hello, loads, works, leaves. Raises a TriptychError if the model cannot be opened or loaded, or
        the coordinator refuses it."""
        pin(self._settings)
        opened = self._opened = self._opened or open_for(self._settings)
        if self._described is not None:
            self._described(opened)
        uplink = self._uplink = self._connect(self._hello(opened))
        try:
            welcome = self._await_welcome(uplink)
            if welcome is not None:
                self._live(opened, uplink, welcome)
        finally:
            uplink.close()

    def _say(self, message: FromWorker) -> None:
        assert self._uplink is not None
        self._uplink.send(message)

    def _hello(self, opened: Opened) -> Hello:
        host = platform.node()
        libraries = ("triptych", "torch", "diffusers", "transformers")
        return Hello(
            protocol=PROTOCOL,
            name=self._settings.name or f"{host}-{os.getpid()}",
            incarnation=secrets.token_hex(16),
            stages=tuple(opened.stages),
            model_digest=opened.digest,
            versions={name: version for name in libraries if (version := _version(name))},
            device=str(opened.placement.device),
            pid=os.getpid(),
            host=host,
            slot=self._settings.slot,
            addresses=self._exchange.addresses,
            owner=self._exchange.owner,
            secret=self._exchange.secret,
            dtype=_dtype(opened),
        )

    def _await_welcome(self, uplink: Uplink) -> Welcome | None:
        """None if it was told to stop instead. Raises Unsupported with the reason if it is refused."""
        while not self._why:
            message = uplink.receive(IDLE_SECONDS)
            if isinstance(message, Welcome):
                return message
            if isinstance(message, Refused) and not message.again:
                raise _refused(message)
            if isinstance(message, Stop):
                return None
        return None

    def _live(self, opened: Opened, uplink: Uplink, welcome: Welcome) -> None:
        """From Welcome to Goodbye."""
        inline = self._settings.transfer.open_routes == ("reference",)
        with contextlib.ExitStack() as stack:
            stack.callback(self._say_goodbye)
            self._outbox = Outbox(self._say, self._exchange, inline=inline)
            stack.callback(self._outbox.close)
            device = opened.placement.device
            self._pulse = Pulse(self._say, self._exchange, device, welcome.heartbeat_seconds)
            stack.callback(self._pulse.stop)
            stack.enter_context(self._listening(uplink))
            for stage in opened.stages.values():
                stack.callback(stage.close)
            try:
                ready, self._desk = self._load(opened)
                stack.callback(self._clear)
                self._pulse.moving = lambda: self._desk.moving
                self._ready = ready
                self._serve(ready)
            except _Ended:
                pass
            except Exception as error:
                self._why, self._failed = f"{type(error).__name__}: {error}", True
                raise

    def _clear(self) -> None:
        """Lets go of all tasks, those too that are only on their way."""
        self._desk.close()
        while not self._inbox.empty():
            order = self._inbox.get()
            if isinstance(order, Arrived):
                self._desk.arrive(order)

    def _say_goodbye(self) -> None:
        """The last word; what it keeps goes with it."""
        reason = self._why or "it was drained"
        logger.info("leaving: %s", reason)
        self._say(Goodbye(reason=reason, failed=self._failed))
        self._outbox.release_all()

    def _load(self, opened: Opened) -> tuple[Ready, Desk]:
        infos: dict[StageName, StageInfo] = {}
        for name, stage in opened.stages.items():
            self._say(Loading(what=name))
            infos[name] = stage.load(self._loading)
        self._proof = Proof(_modules(opened), opened.placement.device)
        self._previews = Previews(opened)
        caches = self._caches = process_caches(self._exchange, opened.placement.device)
        self._pulse.caches = lambda: caches_used(opened.stages, caches)
        credits: dict[StageName, int] = {name: info.capacity + AHEAD for name, info in infos.items()}
        ready = Ready(
            topology=topology_to_bytes(opened.topology),
            capacity={name: info.capacity for name, info in infos.items()},
            credits=credits,
            weights={name: info.bytes for name, info in infos.items()},
            preview=self._previews.offered(),
        )
        if self._loaded is not None:
            self._loaded()
        inputs = Inputs(self._exchange, opened.stages, self._settings.max_input_bytes)
        desk = Desk(opened.stages, credits, inputs, self._outbox, self._pulse, self._previews, self._inbox.put)
        return ready, desk

    def _loading(self, progress: LoadProgress) -> None:
        if self._why:
            raise _Ended
        logger.info("loaded %s in %.1f s", progress.component, progress.seconds)
        self._say(Loading(what=progress.component, done=progress.done, total=progress.total))

    @contextlib.contextmanager
    def _listening(self, uplink: Uplink) -> Iterator[None]:
        uplink.hand_to(self._listen)
        try:
            yield
        finally:
            uplink.hand_to(None)

    def _listen(self, message: ToWorker) -> None:
        """Hears the coordinator, on the line's thread: what is released is free at once, since the next output may be
        waiting for its room."""
        try:
            self._hear(message)
        except Exception as error:  # a worker that lives and hears nothing would never be missed
            logger.exception("what the coordinator said broke something")
            self._why, self._failed = self._why or f"{type(error).__name__}: {error}", True
            self._inbox.put(Stop())

    def _hear(self, message: ToWorker) -> None:
        if isinstance(message, Release):
            self._release(message.payloads)
        elif isinstance(message, PeerGone):
            self._exchange.peer_gone(message.owner)
        elif isinstance(message, Run) and self._ready is not None:
            self._desk.give(message.task)
            self._release(message.released)
        else:
            if isinstance(message, Stop):
                self._why = self._why or TOLD
            self._inbox.put(message)

    def _release(self, payloads: Iterable[str]) -> None:
        for payload in payloads:
            self._outbox.release(payload)

    def _serve(self, ready: Ready) -> None:
        """Receive, admit, step, report."""
        self._say_ready(ready)
        logger.info("ready: %s", ", ".join(ready.capacity))
        while self._take_orders():
            self._desk.turn()

    def _take_orders(self) -> bool:
        """Carries out what has come; waits while there is nothing to compute. False: it is over."""
        while True:
            waits = self._desk.waits
            if not waits and self._inbox.empty():
                return not self._why
            with contextlib.suppress(queue.Empty):
                self._carry_out(self._inbox.get(timeout=IDLE_SECONDS))
            if self._to_prove and self._desk.empty:
                self._prove()
            if self._is_over():
                return False

    def _is_over(self) -> bool:
        if self._why:
            return True
        if self._leave_by is None or not (self._desk.empty and self._outbox.idle):
            return False
        return not self._outbox.kept or self._handed_back > 0 or time.monotonic() > self._leave_by

    def _carry_out(self, order: ToWorker | Given | Arrived) -> None:
        match order:
            case Arrived():
                self._desk.arrive(order)
            case Given() if self._leave_by is not None:
                order.held.dropped = True
                self._handed_back += 1  # with the Goodbye
            case Given():
                self._desk.take(order)
            case Run():  # it came early
                self._desk.give(order.task)
                self._release(order.released)
            case Expect() if self._leave_by is None:
                self._desk.expect(order.task)
            case Cancel():
                self._desk.drop(order.job)
            case Prove():
                self._to_prove = True
            case Flush():
                self._flush(order)
            case SetPreview():
                self._previews.use(order.preview)
            case Drain() if self._leave_by is None:
                self._leave_by = time.monotonic() + self._settings.drain_seconds
                self._say(Draining())
            case Stop():
                pass  # `_why` says so already
            case Refused():
                self._begin_anew(order)
            case Welcome():
                self._welcome_again(order)

    def _begin_anew(self, refused: Refused) -> None:
        """The coordinator does not know it any more, and gives its tasks to others. What it keeps may still be asked
        for; the rest is released when it is ready again."""
        if not refused.again:
            raise _refused(refused)
        logger.warning("begins anew: %s", refused.reason)
        self._desk.drop_all()
        self._to_prove = False

    def _welcome_again(self, welcome: Welcome) -> None:
        assert self._ready is not None
        self._pulse.seconds = welcome.heartbeat_seconds
        self._desk.expect_nothing()
        if self._leave_by is not None:
            self._say(Draining())
        self._say_ready(msgspec.structs.replace(self._ready, kept=tuple(sorted(self._outbox.names()))))

    def _say_ready(self, ready: Ready) -> None:
        self._say(self._pulse.beat())  # what is free decides what is let in, from the first job on
        self._say(ready)

    def _flush(self, order: Flush) -> None:
        assert self._opened is not None
        self._outbox.send("", flush_all(order.number, self._opened.stages, self._caches))

    def _prove(self) -> None:
        self._to_prove = False
        self._desk.expect_nothing()
        proved = self._proof.prove()
        if not proved.healthy:
            logger.error("not healthy: %s", proved.reason)
        self._outbox.send("", proved)


def _modules(opened: Opened) -> list[torch.nn.Module]:
    """Every module with weights that the stages hold, each once."""
    found = {
        id(part): part
        for stage in opened.stages.values()
        if isinstance(stage, GatherStage)
        for part in stage.program.components.values()
        if isinstance(part, torch.nn.Module)
    }
    return list(found.values())


def _dtype(opened: Opened) -> str:
    """What the largest component of the stages is loaded in; empty where the files do not say."""
    if opened.placement.dtype is not None:
        return str(opened.placement.dtype)
    names = {name for stage in opened.topology.stages if stage.name in opened.stages for name in stage.loads}
    infos = [info for name, info in opened.topology.components.items() if name in names and info.dtype]
    largest = max(infos, key=lambda info: info.bytes, default=None)
    return f"torch.{largest.dtype}" if largest is not None else ""


def _refused(message: Refused) -> Unsupported:
    return Unsupported(f"this worker cannot join: {message.reason}", field="worker")


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None

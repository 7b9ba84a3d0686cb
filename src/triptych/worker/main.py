"""A worker in a process of its own, from its settings to its exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from triptych.errors import TriptychError
from triptych.messages import Hello
from triptych.model import topology_to_bytes
from triptych.noise import hush
from triptych.transfer import Exchange
from triptych.worker.line import Uplink
from triptych.worker.opening import Opened, keep_memory, settle
from triptych.worker.settings import WorkerSettings
from triptych.worker.uplink import ProcessUplink
from triptych.worker.wires import CurveKeys
from triptych.worker.worker import Worker

logger = logging.getLogger(__name__)

STOP_SECONDS = 2.0
"""What the second signal leaves for the unit that runs."""
EXIT_STOPPED, EXIT_FAILED, EXIT_REFUSED = 0, 1, 2


def worker_main(
    settings: WorkerSettings,
    endpoint: str,
    keys: CurveKeys | None = None,
    *,
    orphan_seconds: float = 60.0,
    folder: Path | None = None,
    topology: Path | None = None,
) -> int:
    """Runs a worker on the main thread until it leaves, and returns the process' exit code: 0 when it was drained or
    stopped, 2 for an error that says what is wrong (with the settings, the model, the keys), 1 for any other.

    SIGTERM and SIGINT drain it; the second stops it, whatever it is at. `endpoint` and `keys` are the coordinator's,
    see `ProcessUplink`; `folder` is the private one for the exchange's socket; into the file `topology` goes what the
    model consists of, as soon as that is known. One line per event goes to standard error.
    """
    hush()
    keep_memory()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        exchange = Exchange(settings.transfer, folder=folder)

        def connect(hello: Hello) -> Uplink:
            return ProcessUplink(endpoint, hello, keys, orphan_seconds)

        def described(opened: Opened) -> None:
            if topology is not None:
                _write(topology, topology_to_bytes(opened.topology))

        worker = Worker(settings, connect, exchange, described=described, loaded=settle)
        # Closed before signals end the process again: one that came between would leave the socket behind.
        with signals(worker, exchange), contextlib.closing(exchange):
            worker.run()
    except TriptychError as error:
        logger.error("%s", error)
        return EXIT_REFUSED
    except Exception:
        logger.exception("the worker failed")
        return EXIT_FAILED
    return EXIT_STOPPED


def _write(path: Path, data: bytes) -> None:
    """In one piece for whoever looks."""
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_bytes(data)
    new.replace(path)


@contextlib.contextmanager
def signals(worker: Worker, exchange: Exchange) -> Iterator[None]:
    """While it lasts, SIGTERM and SIGINT drain the worker, and a second one stops it: after STOP_SECONDS by ending the
    process, since a handler on the main thread would wait for the unit that runs there."""
    read, write = socket.socketpair()
    for end in (read, write):
        end.setblocking(False)
    kinds = (signal.SIGTERM, signal.SIGINT)
    former = {kind: signal.signal(kind, lambda *_: None) for kind in kinds}
    former_fd = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
    read.setblocking(True)
    watcher = threading.Thread(target=_watch, args=(read, worker, exchange), name="triptych-signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(former_fd)
        for kind, handler in former.items():
            signal.signal(kind, handler)
        write.close()
        watcher.join()
        read.close()


def _watch(read: socket.socket, worker: Worker, exchange: Exchange) -> None:
    drained = False
    while numbers := read.recv(64):
        for _ in [number for number in numbers if number in (signal.SIGTERM, signal.SIGINT)]:
            if not drained:
                drained = True
                logger.info("told to stop: finishing what it holds")
                worker.drain()
                continue
            logger.info("told to stop again")
            worker.stop()
            read.settimeout(STOP_SECONDS)
            with contextlib.suppress(TimeoutError):
                while read.recv(64):
                    pass
                return
            worker.abandon()
            exchange.close()
            os._exit(EXIT_FAILED)

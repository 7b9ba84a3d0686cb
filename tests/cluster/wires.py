"""What the tests of lines between coordinators and workers share: a coordinator that notes down, a cable to pull."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from triptych.cluster.jobs import Link
from triptych.messages import PROTOCOL, FromWorker, Hello, Welcome

PATIENCE = 60.0


def wait_until(met: Callable[[], Any], what: str = "") -> None:
    """Waits for a condition; fails after PATIENCE seconds."""
    end = time.monotonic() + PATIENCE
    while not met():
        assert time.monotonic() < end, f"still waiting for {what or met}"
        time.sleep(0.005)


def environment() -> dict[str, str]:
    """For a Python process that is to find what this one finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def hello(incarnation: str = "first") -> Hello:
    """Of a worker called `worker` with an encode stage."""
    return Hello(
        protocol=PROTOCOL, name="worker", incarnation=incarnation, stages=("encode",), model_digest="", versions={},
        device="cpu", pid=1, host="here",
    )  # fmt: skip


class Coordinator:
    """Welcomes everybody and notes what it is told."""

    def __init__(self) -> None:
        self.links: dict[str, Link] = {}
        self.heard: list[tuple[str, FromWorker]] = []
        self.gone: list[tuple[str, str]] = []
        self.ticks = 0

    def hello(self, hello: Hello, link: Link) -> None:
        self.links[hello.incarnation] = link
        link.send(Welcome(coordinator="c", heartbeat_seconds=1.0, lease_seconds=5.0))

    def hear(self, incarnation: str, message: FromWorker) -> None:
        self.heard.append((incarnation, message))

    def left(self, incarnation: str, reason: str) -> None:
        self.gone.append((incarnation, reason))

    def tick(self) -> None:
        self.ticks += 1


class Cable:
    """A TCP connection's way to a port, that can be pulled and put back. `at` is the near end."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.at = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._lock = threading.Lock()
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._whole = True
        self._threads[0].start()

    def pull(self) -> None:
        """What is under way is lost, and nobody gets through."""
        with self._lock:
            self._whole = False
            for end in self._ends:
                _shut(end)
            self._ends.clear()

    def put_back(self) -> None:
        self._whole = True

    def close(self) -> None:
        self.pull()
        _shut(self._server)
        for thread in self._threads:
            thread.join(PATIENCE)

    def __enter__(self) -> Cable:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                with self._lock:
                    if not self._whole:
                        _shut(near)
                        continue
                    far = socket.create_connection(("127.0.0.1", self._port))
                    self._ends += [near, far]
                for source, sink in ((near, far), (far, near)):
                    self._threads.append(threading.Thread(target=_carry, args=(source, sink), daemon=True))
                    self._threads[-1].start()


def _carry(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    _shut(source)
    _shut(sink)


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()

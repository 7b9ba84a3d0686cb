"""Cables: every byte between two processes passes through one, which can stop, stop in the middle, or damage a byte."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import psutil

from triptych.transfer.wire import ANSWER, MAGIC

__all__ = ["IN_BODY", "IN_HEAD", "Cable", "Trap", "free_port", "ports_of"]

Way = Literal["up", "down"]
"""From whoever connects to whoever listens, and back."""
NEAR, FAR = "127.0.0.2", "127.0.0.1"
"""Where a cable listens, and where it leads: the same port on two addresses of this machine."""
CHUNK = 1 << 16
IN_HEAD, IN_BODY = ANSWER.size + 40, -1
"""Where a trap springs in what an exchange answers: in the payload's header; in the middle of its body."""


def free_port() -> int:
    """A port that is free on both addresses, below those that the system gives to connections."""
    while True:
        port = random.randrange(20000, 32000)
        with contextlib.suppress(OSError), socket.create_server((NEAR, port)), socket.create_server((FAR, port)):
            return port


def ports_of(pid: int) -> set[int]:
    """The local ports of a process's connections."""
    with contextlib.suppress(psutil.Error):
        return {one.laddr.port for one in psutil.Process(pid).net_connections("tcp") if one.laddr}
    return set()


class Trap:
    """Waits in a cable for bytes that go one way: the first `after` pass, then it holds them up until it is released,
    damages the next one, or tears the connection where bytes are not `damageable`."""

    def __init__(self, way: Way, after: int, *, damage: bool, damageable: bool, of: Callable[[int], bool]) -> None:
        self.way, self.after, self.damage, self.damageable, self.of = way, after, damage, damageable, of
        self.sprung = threading.Event()
        self._released = threading.Event()
        self._lost = False

    def release(self, *, lost: bool = False) -> None:
        """What it holds goes on, or is lost with the connection."""
        self._lost = self._lost or lost
        self._released.set()

    def split(self, data: bytes) -> tuple[bytes, bytes] | None:
        """What passes before it springs and what is held; None if it does not yet."""
        if self.after == IN_BODY:
            if len(data) < ANSWER.size or not data.startswith(MAGIC):
                return None
            _, _, head, body = ANSWER.unpack_from(data)
            self.after = ANSWER.size + head + body // 2
        if len(data) <= self.after:
            self.after -= len(data)
            return None
        return data[: self.after], data[self.after :]

    def spring(self, rest: bytes) -> bytes:
        """Returns what goes on."""
        self.sprung.set()
        if self.damage and not self.damageable:
            raise ConnectionError("torn off in the middle")
        if self.damage:
            return bytes([rest[0] ^ 0x10]) + rest[1:]
        self._released.wait(60.0)
        if self._lost:
            raise ConnectionError("what was under way is lost")
        return rest


class Cable:
    """Listens on NEAR at a port and leads to FAR at the same (or another) one, or from one Unix socket to another (no
    byte of which the kernel damages: there a damaged byte is a torn connection). While nothing listens there, whoever
    has connected waits."""

    def __init__(self, near: int | Path, far: int | Path | None = None) -> None:
        self.near = near
        self._far = near if far is None else far
        if isinstance(near, Path):
            self._server = socket.socket(socket.AF_UNIX)
            self._server.bind(str(near))
            self._server.listen(64)
        else:
            self._server = socket.create_server((NEAR, near), backlog=64)
        self._lock = threading.Lock()
        self._whole = threading.Event()
        self._whole.set()
        self._blocked: Callable[[int], bool] = lambda port: False
        self._trap: Trap | None = None
        self._open = True
        self._ends: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def cut(self) -> None:
        """Nothing gets through; nobody is told."""
        self._whole.clear()

    def mend(self) -> None:
        """What was held up arrives, late."""
        self._blocked = lambda port: False
        self._whole.set()

    def block(self, blocked: Callable[[int], bool]) -> None:
        """Nothing gets through for those who come from such a port."""
        self._blocked = blocked

    def trap(
        self, way: Way, after: int = 0, *, damage: bool = False, of: Callable[[int], bool] = lambda port: True
    ) -> Trap:
        """Sets a trap for the bytes from now on, of connections that come from such a port."""
        trap = Trap(way, after, damage=damage, damageable=isinstance(self.near, int), of=of)
        with self._lock:
            self._trap = trap
        return trap

    def clear(self) -> None:
        """Takes the trap away."""
        with self._lock:
            trap, self._trap = self._trap, None
        if trap is not None:
            trap.release()

    def close(self) -> None:
        """Tears everything off."""
        self._open = False
        self.clear()
        self.mend()
        with self._lock:
            ends = [self._server, *self._ends]
        for end in ends:
            _shut(end)
        for thread in self._threads:
            thread.join(30.0)
        for end in ends:
            end.close()
        if isinstance(self.near, Path):
            self.near.unlink(missing_ok=True)

    def _accept(self) -> None:
        while self._open:
            try:
                near, address = self._server.accept()
            except OSError:
                return
            port = address[1] if address else 0
            with self._lock:
                self._ends.add(near)
            thread = threading.Thread(target=self._join, args=(near, port), daemon=True)
            self._threads = [one for one in self._threads if one.is_alive()] + [thread]
            thread.start()

    def _join(self, near: socket.socket, port: int) -> None:
        far = self._reach(near)
        if far is None:
            self._forget(near)
            return
        with self._lock:
            self._ends.add(far)
        back = threading.Thread(target=self._carry, args=(far, near, "down", port), daemon=True)
        back.start()
        self._carry(near, far, "up", port)
        back.join()
        self._forget(near, far)

    def _reach(self, near: socket.socket) -> socket.socket | None:
        while self._open:
            with contextlib.suppress(OSError):
                return _connected(self._far)
            near.settimeout(0.05)
            try:
                if not near.recv(1, socket.MSG_PEEK):
                    return None
                time.sleep(0.05)
            except TimeoutError:
                pass
            except OSError:
                return None
            near.settimeout(None)
        return None

    def _carry(self, source: socket.socket, sink: socket.socket, way: Way, port: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK):
                while not self._whole.is_set() or self._blocked(port):
                    self._whole.wait(0.05)
                    time.sleep(0.01)
                self._pass(data, sink, way, port)
        _shut(source)
        _shut(sink)

    def _pass(self, data: bytes, sink: socket.socket, way: Way, port: int) -> None:
        with self._lock:
            trap = self._trap
            if trap is not None and (trap.way != way or not trap.of(port)):
                trap = None
            parts = trap.split(data) if trap is not None else None
            if parts is not None:
                self._trap = None
        if trap is None or parts is None:
            sink.sendall(data)
            return
        sink.sendall(parts[0])
        sink.sendall(trap.spring(parts[1]))

    def _forget(self, *ends: socket.socket) -> None:
        with self._lock:
            self._ends -= set(ends)
        for end in ends:
            end.close()


def _connected(far: int | Path) -> socket.socket:
    if isinstance(far, int):
        return socket.create_connection((FAR, far))
    end = socket.socket(socket.AF_UNIX)
    try:
        end.connect(str(far))
    except OSError:
        end.close()
        raise
    return end


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)

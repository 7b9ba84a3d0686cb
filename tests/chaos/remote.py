"""The harness's wire into its processes: fault points there that can be armed from here, over a Unix socket."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch

__all__ = ["Deed", "Panel", "Puppet", "Remote"]

Deed = Literal["report", "wait", "raise", "oom"]
"""What happens at an armed point: it is told; it waits for `go`; an exception; an allocation that cannot succeed."""
PATIENCE = 120.0
HUGE = 1 << 60


class Planned(RuntimeError):
    """The exception that the harness asked for."""


class Remote:
    """A process's end. `point` is called where something may be made to go wrong."""

    def __init__(self, path: str, name: str, answers: dict[str, Callable[[], Any]]) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._answers = answers
        self._lock = threading.Lock()
        self._armed: dict[str, tuple[Deed, int]] = {}
        self._go = threading.Event()
        self._then = ""
        self._say({"name": name, "pid": os.getpid()})
        threading.Thread(target=self._listen, name="chaos-remote", daemon=True).start()

    def point(self, name: str) -> None:
        """Does here what this point was armed for, once."""
        if name not in self._armed:
            return
        with self._lock:
            deed, skip = self._armed.pop(name, ("report", -1))
            if skip > 0:
                self._armed[name] = deed, skip - 1
            if skip:
                return
            self._go.clear()
            self._then = ""
        self._say({"reached": name})
        if deed == "wait":
            self._go.wait(PATIENCE)
        self._do(name, self._then if deed == "wait" else deed)

    def _do(self, name: str, deed: str) -> None:
        if deed == "raise":
            raise Planned(f"the harness wants an error while {name}")
        elif deed == "oom" and name == "computing":
            torch.empty(HUGE, dtype=torch.uint8)
        elif deed == "oom":
            bytearray(HUGE)

    def _say(self, message: dict[str, Any]) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self) -> None:
        for line in self._socket.makefile():
            message = json.loads(line)
            if "arm" in message:
                with self._lock:
                    self._armed[message["arm"]] = message["deed"], message["skip"]
            elif "disarm" in message:
                with self._lock:
                    self._armed.clear()
            elif "go" in message:
                self._then = message["go"]
                self._go.set()
            elif "ask" in message:
                self._say({"answer": self._answers[message["ask"]](), "number": message["number"]})


class Puppet:
    """The harness's end of one process."""

    def __init__(self, panel: Panel, connection: socket.socket, name: str, pid: int) -> None:
        self.name, self.pid = name, pid
        self.alive = True
        self._panel = panel
        self._connection = connection
        self._number = 0

    def __repr__(self) -> str:
        return f"{self.name}({self.pid})"

    def arm(self, point: str, deed: Deed, skip: int = 0) -> None:
        """At its next passage (after `skip` others) this happens."""
        self._say({"arm": point, "deed": deed, "skip": skip})

    def disarm(self) -> None:
        """Nothing is armed any more."""
        self._say({"disarm": True})

    def go(self, deed: Deed = "report") -> None:
        """What waits at a point goes on, or does this there."""
        self._say({"go": deed})

    def signal(self, number: int) -> None:
        """Sends a signal, if it lives."""
        if self.alive:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL; returns when the harness has noticed."""
        self.signal(signal.SIGKILL)
        self._panel.wait(lambda: not self.alive, f"the end of {self}")

    def ask(self, what: str) -> Any:
        """What it says of itself."""
        self._number += 1
        number = self._number
        self._say({"ask": what, "number": number})
        return self._panel.answer(self, number)

    def _say(self, message: dict[str, Any]) -> None:
        try:
            self._connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.alive = False


class Panel:
    """Where all processes of a cluster report."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "panel.sock"
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(self.path))
        self._server.listen(64)
        self._changed = threading.Condition()
        self._puppets: dict[str, Puppet] = {}
        self._reached: list[tuple[Puppet, str]] = []
        self._answers: dict[tuple[Puppet, int], Any] = {}
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def get(self, name: str) -> Puppet | None:
        """The living process of that name."""
        with self._changed:
            puppet = self._puppets.get(name)
            return puppet if puppet is not None and puppet.alive else None

    def living(self) -> list[Puppet]:
        """Every process that lives."""
        with self._changed:
            return [puppet for puppet in self._puppets.values() if puppet.alive]

    def wait(self, met: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
        """What `met` gives as soon as it is true. Raises TimeoutError."""
        end = time.monotonic() + patience
        with self._changed:
            while not (found := met()):
                if time.monotonic() > end:
                    raise TimeoutError(f"waited {patience:g} s for {what}")
                self._changed.wait(0.05)
        return found

    def forget(self) -> None:
        """What was reached until now is of no interest any more."""
        with self._changed:
            self._reached.clear()

    def reached(self, point: str, among: Iterable[Puppet], patience: float = PATIENCE) -> Puppet:
        """The first of these processes that has come to an armed point."""
        wanted = list(among)
        return self.wait(lambda: self.at(point, wanted), f"one of {wanted} to come to {point}", patience)

    def at(self, point: str, among: Iterable[Puppet]) -> Puppet | None:
        """The same, if there is one now."""
        wanted = list(among)
        with self._changed:
            return next((one for one, at in self._reached if at == point and one in wanted), None)

    def answer(self, puppet: Puppet, number: int) -> Any:
        """What a process answered."""
        self.wait(lambda: (puppet, number) in self._answers or not puppet.alive, f"an answer of {puppet}")
        with self._changed:
            return self._answers.pop((puppet, number))

    def close(self) -> None:
        """Hangs up."""
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for puppet in self.living():
            puppet._connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)
        self.path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._hear, args=(connection,), daemon=True)
            self._threads = [one for one in self._threads if one.is_alive()] + [thread]
            thread.start()

    def _hear(self, connection: socket.socket) -> None:
        puppet: Puppet | None = None
        with connection, connection.makefile() as lines:
            try:
                for line in lines:
                    message = json.loads(line)
                    with self._changed:
                        if "name" in message:
                            puppet = Puppet(self, connection, message["name"], message["pid"])
                            self._puppets[puppet.name] = puppet
                        elif puppet is not None and "reached" in message:
                            self._reached.append((puppet, message["reached"]))
                        elif puppet is not None:
                            self._answers[puppet, message["number"]] = message["answer"]
                        self._changed.notify_all()
            except (OSError, ValueError):
                pass  # it died in the middle of a word
            with self._changed:
                if puppet is not None:
                    puppet.alive = False
                self._changed.notify_all()

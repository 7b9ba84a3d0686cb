"""Exchanges in one process, which need no wire between them."""

from __future__ import annotations

import os
import secrets
import threading
from dataclasses import dataclass

from triptych.transfer.pool import Pool
from triptych.transfer.shelf import Shelf


@dataclass(frozen=True)
class Neighbour:
    """What one exchange shows to the others of its process."""

    shelf: Shelf
    pool: Pool


class Neighbours:
    """Give the same to every exchange of a process that should pass payloads by reference."""

    def __init__(self) -> None:
        self.token = f"{os.getpid()}-{secrets.token_hex(8)}"
        self._all: dict[str, Neighbour] = {}
        self._lock = threading.Lock()

    def add(self, owner: str, neighbour: Neighbour) -> None:
        """An exchange opens."""
        with self._lock:
            self._all[owner] = neighbour

    def find(self, owner: str) -> Neighbour | None:
        """An exchange of this process, if it is one and still open."""
        with self._lock:
            return self._all.get(owner)

    def remove(self, owner: str) -> None:
        """An exchange closes."""
        with self._lock:
            self._all.pop(owner, None)

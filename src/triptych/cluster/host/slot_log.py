"""A worker process's output: in a file that it writes itself, so that it survives us, followed and kept bounded."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO

__all__ = ["SlotLog"]

CHUNK = 1 << 16
MAX_LINE = 8192
LAST_LINES = 20
LOOKS = 16


class SlotLog:
    """One slot's log file (0600) and the one before it (`.1`), together at most `2 * max_bytes` and what is written in
    a moment. `tell` gets each line as it appears. Not thread-safe."""

    def __init__(self, path: Path, max_bytes: int, tell: Callable[[str], None]) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._tell = tell
        self._partial = b""
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        """the last lines"""
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
        self._at = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, self._at - MAX_LINE))
            self.last.extend(line.decode(errors="replace") for line in file.read().splitlines())

    def writer(self) -> IO[bytes]:
        """For the process to write to: it appends, so that the file can be shortened beneath it."""
        return open(self._path, "ab", buffering=0)

    def note(self, line: str) -> None:
        """Writes a line of our own; on a full disk it is told all the same."""
        try:
            with self.writer() as file:
                file.write(f"{line}\n".encode())
        except OSError:
            self._take(line)
        self.follow()

    def follow(self) -> None:
        """Tells the lines that have appeared, and shortens the file when it is too long."""
        self._read()
        if self._at > self._max_bytes:
            self._shorten()

    def _read(self) -> bool:
        """Whether something new was there."""
        try:
            size = self._path.stat().st_size
        except FileNotFoundError:  # taken away by somebody; the next process makes it anew
            size = 0
        if size < self._at:  # shortened by somebody else
            self._at = 0
        if size == self._at:
            return False
        with self._path.open("rb") as file:
            file.seek(self._at)
            while chunk := file.read(CHUNK):
                self._at += len(chunk)
                self._split(chunk)
        return True

    def _shorten(self) -> None:
        with contextlib.suppress(OSError):  # a full disk
            shutil.copyfile(self._path, f"{self._path}.1")
            os.chmod(f"{self._path}.1", 0o600)
        # What is written between the last look and the cut is lost; only a process that floods its log notices.
        for _ in range(LOOKS):
            if not self._read():
                break
        os.truncate(self._path, 0)
        self._at = 0

    def _split(self, chunk: bytes) -> None:
        *whole, self._partial = (self._partial + chunk).split(b"\n")
        if len(self._partial) > MAX_LINE:
            whole.append(self._partial)
            self._partial = b""
        for line in whole:
            self._take(line[:MAX_LINE].decode(errors="replace").rstrip("\r"))

    def _take(self, line: str) -> None:
        self.last.append(line)
        self._tell(line)

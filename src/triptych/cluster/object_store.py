"""Blobs at a URL that fsspec knows, with a local copy of those written and read last."""

from __future__ import annotations

import contextlib
import logging
import secrets
import shutil
import tempfile
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import fsspec

from triptych.cluster.endpoints import private_folder
from triptych.errors import InvalidRequest

__all__ = ["ObjectStore"]

logger = logging.getLogger(__name__)

SPOOL_BYTES = 512 * 2**20
"""Of local copies; those used longest ago go first."""
SPOOL_SECONDS = 60.0
"""A copy stays at least so long after its last use, unless there is twice as much as there may be."""
RETRY_SECONDS = 5.0
CLOSE_SECONDS = 5.0
MAX_LEFT = 100_000
"""Things that a store which fails is still to do; older ones are forgotten."""

DONE = {"put": "written", "remove": "removed"}

Blob = bytes | bytearray | memoryview
Key = tuple[str, str]


class ObjectStore:
    """The place of an ArtifactFolder whose root is a URL; `wanted` says whether it still knows a blob. Raises
    InvalidRequest for a URL that cannot be written to. A store writes a blob whole or not at all."""

    def __init__(self, url: str, spool: Path | None, wanted: Callable[[str, str], bool]) -> None:
        self._wanted = wanted
        self._name = _shown(url)
        try:
            self._system, root = fsspec.core.url_to_fs(url)
            self._root = root.rstrip("/")
            self._try_out()
        except Exception as error:  # whatever the system's library raises
            raise InvalidRequest(f"{self._name} cannot be used: {_said(error)}", field="artifacts") from None
        self._spool = _Spool(spool)
        self._moving = [threading.Lock() for _ in range(16)]
        self._left: deque[tuple[Literal["put", "remove"], str, str]] = deque(maxlen=MAX_LEFT)
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._catch_up, name="triptych-artifacts", daemon=True)

    def _try_out(self) -> None:
        self._system.makedirs(self._root, exist_ok=True)
        probe = f"{self._root}/.triptych-{secrets.token_hex(8)}"
        self._system.pipe_file(probe, b"triptych")
        self._system.rm_file(probe)

    def sizes(self) -> dict[str, dict[str, int]]:
        """The blobs that are there, by job and name. Raises OSError."""
        found: dict[str, dict[str, int]] = {}
        prefix = self._root.strip("/")
        with self._asking():
            there: dict[str, Any] = self._system.find(self._root, detail=True)  # pyright: ignore[reportAssignmentType]
        for path, info in there.items():
            job, _, name = path.strip("/").removeprefix(prefix).strip("/").partition("/")
            if job and name and "/" not in name and not {job[0], name[0]} & {"."}:
                found.setdefault(job, {})[name] = int(info["size"])
        return found

    def write(self, job: str, name: str, parts: Iterable[Blob], note: Callable[[int], None], later: bool) -> int:
        """Writes a blob; `later`: in the background. `note` is given its size once it can be read. Raises OSError."""
        temporary = self._spool.draft(parts)
        size = temporary.stat().st_size
        try:
            with self._lock_of(job, name):
                if not later:
                    with self._asking():
                        self._put(temporary, job, name)
                self._spool.take(temporary, (job, name), size, pinned=later)
                note(size)
        finally:
            temporary.unlink(missing_ok=True)
        if later:
            self._do_later("put", job, name)
        return size

    def path(self, job: str, name: str, size: int) -> Path:
        """A local copy of a blob, fetched if need be. Raises FileNotFoundError, or OSError."""
        if (found := self._spool.find((job, name))) is not None:
            return found
        with self._lock_of(job, name):
            if (found := self._spool.find((job, name))) is not None:
                return found
            temporary = self._spool.draft(())
            try:
                with self._asking():
                    self._system.get_file(self._at(job, name), str(temporary))
                came = temporary.stat().st_size
                if came != size:
                    raise OSError(f"{self._name} gave {came} bytes of {job}/{name}; expected: {size}")
                return self._spool.take(temporary, (job, name), size)
            finally:
                temporary.unlink(missing_ok=True)

    def delete(self, job: str, names: list[str], whole: bool) -> None:
        """Removes blobs, in the background."""
        for name in names:
            self._spool.forget((job, name))
            self._do_later("remove", job, name)

    def close(self) -> None:
        """Waits a moment for what is left to do."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)
        if self._left:
            logger.warning("%s was left with %d blobs to write or remove", self._name, len(self._left))
        self._spool.close()

    # In the background.

    def _do_later(self, what: Literal["put", "remove"], job: str, name: str) -> None:
        with self._changed:
            self._left.append((what, job, name))
            if not self._thread.is_alive() and not self._closing:
                with contextlib.suppress(RuntimeError):  # another thread was faster
                    self._thread.start()
            self._changed.notify_all()

    def _catch_up(self) -> None:
        complained = False
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._left or self._closing)
                if not self._left:
                    return
                what, job, name = self._left[0]
            try:
                self._do(what, job, name)
                complained = False
                with self._changed:
                    if self._left and self._left[0] == (what, job, name):
                        self._left.popleft()
            except OSError as error:
                if not complained:
                    logger.error("%s/%s cannot be %s yet: %s", job, name, DONE[what], error)
                complained = True
                with self._changed:
                    if self._closing:
                        return
                    self._changed.wait_for(lambda: self._closing, RETRY_SECONDS)

    def _do(self, what: str, job: str, name: str) -> None:
        with self._lock_of(job, name), self._asking():
            if what == "put":
                found = self._spool.find((job, name))
                if found is not None and self._wanted(job, name):
                    self._put(found, job, name)
                self._spool.release((job, name))
            elif not self._wanted(job, name):
                with contextlib.suppress(FileNotFoundError):
                    self._system.rm_file(self._at(job, name))
                with contextlib.suppress(Exception):  # folders are no matter of an object store's
                    self._system.rmdir(f"{self._root}/{job}")

    # The store itself.

    def _put(self, file: Path, job: str, name: str) -> None:
        try:
            self._system.put_file(str(file), self._at(job, name))
        except FileNotFoundError:  # where folders have to be made
            self._system.makedirs(f"{self._root}/{job}", exist_ok=True)
            self._system.put_file(str(file), self._at(job, name))

    def _at(self, job: str, name: str) -> str:
        return f"{self._root}/{job}/{name}"

    def _lock_of(self, job: str, name: str) -> threading.Lock:
        return self._moving[hash((job, name)) % len(self._moving)]

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """What the store's library raises, as OSError."""
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:
            raise OSError(f"{self._name} failed: {_said(error)}") from error


class _Spool:
    """Local copies of blobs."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="triptych-spool-")) if folder is None else folder
        private_folder(self._folder, "state")
        for left in self._folder.iterdir():  # of a process before this one
            left.unlink()
        self._lock = threading.Lock()
        self._copies: OrderedDict[Key, tuple[int, float]] = OrderedDict()
        """bytes and the time of the last use, the oldest use first"""
        self._pinned: set[Key] = set()
        self._total = 0

    def draft(self, parts: Iterable[Blob]) -> Path:
        """A new file of these parts."""
        path = self._folder / f".new-{secrets.token_hex(8)}"
        try:
            with path.open("wb") as file:
                for part in parts:
                    file.write(part)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path

    def take(self, draft: Path, key: Key, size: int, pinned: bool = False) -> Path:
        """Makes a draft the copy of a blob; one that is `pinned` stays until it is released."""
        path = self._at(key)
        with self._lock:
            draft.replace(path)
            self._total += size - self._copies.pop(key, (0, 0.0))[0]
            self._copies[key] = size, time.monotonic()
            if pinned:
                self._pinned.add(key)
            self._trim(key)
        return path

    def find(self, key: Key) -> Path | None:
        """The copy, used now; None if there is none."""
        with self._lock:
            if key not in self._copies:
                return None
            self._copies[key] = self._copies.pop(key)[0], time.monotonic()
            return self._at(key)

    def release(self, key: Key) -> None:
        """A pinned copy may go."""
        with self._lock:
            self._pinned.discard(key)

    def forget(self, key: Key) -> None:
        """Removes a copy."""
        with self._lock:
            self._remove(key)

    def close(self) -> None:
        """Removes all copies."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _at(self, key: Key) -> Path:
        return self._folder / "@".join(key)  # which no name has

    def _remove(self, key: Key) -> None:
        self._total -= self._copies.pop(key, (0, 0.0))[0]
        self._pinned.discard(key)
        self._at(key).unlink(missing_ok=True)

    def _trim(self, newest: Key) -> None:
        if self._total <= SPOOL_BYTES:
            return
        now = time.monotonic()
        for key in [key for key in self._copies if key != newest and key not in self._pinned]:
            fresh = now - self._copies[key][1] < SPOOL_SECONDS and self._total <= 2 * SPOOL_BYTES
            if self._total <= SPOOL_BYTES or fresh:
                return
            self._remove(key)


def _shown(url: str) -> str:
    """A URL without a user's name and password, or what else is nobody's business."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

"""Blobs at a URL that fsspec knows, with a local copy of those written and read last."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import fsspec

from triptych.cluster.folders import private_folder
from triptych.errors import InvalidRequest

__all__ = ["ObjectStore"]

logger = logging.getLogger(__name__)

SPOOL_BYTES = 512 * 2**20
"""Of local copies; those used longest ago go first. What waits to be written is never more."""
SPOOL_SECONDS = 60.0
"""A copy stays at least so long after its last use, unless there is twice as much as there may be."""
IN_USE_SECONDS = 5.0
"""But so long in any case: somebody is about to open it."""
RETRY_SECONDS = 5.0
MANY_FAILURES = 16
"""So many in a row, or all there is to do, and the store is left alone for a while."""
CLOSE_SECONDS = 30.0
BATCH = 100
"""Blobs removed with one call."""
MAX_LEFT = 100_000
"""Things that a store which fails is still to do; older ones are forgotten."""

DONE = {"put": "written", "remove": "removed"}

Blob = bytes | bytearray | memoryview
Key = tuple[str, str]
Chore = tuple[Literal["put", "remove"], str, str]


class ObjectStore:
    """The place of an ArtifactFolder whose root is a URL; `wanted` says whether it still knows a blob. With `journal`,
    removals that are still to be carried out are kept beside the spool for whoever opens the same again. Raises
    InvalidRequest for a URL that cannot be written to. A store writes a blob whole or not at all."""

    def __init__(
        self, url: str, spool: Path | None, wanted: Callable[[str, str], bool], *, journal: bool = False
    ) -> None:
        self._wanted = wanted
        self._name = _shown(url)
        try:
            self._system, root = fsspec.core.url_to_fs(url)
            self._root = root.rstrip("/")
            self._folders = self._try_out()
        except Exception as error:  # whatever the system's library raises
            raise InvalidRequest(f"{self._name} cannot be used: {_said(error)}", field="artifacts") from None
        self._spool = _Spool(spool)
        digest = hashlib.sha256(self._name.encode()).hexdigest()[:16]
        kept = spool.with_name(f"{spool.name}-{digest}.removals") if journal and spool is not None else None
        self._journal = _Journal(kept)
        self._changed = threading.Condition()
        """its lock is never held while the store is asked"""
        self._busy: set[Key] = set()
        """what the store is asked about; with an empty name: the job's folder"""
        self._left: OrderedDict[Chore, bool] = OrderedDict()
        """what is to be done, and whether that has failed before"""
        self._doing: list[Chore] = []
        self._closing = False
        self._thread = threading.Thread(target=self._catch_up, name="triptych-artifacts", daemon=True)

    def _try_out(self) -> bool:
        """Whether there are folders that stay when nothing is in them."""
        self._system.makedirs(self._root, exist_ok=True)
        folder = f"{self._root}/.triptych-{secrets.token_hex(8)}"
        try:
            self._system.pipe_file(f"{folder}/probe", b"triptych")
        except FileNotFoundError:
            self._system.makedirs(folder, exist_ok=True)
            self._system.pipe_file(f"{folder}/probe", b"triptych")
        self._system.rm_file(f"{folder}/probe")
        if not self._system.isdir(folder):
            return False
        self._remove_folder(folder)
        return True

    def sizes(self) -> dict[str, dict[str, int]]:
        """The blobs that are there, by job and name; asked for once, first. Raises OSError."""
        found: dict[str, dict[str, int]] = {}
        prefix = self._root.strip("/")
        with self._asking():
            there: dict[str, Any] = self._system.find(self._root, detail=True)  # pyright: ignore[reportAssignmentType]
        for path, info in there.items():
            job, _, name = path.strip("/").removeprefix(prefix).strip("/").partition("/")
            if (job, name) in self._journal.keys:
                self._do_later("remove", (job, name))
            elif job and name and "/" not in name and not {job[0], name[0]} & {"."}:
                found.setdefault(job, {})[name] = int(info["size"])
        with self._changed:
            self._tidy()
        return found

    def write(self, job: str, name: str, parts: Iterable[Blob], note: Callable[[int], None], later: bool) -> int:
        """Writes a blob; `later`: in the background. `note` is given its size once it can be read. Raises OSError."""
        temporary = self._spool.draft(parts)
        size = temporary.stat().st_size
        try:
            if later:
                self._written(temporary, (job, name), size, note, later)
            else:
                with self._hold((job, name), (job, "")):
                    with self._asking():
                        self._put(temporary, job, name)
                    self._written(temporary, (job, name), size, note, later)
        finally:
            temporary.unlink(missing_ok=True)
        return size

    def _written(self, draft: Path, key: Key, size: int, note: Callable[[int], None], later: bool) -> None:
        with self._changed:
            self._journal.discard(key)
            self._spool.take(draft, key, size, pinned=later)
            note(size)
            if later:
                self._do_later("put", key)

    def is_near(self, job: str, name: str) -> bool:
        """Whether there is a copy; it stays for a moment."""
        return self._spool.find((job, name)) is not None

    def path(self, job: str, name: str, size: int) -> Path:
        """A local copy of a blob, fetched if need be. Raises FileNotFoundError, or OSError."""
        if (found := self._spool.find((job, name))) is not None:
            return found
        with self._hold((job, name)):
            if (found := self._spool.find((job, name))) is not None:
                return found
            temporary = self._spool.draft(())
            try:
                with self._asking():
                    self._system.get_file(self._at(job, name), str(temporary))
                came = temporary.stat().st_size
                if came != size:
                    raise OSError(f"{self._name} gave {came} bytes of {job}/{name}; expected: {size}")
                with self._changed:  # a newer one may be here meanwhile that is not there yet
                    newer = self._spool.find((job, name))
                    return newer or self._spool.take(temporary, (job, name), size, used=True)
            finally:
                temporary.unlink(missing_ok=True)

    def delete(self, job: str, names: list[str], whole: bool) -> None:
        """Removes blobs, in the background."""
        with self._changed:
            gone = [(job, name) for name in names if not self._wanted(job, name)]  # else written anew meanwhile
            self._journal.add(gone)
            for key in gone:
                self._spool.forget(key)
                self._do_later("remove", key)

    def close(self) -> None:
        """Waits a moment for what is left to do."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)
        with self._changed:
            left = {*self._left, *self._doing}
            self._tidy(always=True)
        if left:
            logger.warning("%s was left with %d blobs to write or remove", self._name, len(left))
        self._spool.close()

    # In the background.

    def _do_later(self, what: Literal["put", "remove"], key: Key, failed: bool = False) -> None:
        with self._changed:
            self._left.setdefault((what, *key), failed)
            while len(self._left) > MAX_LEFT:
                self._let_go(*self._left.popitem(last=False)[0])
            if not self._thread.is_alive() and not self._closing:
                with contextlib.suppress(RuntimeError):  # the interpreter ends
                    self._thread.start()
            self._changed.notify_all()

    def _let_go(self, what: str, job: str, name: str) -> None:
        if what == "put" and ("put", job, name) not in self._left:
            self._spool.release((job, name))

    def _catch_up(self) -> None:
        complained, failures = False, 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._left or self._closing)
                if not self._left:
                    return
                failed = self._take_some()
            what, job, name = self._doing[0]
            try:
                self._do()
            except OSError as error:
                failures += 1
                if not complained and not failed:
                    logger.error("%s/%s cannot be %s yet: %s", job, name, DONE[what], error)
                complained = True
                with self._changed:
                    for what, job, name in self._doing:  # behind all others, which may go well
                        self._do_later(what, (job, name), failed=True)
                    self._doing = []
                    if failures >= min(len(self._left), MANY_FAILURES):
                        if self._closing:
                            return
                        failures = 0
                        self._changed.wait_for(lambda: self._closing, RETRY_SECONDS)
                continue
            complained, failures = False, 0
            with self._changed:
                done, self._doing = self._doing, []
                for chore in done:
                    self._let_go(*chore)
                self._tidy()

    def _take_some(self) -> bool:
        """What is done next: removals together, but what has failed alone. Returns whether it has."""
        first, failed = next(iter(self._left.items()))
        alike = itertools.takewhile(lambda item: item[0][0] == "remove" and not item[1], self._left.items())
        batch = [chore for chore, _ in itertools.islice(alike, BATCH)]
        self._doing = batch or [first]
        for chore in self._doing:
            del self._left[chore]
        return failed

    def _do(self) -> None:
        what, keys = self._doing[0][0], [(job, name) for _, job, name in self._doing]
        with self._hold(*keys, *((job, "") for job, _ in keys)), self._asking():
            if what == "remove":
                self._remove([key for key in keys if not self._wanted(*key)])
                return
            for job, name in keys:
                found = self._spool.find((job, name))
                if found is not None and self._wanted(job, name):
                    self._put(found, job, name)

    def _tidy(self, always: bool = False) -> None:
        """Keeps of the journal what is still true."""
        left = [(job, name) for what, job, name in (*self._left, *self._doing) if what == "remove"]
        if always or not left or self._journal.lines > 2 * len(left) + 1000:
            self._journal.rewrite([key for key in left if not self._wanted(*key)])

    @contextlib.contextmanager
    def _hold(self, *keys: Key) -> Iterator[None]:
        """One at a time asks the store about these."""
        with self._changed:
            self._changed.wait_for(lambda: self._busy.isdisjoint(keys))
            self._busy.update(keys)
        try:
            yield
        finally:
            with self._changed:
                self._busy.difference_update(keys)
                self._changed.notify_all()

    # The store itself.

    def _put(self, file: Path, job: str, name: str) -> None:
        try:
            self._system.put_file(str(file), self._at(job, name))
        except FileNotFoundError:  # where folders have to be made
            self._system.makedirs(f"{self._root}/{job}", exist_ok=True)
            self._system.put_file(str(file), self._at(job, name))

    def _remove(self, keys: list[Key]) -> None:
        self._remove_files([self._at(*key) for key in keys])
        for job in dict.fromkeys(job for job, _ in keys) if self._folders else ():
            self._remove_folder(f"{self._root}/{job}")

    def _remove_files(self, paths: list[str]) -> None:
        if len(paths) > 1 and not set("*?[") & set(self._root):  # which would be a pattern there
            with contextlib.suppress(FileNotFoundError):  # one is gone already; the others may not be
                self._system.rm(paths)  # pyright: ignore[reportArgumentType]
                return
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                self._system.rm_file(path)

    def _remove_folder(self, folder: str) -> None:
        with contextlib.suppress(Exception):  # one that stays harms nobody
            if not self._system.ls(folder, detail=False):  # some systems' `rmdir` takes what is in it along
                self._system.rmdir(folder)

    def _at(self, job: str, name: str) -> str:
        return f"{self._root}/{job}/{name}"

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """What the store's library raises, as OSError."""
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:
            raise OSError(f"{self._name} failed: {_said(error)}") from error


class _Journal:
    """Removals that are still to be carried out, in a file that outlives the process: a line `-job/name` for each, and
    `+job/name` for what was written anew. Without a path, nothing."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.keys: set[Key] = set()
        self.lines = 0
        if path is None or not path.exists():
            return
        for line in path.read_text().splitlines(keepends=True):
            job, _, name = line[1:].rstrip("\n").partition("/")
            if line.endswith("\n") and job and name:  # else of a process that was killed while it wrote
                (self.keys.add if line[0] == "-" else self.keys.discard)((job, name))
        self.rewrite(list(self.keys))

    def add(self, keys: list[Key]) -> None:
        """These are to be removed."""
        try:
            self._note("-", keys)
            self.keys.update(keys)
        except OSError as error:
            logger.warning("%d removals would not outlive this process: %s", len(keys), error)

    def discard(self, key: Key) -> None:
        """This one is not. Raises OSError."""
        if key in self.keys:
            self._note("+", [key])
            self.keys.discard(key)

    def rewrite(self, keys: list[Key]) -> None:
        """These are, and no others."""
        if self._path is None or not (self.lines or self.keys):
            return
        try:
            draft = self._path.with_name(f".{self._path.name}")
            draft.unlink(missing_ok=True)
            self.keys, self.lines = set(keys), len(keys)
            _append(draft, "-", keys)
            draft.replace(self._path)
        except OSError as error:
            logger.warning("%s cannot be written: %s", self._path, error)

    def _note(self, sign: str, keys: list[Key]) -> None:
        if self._path is not None and keys:
            _append(self._path, sign, keys)
            self.lines += len(keys)


def _append(path: Path, sign: str, keys: list[Key]) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w") as file:
        file.writelines(f"{sign}{job}/{name}\n" for job, name in keys)


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

    def take(self, draft: Path, key: Key, size: int, *, pinned: bool = False, used: bool = False) -> Path:
        """Makes a draft the copy of a blob; one that is `pinned` stays until it is released. `used`: it is about to be
        opened. Raises OSError."""
        path = self._at(key)
        with self._lock:
            waiting = sum(self._copies[other][0] for other in self._pinned - {key})
            if pinned and waiting + size > SPOOL_BYTES:
                raise OSError(f"{waiting} bytes wait to be written already, {size} more are too many")
            draft.replace(path)
            self._total += size - self._copies.pop(key, (0, 0.0))[0]
            self._copies[key] = size, time.monotonic() - (0.0 if used else IN_USE_SECONDS)
            if pinned:
                self._pinned.add(key)
            self._trim(key)
        return path

    def find(self, key: Key) -> Path | None:
        """The copy, used now; None if there is none."""
        with self._lock:
            if key not in self._copies:
                return None
            if not self._at(key).exists():  # somebody else has cleaned up
                self._remove(key)
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
            stays = SPOOL_SECONDS if self._total <= 2 * SPOOL_BYTES else IN_USE_SECONDS
            if self._total <= SPOOL_BYTES or now - self._copies[key][1] < stays:
                return
            self._remove(key)


def _shown(url: str) -> str:
    """A URL without a user's name and password, or what else is nobody's business."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

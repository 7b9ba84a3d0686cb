"""Named blobs per job: results, checkpoints and pictures, in a folder or at an fsspec URL."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

from triptych.cluster.folders import private_folder
from triptych.errors import InvalidRequest

__all__ = ["ArtifactFolder"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_TEMPORARY = ".new-"

Blob = bytes | bytearray | memoryview


class ArtifactFolder:
    """Where blobs lie under a job and a name: `ROOT/job/name`. Thread-safe.

    `root`: a local folder, made with mode 0700 (its files 0600), or a URL that fsspec knows (`s3://…`, `memory://…`).
    A blob is there whole or not at all, and lasts when `write` returns. Names are letters, digits, dots, hyphens and
    underscores; others raise InvalidRequest. What is not there raises KeyError, a store that fails OSError.

    Of a URL, `spool` is a private local folder for what was written and read last (None: a temporary one), so that
    nobody waits for the store twice; deletions are carried out in the background, and again until the store takes them,
    if need be by whoever opens it with the same spool next.
    `own`: what others have written below the URL is not looked at, and `close` deletes what was written by this one.
    """

    def __init__(self, root: str | Path, *, spool: Path | None = None, own: bool = False) -> None:
        self._lock = threading.Lock()
        self._sizes: dict[str, dict[str, int]] = {}
        self._own = own
        self._place: Place = _place(root, spool, self._has, own)
        if not own:
            self._sizes = self._place.sizes()

    def _has(self, job: str, name: str) -> bool:
        with self._lock:
            return name in self._sizes.get(job, {})

    def write(self, job: str, name: str, *parts: Blob) -> int:
        """Writes a blob of these parts, in place of one of that name; returns its bytes. Raises OSError."""
        return self._write(job, name, parts, later=False)

    def write_soon(self, job: str, name: str, *parts: Blob) -> int:
        """The same, but a blob behind a URL may only get there after the return; it can be read at once."""
        return self._write(job, name, parts, later=True)

    def _write(self, job: str, name: str, parts: Iterable[Blob], later: bool) -> int:
        _check(job, name)

        def note(size: int) -> None:
            with self._lock:
                self._sizes.setdefault(job, {})[name] = size

        return self._place.write(job, name, parts, note, later)

    def read(self, job: str, name: str) -> bytes:
        """A blob's bytes."""
        return bytes(self.view(job, name))

    def view(self, job: str, name: str) -> memoryview:
        """A blob, read-only; mapped, so that of a local file nothing is read before it is used."""
        with self._found(job, name):
            with contextlib.suppress(FileNotFoundError):  # of a URL, a copy may go before it is opened
                return _mapped(self._place.path(job, name, self.size(job, name)))
            return _mapped(self._place.path(job, name, self.size(job, name)))

    def is_near(self, job: str, name: str) -> bool:
        """Whether a blob, if there is one, can be read now without asking a store behind a URL."""
        return not self._has(job, name) or self._place.is_near(job, name)

    def path(self, job: str, name: str) -> Path:
        """The blob's file; of a blob behind a URL a copy, which stays for a while."""
        with self._found(job, name):
            return self._place.path(job, name, self.size(job, name))

    @contextlib.contextmanager
    def _found(self, job: str, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise KeyError(f"{job}/{name}") from None

    def size(self, job: str, name: str) -> int:
        """A blob's bytes, counted."""
        _check(job, name)
        with self._lock:
            sizes = self._sizes.get(job, {})
            if name not in sizes:
                raise KeyError(f"{job}/{name}")
            return sizes[name]

    def names(self, job: str) -> dict[str, int]:
        """The blobs of a job and their bytes, by name; empty for an unknown job."""
        _check(job)
        with self._lock:
            return dict(sorted(self._sizes.get(job, {}).items()))

    def jobs(self) -> list[str]:
        """The jobs that have blobs."""
        with self._lock:
            return sorted(job for job, sizes in self._sizes.items() if sizes)

    def total_bytes(self) -> int:
        """The bytes of all blobs."""
        with self._lock:
            return sum(sum(sizes.values()) for sizes in self._sizes.values())

    def delete(self, job: str, name: str | None = None) -> None:
        """Removes a job's blob, or all it has. What is not there already is fine; open views stay good."""
        _check(job, *([] if name is None else [name]))
        with self._lock:
            known = list(self._sizes.get(job, {}))
            if name is None:
                self._sizes.pop(job, None)
            else:
                self._sizes.get(job, {}).pop(name, None)
                if not self._sizes.get(job):
                    self._sizes.pop(job, None)
        self._place.delete(job, known if name is None else [name], whole=name is None)

    def close(self) -> None:
        """Waits a moment for what is still to be carried out. Twice is fine."""
        for job in self.jobs() if self._own else ():
            self.delete(job)
        self._place.close()


class Place(Protocol):
    """Where the blobs really are."""

    def sizes(self) -> dict[str, dict[str, int]]: ...
    def write(self, job: str, name: str, parts: Iterable[Blob], note: Callable[[int], None], later: bool) -> int: ...
    def is_near(self, job: str, name: str) -> bool: ...
    def path(self, job: str, name: str, size: int) -> Path: ...
    def delete(self, job: str, names: list[str], whole: bool) -> None: ...
    def close(self) -> None: ...


class _Local:
    def __init__(self, root: Path) -> None:
        private_folder(root, "artifacts")
        self._root = root
        for left in root.glob(f"*/{_TEMPORARY}*"):  # by a process that was killed while it wrote
            left.unlink(missing_ok=True)

    def sizes(self) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        for file in self._root.glob("*/*"):
            if file.is_file() and _NAME.fullmatch(file.name) and _NAME.fullmatch(file.parent.name):
                found.setdefault(file.parent.name, {})[file.name] = file.stat().st_size
        return found

    def write(self, job: str, name: str, parts: Iterable[Blob], note: Callable[[int], None], later: bool) -> int:
        folder = self._root / job
        temporary = folder / f"{_TEMPORARY}{secrets.token_hex(8)}"
        try:
            with self._new_file(temporary) as file:
                size = sum(file.write(part) for part in parts)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, folder / name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        for changed in (folder, self._root):
            _sync(changed)
        note(size)
        return size

    def _new_file(self, path: Path) -> Any:
        for _ in range(8):
            path.parent.mkdir(mode=0o700, exist_ok=True)
            # `delete` may take the folder away in between, when this was to be its first blob.
            with contextlib.suppress(FileNotFoundError):
                return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
        raise FileNotFoundError(f"{path.parent} is removed again and again")

    def is_near(self, job: str, name: str) -> bool:
        return True

    def path(self, job: str, name: str, size: int) -> Path:
        return self._root / job / name

    def delete(self, job: str, names: list[str], whole: bool) -> None:
        folder = self._root / job
        if whole:
            shutil.rmtree(folder, ignore_errors=True)
            return
        for name in names:
            (folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty, or not there
            folder.rmdir()

    def close(self) -> None:
        pass


def _mapped(path: Path) -> memoryview:
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _place(root: str | Path, spool: Path | None, wanted: Callable[[str, str], bool], own: bool) -> Place:
    scheme, separator, rest = str(root).partition("://")
    if isinstance(root, Path) or not separator:
        return _Local(Path(root).absolute())
    if scheme in {"file", "local"}:
        return _Local(Path(unquote(rest)))
    from triptych.cluster.storage.object_store import ObjectStore  # fsspec is slow to import, and needed only there

    return ObjectStore(str(root), spool, wanted, journal=not own)


def _check(*names: str) -> None:
    for name in names:
        if not _NAME.fullmatch(name):
            raise InvalidRequest.of("name", name, "letters, digits, dots, hyphens and underscores, at most 128")


def _sync(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

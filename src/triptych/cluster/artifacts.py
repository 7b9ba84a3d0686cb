"""Named blobs per job: results, checkpoints and pictures, in a folder or at an fsspec URL."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

from triptych.cluster.endpoints import private_folder
from triptych.errors import InvalidRequest

__all__ = ["ArtifactFolder"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_TEMPORARY = ".new-"

Blob = bytes | bytearray | memoryview


class ArtifactFolder:
    """Where blobs lie under a job and a name: `ROOT/job/name`. Thread-safe.

    `root`: a local folder, made with mode 0700 (its files 0600), or a URL that fsspec knows (`s3://…`, `memory://…`).
    A blob is there whole or not at all, and locally on the disk when `write` returns. Names are letters, digits, dots,
    hyphens and underscores; others raise InvalidRequest. What is not there raises KeyError.
    """

    def __init__(self, root: str | Path) -> None:
        self._place: _Place = _place(root)
        self._lock = threading.Lock()
        self._sizes = self._place.sizes()

    def write(self, job: str, name: str, *parts: Blob) -> int:
        """Writes a blob of these parts, in place of one of that name; returns its bytes. Raises OSError."""
        _check(job, name)
        size = self._place.write(job, name, parts)
        with self._lock:
            self._sizes.setdefault(job, {})[name] = size
        return size

    def read(self, job: str, name: str) -> bytes:
        """A blob's bytes."""
        return bytes(self.view(job, name))

    def view(self, job: str, name: str) -> memoryview:
        """A blob, read-only; of a local file mapped, so that nothing is read before it is used."""
        _check(job, name)
        try:
            return self._place.view(job, name)
        except FileNotFoundError:
            raise KeyError(f"{job}/{name}") from None

    def path(self, job: str, name: str) -> Path | None:
        """The blob's file; None where the root is no local folder."""
        self.size(job, name)
        return self._place.path(job, name)

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
        self._place.delete(job, name)
        with self._lock:
            if name is not None:
                self._sizes.get(job, {}).pop(name, None)
            if name is None or not self._sizes.get(job):
                self._sizes.pop(job, None)


class _Place(Protocol):
    def sizes(self) -> dict[str, dict[str, int]]: ...
    def write(self, job: str, name: str, parts: Iterable[Blob]) -> int: ...
    def view(self, job: str, name: str) -> memoryview: ...
    def path(self, job: str, name: str) -> Path | None: ...
    def delete(self, job: str, name: str | None) -> None: ...


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

    def write(self, job: str, name: str, parts: Iterable[Blob]) -> int:
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
        return size

    def _new_file(self, path: Path) -> Any:
        for _ in range(8):
            path.parent.mkdir(mode=0o700, exist_ok=True)
            # `delete` may take the folder away in between, when this was to be its first blob.
            with contextlib.suppress(FileNotFoundError):
                return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
        raise FileNotFoundError(f"{path.parent} is removed again and again")

    def view(self, job: str, name: str) -> memoryview:
        with open(self._root / job / name, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return memoryview(b"")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def path(self, job: str, name: str) -> Path | None:
        return self._root / job / name

    def delete(self, job: str, name: str | None) -> None:
        folder = self._root / job
        if name is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            (folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty, or not there
                folder.rmdir()


class _Remote:
    """An object store writes a blob whole or not at all."""

    def __init__(self, url: str) -> None:
        import fsspec  # slow to import, and needed only here

        try:
            self._system, self._root = fsspec.core.url_to_fs(url)
            self._system.makedirs(self._root, exist_ok=True)
        except (ValueError, ImportError, OSError) as error:
            raise InvalidRequest(f"{url} cannot be used: {error}", field="artifacts") from None

    def sizes(self) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        prefix = self._root.strip("/")
        for path, info in self._system.find(self._root, detail=True).items():
            job, _, name = path.strip("/").removeprefix(prefix).strip("/").partition("/")
            if _NAME.fullmatch(job) and _NAME.fullmatch(name):
                found.setdefault(job, {})[name] = int(info["size"])
        return found

    def write(self, job: str, name: str, parts: Iterable[Blob]) -> int:
        data = b"".join(parts)
        self._system.makedirs(f"{self._root}/{job}", exist_ok=True)
        self._system.pipe_file(f"{self._root}/{job}/{name}", data)
        return len(data)

    def view(self, job: str, name: str) -> memoryview:
        return memoryview(self._system.cat_file(f"{self._root}/{job}/{name}"))

    def path(self, job: str, name: str) -> Path | None:
        return None

    def delete(self, job: str, name: str | None) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._system.rm(f"{self._root}/{job}" + (f"/{name}" if name else ""), recursive=name is None)


def _place(root: str | Path) -> _Place:
    scheme, separator, rest = str(root).partition("://")
    if isinstance(root, Path) or not separator:
        return _Local(Path(root).absolute())
    return _Local(Path(unquote(rest))) if scheme in {"file", "local"} else _Remote(str(root))


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

"""The same host: a pool's segments are handed once to each reader over a Unix socket, read-only, and read in place.

A reader maps a segment privately: what a consumer writes into its input goes to pages of its own, which are dropped
when it is done, so that the kept original and whatever lies there next are always seen as they are.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import socket
import stat
import struct
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from triptych.errors import PayloadLost, Unsupported
from triptych.transfer.pool import PAGE, Pool, prefault_read
from triptych.transfer.wire import Unreachable

logger = logging.getLogger(__name__)

_ASK = struct.Struct("<8sI")
_ANSWER = struct.Struct("<QI")
_CREDENTIALS = struct.Struct("3i")
_MAGIC = b"tripfd01"
_NAME = "triptych-transfer-"
_SOCKET = ".sock"
_MAX_PATH = 100
_MAX_SEGMENTS = 4096
_MAX_PEERS = 64
_GRACE_SECONDS = 60.0
_PAUSE_SECONDS = 0.1
_OF_FILE = bytes(top for top in range(256) if not top & 0xC0 or top & 0x20)
"""the top bytes of those entries of a page map that are not present (0x80) or swapped (0x40), or are a file's (0x20)"""
_MARKS = bytes(int(top not in _OF_FILE) for top in range(256))
Segments = tuple[int, int, list[int]]
"""A descriptor, the size of its segment, and the peer's segments that there still are."""


def boot_id() -> str:
    """What names this machine until it restarts; empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def own_folder(folder: Path | None) -> tuple[Path, bool]:
    """A folder of mode 0700 for sockets, and whether it was made here. Sockets that dead processes left are removed.

    Raises Unsupported for one that cannot be made, that others can enter or whose path is too long for a socket.
    """
    if folder is None:
        _sweep_temporary()
        return Path(tempfile.mkdtemp(prefix=_NAME)), True
    if len(os.fsencode(folder)) > _MAX_PATH - 24:
        raise Unsupported(f"{folder} is too long for a socket's path; at most {_MAX_PATH - 24} bytes", field="folder")
    try:
        made = not folder.exists()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.lstat()
    except OSError as error:
        raise Unsupported(f"{folder} cannot be a folder ({error.strerror})", field="folder") from None
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o077:
        raise Unsupported(f"{folder} must be a folder of this user's with mode 0700", field="folder")
    _sweep(folder)
    return folder, made


def _sweep_temporary() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_NAME}*"):
        with contextlib.suppress(OSError):
            about = folder.lstat()
            if stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid():
                _sweep(folder)
                if time.time() - about.st_mtime > _GRACE_SECONDS:
                    folder.rmdir()  # fails, as it should, while a socket is in it


def _sweep(folder: Path) -> None:
    for path in folder.glob(f"*{_SOCKET}"):
        if not _is_served(str(path)):
            with contextlib.suppress(OSError):
                path.unlink()


def peer_uid(connection: socket.socket) -> int:
    """The user at the other end of a Unix socket."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return _CREDENTIALS.unpack(raw)[1]


class SegmentServer:
    """Hands out read-only descriptors of a pool's segments to processes of the same user. Raises Unsupported for a
    folder that no socket can be in."""

    def __init__(self, pool: Pool, folder: Path, owner: str) -> None:
        self._pool = pool
        self.path = folder / f"{owner}{_SOCKET}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        fresh = self.path.with_suffix(".new")
        try:
            self._socket.bind(str(fresh))
        except OSError as error:
            self._socket.close()
            raise Unsupported(f"no socket can be in {folder} ({error.strerror or error})", field="folder") from None
        self._socket.listen(64)
        self._closed = False
        fresh.rename(self.path)  # only now: a sweep takes a socket that refuses for a dead one
        self._thread = threading.Thread(target=self._serve, name="transfer-segments", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError as error:
                if self._closed:
                    return
                logger.warning("a reader could not be answered: %s", error)  # short of descriptors, for example
                time.sleep(_PAUSE_SECONDS)
                continue
            with connection, contextlib.suppress(OSError, struct.error):
                connection.settimeout(1.0)
                if peer_uid(connection) == os.getuid():
                    self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        magic, index = _ASK.unpack(connection.recv(_ASK.size, socket.MSG_WAITALL))
        found = self._pool.segment(index) if magic == _MAGIC else None
        if found is None:
            return
        fd, size = found
        try:
            readable = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(fd)
        live = self._pool.live()
        try:
            socket.send_fds(connection, [_ANSWER.pack(size, len(live))], [readable])
        finally:
            os.close(readable)
        connection.sendall(struct.pack(f"<{len(live)}I", *live))

    def close(self) -> None:
        """Stops serving and removes the socket."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(5.0)
        self.path.unlink(missing_ok=True)


class _Descriptor:
    """An open file that closes with the last that refers to it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        weakref.finalize(self, os.close, fd)


@dataclass(eq=False)
class View:
    """A peer's segment, mapped privately; `lent` are the ranges that consumers hold."""

    file: _Descriptor
    size: int
    memory: mmap.mmap
    bytes: np.ndarray
    address: int
    lent: list[tuple[int, int]] = field(default_factory=list)

    def is_lent(self, start: int, size: int) -> bool:
        """Whether a consumer holds any of it."""
        return any(begin < start + size and start < end for begin, end in self.lent)


@dataclass(eq=False, slots=True)
class Borrowed:
    """A range of a peer's segment in a consumer's hands. `whole`: of the shared mapping, not of one of its own."""

    view: View
    start: int
    bytes: np.ndarray
    whole: bool


class SegmentReader:
    """Maps peers' segments, each once. Any thread may call."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._peers: OrderedDict[str, dict[int, View]] = OrderedDict()
        self._paths: dict[str, str] = {}
        """of the peers' sockets"""
        self._lock = threading.Lock()
        self._page_map = _page_map()

    def borrow(self, owner: str, index: int, start: int, size: int, ask: Callable[[int], Segments]) -> Borrowed:
        """A range of a peer's segment. `ask` gets the descriptor, the size and the live segments of one not yet
        mapped. Raises Unreachable if the peer does not answer, PayloadLost if the range is not in the segment."""
        view = self._view(owner, index, ask)
        _require_inside(view, start, size)
        with self._lock:
            if not view.is_lent(start, size):
                view.lent.append((start, start + size))
                return Borrowed(view, start, view.bytes[start : start + size], True)
        # Another consumer here holds the range and may have written into it: map it anew.
        memory = _mapped(view.file.fd, size, start)
        return Borrowed(view, start, np.frombuffer(memory, dtype=np.uint8), False)

    def knows(self, owner: str, at: str) -> bool:
        """Whether the segment at a place is mapped already."""
        with contextlib.suppress(Unreachable), self._lock:
            return place_of(at)[1] in self._peers.get(owner, {})
        return False

    def _view(self, owner: str, index: int, ask: Callable[[int], Segments]) -> View:
        with self._lock:
            view = self._peers.get(owner, {}).get(index)
        if view is not None:
            return view
        fd, size, live = ask(index)
        self._forget_dead(owner)
        try:
            memory = _mapped(fd, size, 0)
            prefault_read(memory)
        except (OSError, ValueError) as error:
            os.close(fd)
            raise Unreachable(f"cannot map a segment of {owner} ({error})") from None
        array = np.frombuffer(memory, dtype=np.uint8)
        fresh = View(_Descriptor(fd), size, memory, array, array.ctypes.data)
        with self._lock:
            views = self._peers.setdefault(owner, {})
            self._peers.move_to_end(owner)
            for stale in set(views) - set(live):
                del views[stale]
            view = views.setdefault(index, fresh)
            while len(self._peers) > _MAX_PEERS:
                self._paths.pop(self._peers.popitem(last=False)[0], None)
        return view

    def _forget_dead(self, newest: str) -> None:
        """A new peer often stands for one that has died, whose whole pool our mapping keeps in memory."""
        with self._lock:
            others = {owner: path for owner, path in self._paths.items() if owner != newest}
        for owner, path in others.items():
            if not _is_served(path):
                self.peer_gone(owner)

    def copy(
        self, owner: str, index: int, start: int, size: int, used: int, ask: Callable[[int], Segments]
    ) -> bytearray | None:
        """A copy of the first `used` bytes of a range, which for little is faster than lending it; None where a
        consumer holds the range. Raises like `borrow`."""
        view = self._view(owner, index, ask)
        _require_inside(view, start, size)
        with self._lock:
            return None if view.is_lent(start, size) else bytearray(view.bytes.data[start : start + used])

    def give_back(self, borrowed: Borrowed) -> None:
        """The consumer is done: what it wrote there is dropped."""
        if not borrowed.whole:
            return
        view, start, size = borrowed.view, borrowed.start, borrowed.bytes.size
        self._reset(view, start, size)
        with self._lock:
            view.lent.remove((start, start + size))

    def _reset(self, view: View, start: int, size: int) -> None:
        """Drops our own copies of pages. Which they are is asked first: unmapping them all costs the next reader more
        than its digest does."""
        first, last = 0, size // PAGE
        if self._page_map is not None:
            ours = _own_pages(self._page_map, view.address + start, last)
            if ours is None:
                return
            first, last = ours
        view.memory.madvise(mmap.MADV_DONTNEED, start + first * PAGE, (last - first) * PAGE)

    def peer_gone(self, owner: str) -> None:
        """Lets go of its segments; what consumers still hold stays mapped until they drop it."""
        with self._lock:
            self._peers.pop(owner, None)
            self._paths.pop(owner, None)

    def trim(self) -> None:
        """Unmaps what no consumer holds; it is mapped again when it has to be. Until then a segment that its owner has
        given up stays in memory."""
        with self._lock:
            for views in self._peers.values():
                for index in [index for index, view in views.items() if not view.lent]:
                    del views[index]

    def close(self) -> None:
        """Lets go of everything."""
        with self._lock:
            self._peers.clear()
            self._paths.clear()
            if self._page_map is not None:
                os.close(self._page_map)
                self._page_map = None

    def ask(self, path: str, index: int) -> Segments:
        """A peer's segment over its socket. Raises Unreachable."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(self._timeout)
                connection.connect(path)
                if peer_uid(connection) != os.getuid():
                    raise Unreachable(f"{path} belongs to another user")
                connection.sendall(_ASK.pack(_MAGIC, index))
                segments = _received(connection, path, index)
        except (OSError, struct.error) as error:
            raise Unreachable(f"{path} does not answer ({error})") from None
        with self._lock:
            self._paths[Path(path).name.removesuffix(_SOCKET)] = path
        return segments


def _is_served(path: str) -> bool:
    """Whether a process listens at a socket."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
    return True


def place_of(at: str) -> tuple[str, int, int, int]:
    """The socket's path, the segment's index, and where in it a payload lies: its start and size. Raises
    Unreachable."""
    where, _, place = at.rpartition("#")
    try:
        index, start, size = map(int, place.split(":"))
    except ValueError:
        raise Unreachable(f"{place!r} is no place in a pool") from None
    return where.partition(":")[2], index, start, size


def _require_inside(view: View, start: int, size: int) -> None:
    if start % PAGE or start < 0 or size < 1 or start + size > view.size:
        raise PayloadLost(f"{size} bytes from {start} on are no range of a segment of {view.size}")


def _mapped(fd: int, size: int, offset: int) -> mmap.mmap:
    """A private mapping: its pages are the file's until we write to them."""
    return mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0), offset=offset)


def _page_map() -> int | None:
    """The process's page map, if it tells pages of our own from a file's."""
    try:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    own = np.frombuffer(mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=np.uint8)
    own[0] = 1
    if _own_pages(fd, own.ctypes.data, 1) is not None:
        return fd
    os.close(fd)
    return None


def _own_pages(page_map: int, address: int, count: int) -> tuple[int, int] | None:
    """The first of `count` pages from an address on that is not a file's, and the one after the last; all where the
    map does not tell."""
    top = os.pread(page_map, 8 * count, address // PAGE * 8)[7::8]
    if len(top) != count:
        return 0, count
    if not top.translate(None, _OF_FILE):
        return None
    ours = top.translate(_MARKS)
    return ours.index(1), ours.rindex(1) + 1


def _received(connection: socket.socket, path: str, index: int) -> Segments:
    data, fds, _, _ = socket.recv_fds(connection, _ANSWER.size, 1)
    if not fds:
        raise PayloadLost(f"segment {index} is gone from {path}")
    try:
        size, count = _ANSWER.unpack(data)
        if count > _MAX_SEGMENTS or os.fstat(fds[0]).st_size != size:
            raise Unreachable(f"{path} answers nonsense")
        live = struct.unpack(f"<{count}I", connection.recv(4 * count, socket.MSG_WAITALL))
    except BaseException:
        os.close(fds[0])
        raise
    return fds[0], size, list(live)

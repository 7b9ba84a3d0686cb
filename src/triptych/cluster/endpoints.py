"""Where a listener listens: Unix sockets in a folder of ours, TCP ports with keys, nothing else."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import IO

import zmq

from triptych.cluster.keys import ServerKeys
from triptych.errors import InvalidRequest, Unsupported
from triptych.line import MAX_MESSAGE, MAX_QUEUED

__all__ = ["ZAP_DOMAIN", "Door", "open_door", "private_folder"]

ZAP_DOMAIN = "triptych"
MAX_SOCKET_PATH = 107
FORMS = "ipc://PATH, tcp://HOST:PORT or HOST:PORT"


class Door:
    """One bound ROUTER socket. `endpoint` is where it really is, its port chosen if none was given."""

    def __init__(self, socket: zmq.Socket[bytes], endpoint: str, lock: IO[bytes] | None) -> None:
        self.socket = socket
        self.endpoint = endpoint
        self.guarded = lock is None
        """whether every frame carries the key of who sent it"""
        self._lock = lock

    def close(self) -> None:
        """Closes the socket; what was sent is given half a second to leave."""
        self.socket.close(linger=500)

    def release(self) -> None:
        """Leaves the place to others. Only after the context has ended: it takes the socket's file away late."""
        if self._lock is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.endpoint.removeprefix("ipc://"))
            self._lock.close()


def open_door(context: zmq.Context[zmq.Socket[bytes]], given: str, keys: ServerKeys | None) -> Door:
    """Binds an endpoint. Raises InvalidRequest (field `listen` or `keys`) or Unsupported, saying what is wrong."""
    endpoint = given if "://" in given else f"tcp://{given}"
    scheme, _, rest = endpoint.partition("://")
    if scheme not in {"ipc", "tcp"} or not rest or (scheme == "tcp" and ":" not in rest):
        raise InvalidRequest.of("listen", given, FORMS)
    if scheme == "tcp" and keys is None:
        raise InvalidRequest(
            f"{given} needs keys (`triptych keys`); without, only a Unix socket (ipc://PATH) is opened", field="keys"
        )
    lock = _lock_path(Path(rest)) if scheme == "ipc" else None
    router = _router(context)
    router.set(zmq.IPV6, int(rest.startswith(("[", "*"))))
    try:
        if keys is not None and scheme == "tcp":
            router.curve_server = True
            router.curve_secretkey = keys.secret.encode()
            router.zap_domain = ZAP_DOMAIN.encode()
        router.bind(endpoint)
    except zmq.ZMQError as error:
        router.close(linger=0)
        if lock is not None:
            lock.close()
        raise _refusal(given, error) from None
    if lock is not None:
        os.chmod(rest, 0o600)
    bound = router.get(zmq.LAST_ENDPOINT)
    return Door(router, bound.rstrip(b"\0").decode() if isinstance(bound, bytes) else str(bound), lock)


def private_folder(folder: Path, name: str) -> None:
    """Makes a folder with mode 0700, or sees that it is one of ours. Raises InvalidRequest for the field `name`."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise InvalidRequest(f"{folder} cannot be used: {error.strerror}", field=name) from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise InvalidRequest(f"{folder} is not a folder of this user", field=name)
    if status.st_mode & 0o077:
        mode = status.st_mode & 0o777
        raise InvalidRequest(f"{folder} is open to others ({mode:04o}): chmod 700 {folder}", field=name)


def _router(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    router = context.socket(zmq.ROUTER)
    router.set(zmq.ROUTER_MANDATORY, 1)
    router.set(zmq.ROUTER_HANDOVER, 1)  # a worker that reconnects takes its place from its dead connection
    router.set(zmq.SNDHWM, 2 * MAX_QUEUED)  # the lines' own bounds come first
    router.set(zmq.MAXMSGSIZE, MAX_MESSAGE + 64)
    router.set(zmq.HEARTBEAT_IVL, 1000)
    router.set(zmq.HEARTBEAT_TIMEOUT, 5000)
    router.set(zmq.HANDSHAKE_IVL, 5000)
    return router


def _lock_path(path: Path) -> IO[bytes]:
    # ZeroMQ takes a socket's file from whoever listens there; the lock tells a live listener from a dead one's file.
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise InvalidRequest.of("listen", str(path), f"a path of at most {MAX_SOCKET_PATH} bytes for a Unix socket")
    private_folder(path.parent, "listen")
    try:
        lock = open(f"{path}.lock", "wb")  # noqa: SIM115
    except OSError as error:
        raise InvalidRequest(f"{path.parent} cannot be used: {error.strerror}", field="listen") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise InvalidRequest(f"another coordinator listens at {path}", field="listen") from None
    return lock


def _refusal(given: str, error: zmq.ZMQError) -> InvalidRequest | Unsupported:
    if error.errno == errno.EADDRINUSE:
        return InvalidRequest(f"the port of {given} is in use", field="listen")
    if error.errno in {errno.EINVAL, errno.ENODEV}:
        return InvalidRequest.of("listen", given, f"{FORMS}, with an address of this machine")
    if error.errno == errno.EADDRNOTAVAIL:
        return InvalidRequest(f"{given} is no address of this machine", field="listen")
    return Unsupported(f"{given} cannot be opened: {error.strerror}", field="listen")

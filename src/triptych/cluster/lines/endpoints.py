"""Where a listener listens: Unix sockets in a folder of ours, TCP ports with keys, nothing else."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import IO

import zmq

from triptych.cluster.folders import private_folder
from triptych.cluster.lines.doors import Door, UnixDoor, ZmqDoor, router
from triptych.cluster.lines.keys import ServerKeys
from triptych.errors import InvalidRequest, Unsupported
from triptych.stream import MAX_PATH

__all__ = ["ZAP_DOMAIN", "open_door"]

ZAP_DOMAIN = "triptych"
FORMS = "ipc://PATH, tcp://HOST:PORT or HOST:PORT"


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
    if scheme == "ipc":
        return _unix_door(Path(rest), given)
    socket = router(context)
    socket.set(zmq.IPV6, int(rest.startswith(("[", "*"))))
    try:
        if keys is not None:
            socket.curve_server = True
            socket.curve_secretkey = keys.secret.encode()
            socket.zap_domain = ZAP_DOMAIN.encode()
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        socket.close(linger=0)
        raise _refusal(given, error) from None
    bound = socket.get(zmq.LAST_ENDPOINT)
    return ZmqDoor(socket, bound.rstrip(b"\0").decode() if isinstance(bound, bytes) else str(bound))


def _unix_door(path: Path, given: str) -> Door:
    lock = _lock_path(path)
    try:
        return UnixDoor(path, lock)
    except OSError as error:
        lock.close()
        raise _refusal(given, error) from None


def _lock_path(path: Path) -> IO[bytes]:
    # The lock tells a live listener from a dead one's file.
    if len(os.fsencode(path)) > MAX_PATH:
        raise InvalidRequest.of("listen", str(path), f"a path of at most {MAX_PATH} bytes for a Unix socket")
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


def _refusal(given: str, error: zmq.ZMQError | OSError) -> InvalidRequest | Unsupported:
    if error.errno == errno.EADDRINUSE and given.startswith("ipc:"):
        return InvalidRequest(f"{given} is a file that is no socket", field="listen")
    if error.errno == errno.EADDRINUSE:
        return InvalidRequest(f"the port of {given} is in use", field="listen")
    if error.errno in {errno.EINVAL, errno.ENODEV}:
        return InvalidRequest.of("listen", given, f"{FORMS}, with an address of this machine")
    if error.errno == errno.EADDRNOTAVAIL:
        return InvalidRequest(f"{given} is no address of this machine", field="listen")
    return Unsupported(f"{given} cannot be opened: {error.strerror}", field="listen")

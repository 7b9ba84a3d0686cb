"""CURVE keys as files: the server's pair, a file for each client, and the folder of the clients that may join."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from triptych.errors import InvalidRequest, LoadError, Unsupported

__all__ = [
    "AllowList",
    "ClientKeys",
    "ServerKeys",
    "load_client_keys",
    "load_server_keys",
    "make_client_keys",
    "make_server_keys",
    "remove_client",
]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_Z85 = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


@dataclass(frozen=True)
class ServerKeys:
    """The server's pair in Z85, and the folder of its clients' public keys."""

    public: str
    secret: str = field(repr=False)
    clients: Path


@dataclass(frozen=True)
class ClientKeys:
    """A client's pair and its server's public key, in Z85."""

    name: str
    public: str
    secret: str = field(repr=False)
    server: str


def make_server_keys(folder: Path) -> ServerKeys:
    """Makes `server.key` (0600), `server.pub` and the empty folder `clients` in a folder (0700).

    Raises InvalidRequest if there is a key already: replacing it would lock every client out.
    """
    clients = folder / "clients"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        clients.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"{folder} cannot be used: {error.strerror}", field="keys") from None
    public, secret = _pair()
    _write(folder / "server.key", {"public": public, "secret": secret}, 0o600)
    _write(folder / "server.pub", {"public": public}, 0o644)
    return ServerKeys(public, secret, clients)


def make_client_keys(folder: Path, name: str) -> Path:
    """Makes `NAME.key` (0600), the one file that a worker needs to join, and lists its public half in `clients`.

    Raises InvalidRequest for a name that is no file's or is taken, LoadError without a server's keys there.
    """
    if not _NAME.fullmatch(name) or name == "server":
        raise InvalidRequest.of("client", name, "letters, digits, dots, hyphens and underscores, but not 'server'")
    server = load_server_keys(folder)
    public, secret = _pair()
    path = folder / f"{name}.key"
    _write(path, {"name": name, "public": public, "secret": secret, "server": server.public}, 0o600)
    listed = server.clients / f"{name}.pub"
    listed.unlink(missing_ok=True)  # of a key whose file is gone: nobody holds it any more
    _write(listed, {"name": name, "public": public}, 0o644)
    return path


def remove_client(folder: Path, name: str) -> None:
    """Takes a client off the list; a running listener hangs up on it. Raises InvalidRequest if it is not listed."""
    listed = folder / "clients" / f"{name}.pub"
    if not _NAME.fullmatch(name) or not listed.exists():
        known = sorted(path.stem for path in listed.parent.glob("*.pub"))
        raise InvalidRequest.of("client", name, known or "nothing: no client is on the list")
    listed.unlink()
    (folder / f"{name}.key").unlink(missing_ok=True)


def load_server_keys(folder: Path) -> ServerKeys:
    """Reads `server.key`. Raises LoadError if it is missing, malformed, or open to others."""
    values = _read(folder / "server.key", {"public", "secret"}, private=True)
    return ServerKeys(values["public"], values["secret"], folder / "clients")


def load_client_keys(path: Path) -> ClientKeys:
    """Reads a client's file. Raises LoadError like `load_server_keys`."""
    values = _read(path, {"name", "public", "secret", "server"}, private=True)
    return ClientKeys(values["name"], values["public"], values["secret"], values["server"])


class AllowList:
    """The clients that may join, read again whenever a file of the folder is added, changed or removed. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._seen: tuple[tuple[str, int, int], ...] | None = None
        self._names: dict[str, str] = {}
        self.ignored: dict[str, str] = {}
        """files that could not be read, with the reason"""
        self.refresh()

    def name_of(self, public: str) -> str | None:
        """The client of this public key (Z85), None if it is not on the list."""
        with self._lock:
            return self._names.get(public)

    def refresh(self) -> bool:
        """Looks at the folder; True if the list was read anew. While the folder cannot be read the list stays."""
        try:
            seen = self._listing()
        except OSError:
            return False
        with self._lock:
            if seen == self._seen:
                return False
            self._seen, self._names, self.ignored = seen, {}, {}
            for file, _, _ in seen:
                try:
                    values = _read(self._folder / file, {"name", "public"}, private=False)
                    self._names[values["public"]] = Path(file).stem
                except LoadError as error:
                    self.ignored[file] = str(error)
            return True

    def _listing(self) -> tuple[tuple[str, int, int], ...]:
        found = []
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self._folder):
                with contextlib.suppress(FileNotFoundError):
                    if entry.name.endswith(".pub"):
                        stat = entry.stat()
                        found.append((entry.name, stat.st_mtime_ns, stat.st_ino))
        return tuple(sorted(found))


def _pair() -> tuple[str, str]:
    if not zmq.has("curve"):
        raise Unsupported("this installation's ZeroMQ was built without CURVE")
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def _write(path: Path, values: dict[str, str], mode: int) -> None:
    text = "".join(f'{name} = "{value}"\n' for name, value in values.items())  # no name or Z85 has quotes in it
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise InvalidRequest(f"{path} exists already and is not overwritten", field="keys") from None
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror}", field="keys") from None
    with open(descriptor, "w", encoding="utf-8") as file:
        os.fchmod(descriptor, mode)  # whatever the umask left of it
        file.write(text)


def _read(path: Path, names: set[str], *, private: bool) -> dict[str, str]:
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(4096)
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror}", field="keys") from None
    if private and mode & 0o077:
        raise LoadError(f"{path} has open permissions ({mode & 0o777:04o}): chmod 600 {path}", field="keys")
    try:
        values = tomllib.loads(data.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError):
        raise LoadError(f"{path} is no key file", field="keys") from None
    wrong = [name for name in names - {"name"} if not _Z85.fullmatch(str(values.get(name, "")))]
    if wrong or ("name" in names and not _NAME.fullmatch(str(values.get("name", "")))):
        raise LoadError(f"{path} is no key file with {', '.join(sorted(names))}", field="keys")
    return {name: str(values[name]) for name in names}

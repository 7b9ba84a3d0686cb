"""Jobs that clients name themselves, so that asking twice makes one."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from triptych.errors import InvalidRequest

__all__ = ["Names", "kept_secret"]

_BYTES = 32


def kept_secret(folder: Path) -> bytes:
    """The folder's secret, made at the first call. Whoever knows it can tell what id a client's name for a job leads
    to. The folder must be the caller's alone."""
    path = folder / "secret"
    with contextlib.suppress(FileNotFoundError):
        found = path.read_bytes()
        if len(found) == _BYTES:
            return found
    made, new = secrets.token_bytes(_BYTES), folder / "secret.new"
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(made)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    return made


class Names:
    """The ids of jobs that clients name. `taken`: whether there is a job of that id."""

    def __init__(self, secret: bytes, taken: Callable[[str], bool]) -> None:
        self._secret = secret
        self._taken = taken
        self._entering: set[str] = set()
        self._changed = threading.Condition()

    def id_of(self, client: str, name: str) -> str:
        """The id of the job that a client names so: always the same, and nobody else's to guess."""
        said = b"%d:%s%s" % (len(client.encode()), client.encode(), name.encode())
        return hmac.new(self._secret, said, hashlib.sha256).hexdigest()[:32]

    @contextlib.contextmanager
    def entering(self, job: str) -> Iterator[None]:
        """A job of that id is submitted within the block. Of two that come at once, the second one waits for the first.
        Raises InvalidRequest if there is one already."""
        with self._changed:
            self._changed.wait_for(lambda: job not in self._entering)
            if self._taken(job):
                raise InvalidRequest.of("id", job, "an id that no other job has")
            self._entering.add(job)
        try:
            yield
        finally:
            with self._changed:
                self._entering.discard(job)
                self._changed.notify_all()

"""Pictures that a client sent ahead, to be named by their ids in later requests. Kept in memory, for a while."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from triptych.errors import QueueFull
from triptych.server.errors import UploadNotFound

__all__ = ["KEPT_SECONDS", "Upload", "Uploads"]

KEPT_SECONDS = 3600.0
MAX_FILES = 64
MAX_BYTES = 128 << 20
"""Of one caller."""
MAX_ALL_BYTES = 512 << 20
"""Of all callers together."""


@dataclass(frozen=True)
class Upload:
    """A picture's file. Times are seconds since the epoch."""

    id: str
    caller: str
    data: bytes
    purpose: str
    created: float
    expires: float


class Uploads:
    """The uploads of all callers, who see none but their own. Used by the loop's thread alone."""

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._kept: dict[str, Upload] = {}

    def add(self, caller: str, data: bytes, purpose: str) -> Upload:
        """Keeps a file. Raises QueueFull where there is no room, with the seconds until something expires."""
        now = self._expire()
        own = [upload for upload in self._kept.values() if upload.caller == caller]
        every = list(self._kept.values())
        self._require(own, len(own) < MAX_FILES, f"{MAX_FILES} uploads of one API key", now)
        self._require(own, _bytes(own) + len(data) <= MAX_BYTES, f"{MAX_BYTES} bytes of one API key's uploads", now)
        self._require(every, _bytes(every) + len(data) <= MAX_ALL_BYTES, f"{MAX_ALL_BYTES} bytes of uploads", now)
        upload = Upload(f"file-{secrets.token_hex(16)}", caller, data, purpose, now, now + KEPT_SECONDS)
        self._kept[upload.id] = upload
        return upload

    def get(self, caller: str, id: str) -> Upload:
        """A caller's upload. Raises UploadNotFound for one that is unknown, has expired, or is another's."""
        self._expire()
        upload = self._kept.get(id)
        if upload is None or upload.caller != caller:
            raise UploadNotFound("no such upload, or it has expired", field="file")
        return upload

    def remove(self, caller: str, id: str) -> None:
        """Forgets a caller's upload. Raises like `get`."""
        del self._kept[self.get(caller, id).id]

    def _expire(self) -> float:
        now = self._wall()
        for id in [id for id, upload in self._kept.items() if upload.expires <= now]:
            del self._kept[id]
        return now

    @staticmethod
    def _require(kept: Sequence[Upload], good: bool, bound: str, now: float) -> None:
        if not good:
            wait = min((upload.expires - now for upload in kept), default=KEPT_SECONDS)
            raise QueueFull(f"at most {bound} are kept; delete some", retry_after=max(1.0, wait), field="file")


def _bytes(kept: Sequence[Upload]) -> int:
    return sum(len(upload.data) for upload in kept)

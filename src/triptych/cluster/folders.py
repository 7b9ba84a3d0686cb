"""Folders that let nobody else in: for sockets, state and artifacts."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from triptych.errors import InvalidRequest

__all__ = ["private_folder"]


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

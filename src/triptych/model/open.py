"""Where models come from: the package itself, a folder, a hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from triptych.errors import InvalidRequest, ModelNotFound
from triptych.model import hub
from triptych.model.index import INDEX_FILES, read_index
from triptych.model.topology import Source
from triptych.model.trust import NO_TRUST, Trust

__all__ = ["embedded_models", "open_model"]

EMBEDDED = Path(__file__).parent / "embedded"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def embedded_models() -> tuple[str, ...]:
    """Names of the models that ship in the package, sorted."""
    if not EMBEDDED.is_dir():
        return ()
    return tuple(sorted(path.name for path in EMBEDDED.iterdir() if (path / INDEX_FILES[0]).is_file()))


def open_model(name: str, *, revision: str | None = None, offline: bool = False, trust: Trust = NO_TRUST) -> Source:
    """Finds a model: an embedded one's name, a local diffusers folder, or a hub id, in this order.

    Of a hub's repository only small files are fetched (no weights); `revision` is a branch, tag or commit there, and
    `offline` uses the cache alone. Raises ModelNotFound; LoadError for a malformed index or one that asks for code of
    its own without `trust.remote_code`; InvalidRequest for a revision of something that has none.
    """
    source = _find(name, revision, offline, trust)
    read_index(source, trust)
    return source


def _find(name: str, revision: str | None, offline: bool, trust: Trust) -> Source:
    local = os.path.expanduser(name)
    if name in embedded_models():
        source = Source(name, str(EMBEDDED / name), "embedded")
    elif os.path.isdir(local):
        source = Source(name, os.path.realpath(local), "folder")
    elif os.path.isfile(local):
        raise ModelNotFound(f"{name!r} is a file; give the folder that holds model_index.json", field="model")
    elif HUB_ID.fullmatch(name) and not name.startswith("."):
        return hub.open_repository(name, revision, offline, trust.remote_code)
    else:
        known = ", ".join(embedded_models()) or "none installed"
        raise ModelNotFound(
            f"no model {name!r}: neither embedded ({known}), nor a folder, nor a hub id (owner/name)", field="model"
        )
    if revision is not None:
        raise InvalidRequest.of("revision", revision, f"none, as {name!r} is not on a hub")
    return source

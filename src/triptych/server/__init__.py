"""The HTTP door: jobs in, pictures and clips out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych.server.app import create_app
    from triptych.server.binding import bind, on_signals, url_of
    from triptych.server.door import Door
    from triptych.server.locks.key_file import make_key, remove_key
    from triptych.server.locks.keys import KeyRing, key_ring
    from triptych.server.run import serve_app
    from triptych.server.seeing.logs import JobLog, log_formatter
    from triptych.server.seeing.spans import spans_to

# Imported on first use: a server takes its port and starts its workers first.
_HOME = {
    "Door": "door",
    "JobLog": "seeing.logs",
    "KeyRing": "locks.keys",
    "bind": "binding",
    "create_app": "app",
    "key_ring": "locks.keys",
    "log_formatter": "seeing.logs",
    "make_key": "locks.key_file",
    "on_signals": "binding",
    "remove_key": "locks.key_file",
    "serve_app": "run",
    "spans_to": "seeing.spans",
    "url_of": "binding",
}

__all__ = [
    "Door",
    "JobLog",
    "KeyRing",
    "bind",
    "create_app",
    "key_ring",
    "log_formatter",
    "make_key",
    "on_signals",
    "remove_key",
    "serve_app",
    "spans_to",
    "url_of",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

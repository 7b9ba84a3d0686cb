"""What signatures, blocks and folders declare, as plain data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from triptych.errors import LoadError
from triptych.model.topology import Defaults, Source

__all__ = ["DEFAULTS_FILE", "folder_defaults", "hint_name", "plain_default"]

DEFAULTS_FILE = "triptych.json"


def hint_name(hint: Any) -> str:
    """A type hint as people write it; "" for none."""
    if hint is None:
        return ""
    return hint.__name__ if isinstance(hint, type) and not hasattr(hint, "__args__") else str(hint)


def plain_default(value: Any) -> Any:
    """The default if it is JSON, else None."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return None


def folder_defaults(source: Source) -> dict[str, Any]:
    """The `defaults` of the folder's own triptych.json, {} if it has none. Raises LoadError if it is broken."""
    path = Path(source.folder) / DEFAULTS_FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoadError(f"{DEFAULTS_FILE} of {source.name} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise LoadError(f"{DEFAULTS_FILE} of {source.name} holds no object")
    known = {name for name in Defaults.__dataclass_fields__}
    return {key: value for key, value in found.get("defaults", found).items() if key in known}

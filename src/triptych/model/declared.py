"""What signatures, blocks and folders declare, as plain data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_type_hints

from triptych.errors import LoadError
from triptych.model.checkpoint import read_json
from triptych.model.topology import Defaults, Source

__all__ = [
    "DEFAULTS_FILE",
    "DENOISERS",
    "FRAME_RATES",
    "GENERATOR_STATE",
    "OUTPUT_COUNTS",
    "folder_defaults",
    "hint_name",
    "plain_default",
]

DEFAULTS_FILE = "triptych.json"

DENOISERS = ("transformer", "unet")
"""What the names of the components that denoise begin with."""

OUTPUT_COUNTS = ("num_images_per_prompt", "num_videos_per_prompt")
"""What pipelines call how many outputs a prompt is to have."""

GENERATOR_STATE = "generator_state"
"""The name under which the state of a task's generator crosses, where a stage has drawn from it."""

FRAME_RATES = ("frame_rate", "fps")
"""What pipelines call a clip's frames per second, where they condition on it."""


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
    content = read_json(path)
    found = content.get("defaults", content)
    if not isinstance(found, dict):
        raise LoadError(f"{path}: defaults should be an object, not a {type(found).__name__}", field="model")
    kinds = get_type_hints(Defaults)
    known = {name: value for name, value in found.items() if name in kinds}
    for name, value in known.items():
        if value is not None and not _fits(value, kinds[name]):
            kind = "a whole number above 0" if kinds[name] == int | None else "a number, 0 or more"
            raise LoadError(f"{path}: {name} should be {kind}, not {value!r}", field="model")
    return known


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if kind == int | None:
        return isinstance(value, int) and value > 0
    return math.isfinite(value) and value >= 0

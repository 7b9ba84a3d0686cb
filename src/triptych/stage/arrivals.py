"""What may arrive at a stage: checked on a payload's header, before anything is allocated for its body."""

from __future__ import annotations

from collections.abc import Collection

from triptych.errors import WrongPayload
from triptych.transfer import Header

__all__ = ["check_head"]


def check_head(header: Header, names: Collection[str], who: str) -> None:
    """Raises WrongPayload for values that are not among `names`."""
    if not isinstance(header.values, dict):
        raise WrongPayload(f"{who} takes values by name, not a {type(header.values).__name__}")
    strange = sorted(str(name) for name in header.values if name not in names)
    if strange:
        raise WrongPayload(f"{who} takes no {', '.join(strange)}", field=strange[0])

"""What may arrive at a stage: checked on a payload's header, before anything is allocated for its body."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

from triptych.errors import WrongPayload

__all__ = ["Head", "check_head"]


class Head(Protocol):
    """What is looked at of a payload's header: the values, in which tensors are only referred to, and the bytes of the
    body."""

    @property
    def values(self) -> Any:
        """By name."""
        ...

    @property
    def body(self) -> int:
        """Bytes, padding included."""
        ...


def check_head(header: Head, names: Collection[str], who: str, limit: int | None) -> None:
    """Raises WrongPayload for values that are not among `names`, or a body of more than `limit` bytes."""
    if not isinstance(header.values, dict):
        raise WrongPayload(f"{who} takes values by name, not a {type(header.values).__name__}")
    strange = sorted(str(name) for name in header.values if name not in names)
    if strange:
        raise WrongPayload(f"{who} takes no {', '.join(strange)}", field=strange[0])
    if limit is not None and header.body > limit:
        raise WrongPayload(f"given {header.body} bytes; allowed: at most {limit} for {who}")

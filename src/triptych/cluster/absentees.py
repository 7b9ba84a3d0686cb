"""Workers that are out but whose processes may still be there: what they began to write may still arrive somewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from triptych.messages import Hello

__all__ = ["Absentees"]

GONE_SECONDS = 60.0
"""After so long nothing that an absent process had under way can arrive any more."""


@dataclass(frozen=True, slots=True)
class _Absent:
    hello: Hello
    until: float


class Absentees:
    """By their exchanges. Times are one clock's seconds."""

    def __init__(self) -> None:
        self._all: dict[str, _Absent] = {}

    def add(self, hello: Hello, now: float) -> None:
        """A worker is out."""
        self._all[hello.owner] = _Absent(hello, now + GONE_SECONDS)

    def back(self, owner: str) -> None:
        """It has come back."""
        self._all.pop(owner, None)

    def ended(self, slot: str, pid: int | None) -> list[str]:
        """A process of a launcher's slot (None: any) has ended: the exchanges that went with it."""
        return self._take(lambda one: one.hello.slot == slot and pid in (None, one.hello.pid))

    def overdue(self, now: float) -> list[str]:
        """Exchanges that have been away for so long that they count as gone."""
        return self._take(lambda one: now >= one.until)

    def _take(self, wanted: Callable[[_Absent], bool]) -> list[str]:
        taken = [owner for owner, one in self._all.items() if wanted(one)]
        for owner in taken:
            del self._all[owner]
        return taken

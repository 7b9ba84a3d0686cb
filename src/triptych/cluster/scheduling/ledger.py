"""Payloads that workers keep for jobs: who can still be reached, who is told to let go, what the keeper fetches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from triptych.cluster.scheduling.actions import Action, Fetch, Let
from triptych.cluster.scheduling.fleet import Fleet
from triptych.messages import Descriptor

__all__ = ["Ledger", "Pending"]

Presence = Literal["here", "expected", "gone"]


@dataclass(frozen=True, slots=True)
class Pending:
    """A fetch that the keeper has not answered."""

    descriptor: Descriptor
    number: int
    stage: int
    attempt: int
    step: int


class Ledger:
    """Writes what is to be done into `out`."""

    def __init__(self, fleet: Fleet, out: list[Action]) -> None:
        self._fleet = fleet
        self._out = out
        self._expected: set[str] = set()
        self._pending: dict[tuple[str, str], Pending] = {}
        self._count = 0

    def expect(self, owner: str) -> None:
        """An exchange from before our restart may come back with what it keeps."""
        self._expected.add(owner)

    def back(self, owner: str) -> None:
        """It is here."""
        self._expected.discard(owner)

    def stop_expecting(self) -> None:
        """Who has not come back by now is gone."""
        self._expected.clear()

    def presence(self, descriptor: Descriptor | None) -> Presence:
        """Whether a payload can be had."""
        if descriptor is None:
            return "gone"
        if self._fleet.owner(descriptor.owner):
            return "here"
        return "expected" if descriptor.owner in self._expected else "gone"

    def release(self, descriptor: Descriptor | None) -> None:
        """Nobody needs a payload any more. An absent owner learns that when it is back and says what it keeps."""
        if descriptor is not None and (member := self._fleet.owner(descriptor.owner)):
            self._out.append(Let(member.id, descriptor.payload, descriptor.body))

    def needed(self) -> set[str]:
        """Payloads that the keeper is fetching."""
        return {pending.descriptor.payload for pending in self._pending.values()}

    def fetch(
        self, job: str, what: str, descriptor: Descriptor, *, stage: int = 0, attempt: int = 0, step: int = 0
    ) -> None:
        """Has the keeper fetch a payload whose owner is here."""
        member = self._fleet.owner(descriptor.owner)
        assert member is not None and (job, what) not in self._pending, f"{what} of {job} cannot be fetched"
        self._count += 1
        self._pending[job, what] = Pending(descriptor, self._count, stage, attempt, step)
        self._out.append(Fetch(job, what, descriptor, member.hello.secret, self._count))

    def fetching(self, job: str, what: str) -> bool:
        """Whether the keeper is at it."""
        return (job, what) in self._pending

    def concerns(self, job: str) -> bool:
        """Whether the keeper is at anything of a job's."""
        return any(one == job for one, _ in self._pending)

    def fetched(self, job: str, what: str, number: int) -> Pending | None:
        """The keeper has answered; None if nobody asked, or it answered already."""
        pending = self._pending.get((job, what))
        return self._pending.pop((job, what)) if pending is not None and pending.number == number else None

    def results(self) -> int:
        """Results that the keeper is fetching."""
        return sum(what == "result" for _, what in self._pending)

    def __len__(self) -> int:
        return len(self._pending)

"""Who is next at a stage: the client that had least, and of its jobs priority, then deadline, then age."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator

from triptych.cluster.scheduling.live import Live

__all__ = ["Shares", "StageQueue"]


class Shares:
    """How much work each client with a job here was given. One that comes (back) starts level with the one that had
    least, so that nobody saves up turns while away."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._jobs: dict[str, int] = {}

    def enter(self, client: str) -> None:
        """A client has one job more."""
        if client not in self._jobs:
            self._served[client] = min(self._served.values(), default=0.0)
        self._jobs[client] = self._jobs.get(client, 0) + 1

    def leave(self, client: str) -> None:
        """A client has one job less."""
        self._jobs[client] -= 1
        if not self._jobs[client]:
            del self._jobs[client], self._served[client]

    def charge(self, client: str, work: float) -> None:
        """A client was given work."""
        self._served[client] += work

    def served(self, client: str) -> float:
        """Work given to a client that has jobs here."""
        return self._served[client]


class StageQueue:
    """Jobs that wait for one stage."""

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._clients: dict[str, list[Live]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, live: Live) -> None:
        """Puts a job in its place."""
        insort(self._clients.setdefault(live.client, []), live, key=_rank)
        self._size += 1

    def remove(self, live: Live) -> None:
        """Takes a job out."""
        jobs = self._clients[live.client]
        del jobs[bisect_left(jobs, live.rank, key=_rank)]
        if not jobs:
            del self._clients[live.client]
        self._size -= 1

    def ordered(self) -> Iterator[Live]:
        """The jobs as they would go; valid until the next change."""
        if len(self._clients) == 1:
            return iter(next(iter(self._clients.values())))
        # Age, not priority, between clients that had the same: who asks for much priority would else be first for ever.
        turns = (self._turns(client, jobs) for client, jobs in self._clients.items())
        return (live for _, _, live in heapq.merge(*turns))

    def position(self, live: Live) -> int:
        """How many go before it."""
        return next(place for place, other in enumerate(self.ordered()) if other is live)

    def _turns(self, client: str, jobs: list[Live]) -> Iterator[tuple[float, int, Live]]:
        """A client's jobs, each with what the client will have been given when its turn comes."""
        served = self._shares.served(client)
        for live in jobs:
            yield served, live.order, live
            served += live.record.spec.work / len(live.stages)


def _rank(live: Live) -> tuple[int, float, int]:
    return live.rank

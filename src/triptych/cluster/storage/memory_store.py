"""Jobs in this process's memory, for an engine that nobody expects to outlive it."""

from __future__ import annotations

import builtins
from collections.abc import Iterable

from triptych.cluster.jobs import ENDED, JobRecord, JobState, snapshot

__all__ = ["MemoryStore"]


class MemoryStore:
    """The JobStore of a process's lifetime: keeps at most `max_ended` ended jobs, the youngest; `expire` returns those
    that had to go before with the rest."""

    def __init__(self, max_ended: int = 1024) -> None:
        self._records: dict[str, JobRecord] = {}
        self._ended: dict[str, None] = {}
        self._evicted: list[JobRecord] = []
        self._max_ended = max_ended

    def put(self, record: JobRecord) -> None:
        """See JobStore."""
        job = record.spec.id
        self._records[job] = snapshot(record)
        if record.state in ENDED:
            self._ended[job] = None
            while len(self._ended) > self._max_ended:
                self._evicted.append(self._remove(next(iter(self._ended))))

    def get(self, job: str) -> JobRecord | None:
        """See JobStore."""
        record = self._records.get(job)
        return None if record is None else snapshot(record)

    def remove(self, job: str) -> bool:
        """See JobStore."""
        return job in self._records and self._remove(job) is not None

    def unfinished(self) -> builtins.list[JobRecord]:
        """See JobStore."""
        return [snapshot(record) for record in self._records.values() if record.state not in ENDED]

    def list(
        self, *, client: str | None = None, states: Iterable[JobState] | None = None, before: str | None = None,
        limit: int = 50,
    ) -> builtins.list[JobRecord]:  # fmt: skip
        """See JobStore."""
        wanted = None if states is None else set(states)
        found: builtins.list[JobRecord] = []
        passed = before is None
        for job in reversed(self._records):
            record = self._records[job]
            fits = (client is None or record.spec.client == client) and (wanted is None or record.state in wanted)
            if passed and fits and len(found) < limit:
                found.append(snapshot(record))
            passed = passed or job == before
        return found

    def expire(self, before: float, keep_bytes: int | None = None) -> builtins.list[JobRecord]:
        """See JobStore."""
        removed, self._evicted = self._evicted, []
        kept = sum(self._records[job].kept_bytes for job in self._ended)
        for job in list(self._ended):
            record = self._records[job]
            if (record.ended or 0.0) >= before and (keep_bytes is None or kept <= keep_bytes):
                break
            kept -= record.kept_bytes
            removed.append(self._remove(job))
        return removed

    def close(self) -> None:
        """Nothing to let go of."""

    def _remove(self, job: str) -> JobRecord:
        self._ended.pop(job, None)
        return self._records.pop(job)

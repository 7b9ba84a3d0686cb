"""Every bound of the cluster in one place."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from triptych.errors import InvalidRequest

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """How long, how many and how often; all times in seconds. Raises InvalidRequest, which names the field."""

    heartbeat_seconds: float = 1.0
    """between two signs of life of a worker"""
    lease_seconds: float = 5.0
    """a worker silent for so long is dead"""
    loading_seconds: float = 1800.0
    """the same for a worker that said that it loads or compiles; also between two steps of that"""
    hung_factor: float = 10.0
    """a unit of work that takes this many times what it was measured at is hung"""
    hung_floor_seconds: float = 5.0
    """but nothing shorter than this is"""
    first_unit_seconds: float = 600.0
    """what a unit may take where none was measured yet"""
    stalled_seconds: float = 180.0
    """a worker that holds tasks but says nothing of them and computes nothing for so long is hung"""
    prove_seconds: float = 60.0
    """within which a worker where something failed shows that it still works"""
    max_queue: int = 256
    """jobs accepted and not yet begun; more are rejected"""
    max_queue_per_client: int | None = None
    """the same for one client; None: no limit of its own"""
    ahead: int = 8
    """outputs of a stage that may wait for the next one, beyond what that has credits for"""
    time_limit_seconds: float = 3600.0
    """a job ends so long after it was begun, done or not"""
    checkpoint_seconds: float | None = 1.0
    """work between two checkpoints of a task; None: none are made"""
    missing_worker: Literal["fail", "wait"] = "wait"
    """a job with a stage that no worker has is rejected, or waits for one"""
    deaths_alone: int = 2
    """a job that has killed so many workers while it was alone on them is quarantined"""
    own_errors: int = 2
    """a stage that failed so often by the job's own error fails the job"""
    damages: int = 5
    """damaged fetches of one stage before the job fails"""
    losses: int = 8
    """times that a stage's input may be lost although its producer lives"""
    failures_kept: int = 20
    """reasons collected per job; older ones go"""
    retention_seconds: float = 86400.0
    """ended jobs and what was kept for them are forgotten after so long"""
    retention_bytes: int | None = None
    """ended jobs keep at most so much; the oldest go first; None: no limit"""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "missing_worker":
                if value not in ("fail", "wait"):
                    raise InvalidRequest.of("limits.missing_worker", value, ("fail", "wait"))
            elif value is not None and not value >= self._least(field.name):
                raise InvalidRequest.of(f"limits.{field.name}", value, f"at least {self._least(field.name)}")
        if self.lease_seconds <= self.heartbeat_seconds:
            raise InvalidRequest.of("limits.lease_seconds", self.lease_seconds, "more than heartbeat_seconds")

    @staticmethod
    def _least(name: str) -> float:
        """The smallest value that makes sense: some may be nothing at all."""
        if name in ("checkpoint_seconds", "retention_seconds", "retention_bytes", "ahead"):
            return 0
        return 1e-3 if name.endswith("_seconds") else 1

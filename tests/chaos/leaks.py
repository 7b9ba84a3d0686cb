"""What a cluster holds when it has nothing to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil

from tests.chaos.cluster import LEASE, Cluster

__all__ = ["Holding", "Leaks", "holdings"]

MIB = 1 << 20
GROWTH_BYTES = 64 * MIB
"""What a process may grow by without having leaked: allocators keep what they have once needed."""


@dataclass(frozen=True)
class Holding:
    """What one idle process holds. `files`: descriptors that are no connection, and connections to nobody."""

    files: int
    threads: int
    bytes: int

    @classmethod
    def of(cls, pid: int) -> Holding:
        """Looks at a process."""
        process = psutil.Process(pid)
        connections = process.net_connections("all")
        dead = sum(one.status == psutil.CONN_CLOSE_WAIT for one in connections)
        with process.oneshot():
            return cls(process.num_fds() - len(connections) + dead, process.num_threads(), process.memory_info().rss)


@dataclass(frozen=True)
class Leaks:
    """What is held although nothing is under way; every number must be 0."""

    slots: int
    """tasks and fetches that the coordinator believes to be running or waiting"""
    credits: int
    """tasks that workers could be given before, and no more"""
    buffers: int
    """payloads kept or open, buffers in quarantine"""
    files: int
    bytes: int
    """growth beyond GROWTH_BYTES of any process, summed"""
    who: str
    """whose files and bytes they are"""

    @classmethod
    def of(cls, cluster: Cluster, before: dict[str, Holding]) -> Leaks:
        """Waits until the cluster is idle and whole, and compares with what its processes held `before`, by the stage
        that they have."""
        status = cluster.until(_still, "nothing to be under way and nothing to be kept")
        after = holdings(cluster)
        buffers = sum(
            count
            for puppet in cluster.panel.living()
            for name, count in puppet.ask("numbers").items()
            if name != "received"
        )
        files = {name: max(0, one.files - before[name].files) for name, one in after.items()}
        grown = {name: max(0, one.bytes - before[name].bytes - GROWTH_BYTES) for name, one in after.items()}
        telling = [f"{name}: {before[name]} → {after[name]}" for name in after if files[name] or grown[name]]
        return cls(
            slots=sum(one["running"] + one["waiting"] for one in status["stages"]) + status["fetching"],
            credits=sum(10 - one["credits"] for one in status["stages"]),
            buffers=buffers,
            files=sum(files.values()),
            bytes=sum(grown.values()),
            who="; ".join(telling),
        )


def _still(status: dict[str, Any]) -> bool:
    workers = status["workers"]
    busy = status["fetching"] + sum(one["running"] + one["waiting"] for one in status["stages"])
    idle = all(one["state"] == "idle" and one["last_seen"] < LEASE and not one["kept"] for one in workers)
    return not busy and idle and len(workers) == 6


def holdings(cluster: Cluster) -> dict[str, Holding]:
    """What each process holds now, by name."""
    return {puppet.name: Holding.of(puppet.pid) for puppet in cluster.panel.living()}

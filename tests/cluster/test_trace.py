"""The timeline that Perfetto opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.toy import STAGES, ToyCluster
from triptych.cluster import Trace
from triptych.errors import InvalidRequest


def run(path: Path) -> ToyCluster:
    cluster = ToyCluster(observers=[Trace(path)])
    for stage in STAGES:
        cluster.worker(stage, credits=1)
    for job in ("a", "b"):
        cluster.submit(job)
    for worker in cluster.workers:
        for job in ("a", "b"):
            cluster.clock.now += 1
            worker.step(job, 1, seconds=0.5)
            cluster.clock.now += 1
            worker.step(job, 2, seconds=1.0)
            worker.done(job, fetched_by="memfd", fetched_bytes=1000, fetched_seconds=0.25)
    return cluster


def events_of(text: str) -> list[dict[str, Any]]:
    """As Perfetto reads it: the last bracket may be missing."""
    return json.loads(text if text.rstrip().endswith("]") else text + "]")


def test_it_holds_queue_waits_units_and_transfers_on_a_track_per_worker_and_stage(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    cluster = run(path)
    cluster.coordinator.close()
    events = json.loads(path.read_text())
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {"queues", "w0", "w1", "w2"}
    units = [event for event in events if event.get("cat") == "unit"]
    assert len(units) == 12 and units[0]["dur"] == pytest.approx(0.5e6)
    assert units[0]["args"] == {"job": "a", "attempt": 1, "step": 1, "steps": 4}
    waits = [event for event in events if event.get("cat") == "queue" and event["ph"] == "e"]
    assert {(event["args"]["stage"], event["name"]) for event in waits} == {
        (stage, job) for stage in STAGES for job in ("a", "b")
    }
    begun, ended = ([e["ts"] for e in events if e.get("cat") == "transfer" and e["ph"] == phase] for phase in "be")
    assert len(begun) == 6 and ended[0] - begun[0] == pytest.approx(0.25e6)


def test_units_on_one_track_do_not_overlap(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    run(path).coordinator.close()
    ends: dict[tuple[int, int], float] = {}
    for event in json.loads(path.read_text()):
        if event["ph"] == "X":
            track = event["pid"], event["tid"]
            assert event["ts"] >= ends.get(track, 0.0) - 1e-3
            ends[track] = event["ts"] + event["dur"]


def test_it_opens_after_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    cluster = run(path)
    cluster.coordinator.tick()
    assert len(events_of(path.read_text())) > 30
    cluster.coordinator.close()
    assert events_of(path.read_text()) == json.loads(path.read_text())


def test_lost_workers_are_marked(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    cluster = run(path)
    cluster.workers[0].die()
    cluster.coordinator.close()
    marks = [event for event in json.loads(path.read_text()) if event["ph"] == "i"]
    assert marks[-1]["name"] == "out: gone" and marks[-1]["args"]["reason"] == "killed"


def test_a_full_disk_ends_the_trace_and_no_job(caplog: pytest.LogCaptureFixture) -> None:
    trace = Trace(Path("/dev/full"))
    cluster = ToyCluster(observers=[trace])
    cluster.worker()
    cluster.submit("a")
    trace.mark("w0", "x" * (1 << 17), 0.0)
    cluster.coordinator.tick()
    cluster.finish()
    assert cluster.outcome("a").state == "done"
    cluster.coordinator.close()
    assert sum("cannot be written" in record.getMessage() for record in caplog.records) == 1


def test_a_file_that_cannot_be_written_is_named(short_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="nowhere"):
        Trace(short_path / "nowhere" / "trace.json")

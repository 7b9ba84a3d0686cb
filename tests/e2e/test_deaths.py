"""What dies, and what its users see of it: nothing but a job that takes a little longer."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.commands import Server, processes_of, short_folder, sockets_in, until

STATE = ("--layout", "split", "--threads", "1", "--state", "state")
LONG = 60
"""Steps that leave time to kill something."""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with short_folder() as found:
        yield found


@pytest.fixture(scope="module")
def servers(folder: Path) -> Iterator[list[Server]]:
    """The server that runs now is the last one; each goes on with the state of the one before."""
    found = [Server(folder, *STATE)]
    yield found
    for server in found:
        server.close()


@pytest.fixture(scope="module")
def undisturbed(servers: list[Server]) -> bytes:
    server = servers[-1]
    return server.picture(server.ended(server.submit(num_inference_steps=LONG, exact=True)["id"]))


@pytest.mark.parametrize("victim", ["denoise", "encode", "decode"])
def test_a_worker_that_is_killed_costs_no_job(servers: list[Server], undisturbed: bytes, victim: str) -> None:
    server = servers[-1]
    lost = server.cluster()["totals"]["workers_lost"]
    pid = server.worker(victim)["pid"]
    job = server.submit(num_inference_steps=LONG, exact=True)["id"]
    server.reached(job, "denoise", 5)
    psutil.Process(pid).kill()
    done = server.ended(job)
    assert server.picture(done) == undisturbed, done
    assert all(failure["code"] == "worker_lost" for failure in done["failures"])
    assert len(done["failures"]) == (victim == "denoise"), "only whose task was there hears of it"
    assert server.worker(victim)["pid"] != pid
    assert server.cluster()["totals"]["workers_lost"] == lost + 1
    until(server.is_idle, server.cluster)


def test_a_server_that_is_killed_goes_on_with_all_that_it_had_accepted(
    servers: list[Server], undisturbed: bytes, folder: Path
) -> None:
    server = servers[-1]
    pids = {name: server.worker(name)["pid"] for name in ("encode", "denoise", "decode")}
    jobs = [server.submit(num_inference_steps=LONG, exact=True)["id"] for _ in range(5)]
    server.reached(jobs[0], "denoise", 5)
    server.signal(signal.SIGKILL)
    server.end()
    assert {process.pid for process in processes_of(folder)} == set(pids.values()), "its workers live on for a while"
    again = Server(folder, *STATE)
    servers.append(again)
    ended = [again.ended(job) for job in jobs]
    assert [again.picture(job) == undisturbed for job in ended] == [True] * 5
    assert {name: again.worker(name)["pid"] for name in pids} == pids, "they were found, and no doubles started"
    assert {process.pid for process in processes_of(folder)} == {*pids.values(), again.process.pid}
    until(again.is_idle, again.cluster)


def test_a_job_taken_over_is_told_with_its_steps(servers: list[Server]) -> None:
    server = servers[-1]
    job = server.submit(num_inference_steps=900)["id"]
    server.reached(job, "denoise", 3)
    server.signal(signal.SIGKILL)
    server.end()
    again = Server(server.folder, *STATE)
    servers.append(again)
    assert again.reached(job, "denoise", 4)["steps"] == 900
    assert again.client.delete(f"/v1/jobs/{job}").json()["state"] == "cancelled"
    until(again.is_idle, again.cluster)


def test_told_twice_it_stops_at_once_and_its_jobs_wait_for_the_next_start(servers: list[Server], folder: Path) -> None:
    server = servers[-1]
    job = server.submit(num_inference_steps=900)["id"]
    server.reached(job, "denoise")
    server.signal()
    until(lambda: server.client.get("/health").json()["status"] == "draining", "draining")
    server.signal()
    assert server.end() == 1, server.said
    assert processes_of(folder) == [] and sockets_in(folder) == []
    again = Server(folder, *STATE)
    servers.append(again)
    again.reached(job, "denoise")
    assert again.client.delete(f"/v1/jobs/{job}").json()["state"] == "cancelled"
    again.signal()
    assert again.end() == 0, again.said
    assert processes_of(folder) == [] and sockets_in(folder) == []

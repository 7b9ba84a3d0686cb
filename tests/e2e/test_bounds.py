"""A server with narrow bounds and a bad line, and what cannot be started: a refusal is one line and leaves nothing."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.commands import Command, Server, processes_of, run, short_folder, sockets_in, until

NARROW = """
name: narrow
workers: [{stages: [encode, decode], threads: 1}, {stages: denoise, threads: 1, capacity: 1}]
transfer: {routes: [tcp], corrupt_every: 3}
limits: {max_queue: 2}
serve: {max_body: 2KiB}
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with short_folder() as found:
        (found / "narrow.yaml").write_text(NARROW)
        yield found


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    server = Server(folder, "--layout", "narrow.yaml", "--state", "state")
    yield server
    server.close()


def test_a_full_queue_says_when_to_come_again(server: Server) -> None:
    taken, answer = [], None
    for _ in range(20):
        answer = server.client.post("/v1/jobs", json={"prompt": "x", "num_inference_steps": 900})
        if answer.status_code != 202:
            break
        taken.append(answer.json()["id"])
    assert answer is not None and answer.status_code == 429
    assert answer.json()["error"]["code"] == "queue_full" and "allowed: 2" in answer.json()["error"]["message"]
    assert int(answer.headers["Retry-After"]) >= 1
    for job in taken:
        server.client.delete(f"/v1/jobs/{job}").raise_for_status()
    until(server.is_idle, server.cluster)
    assert server.ended(server.submit(num_inference_steps=1)["id"])["state"] == "done"


def test_a_damaged_transfer_is_counted_and_never_seen(server: Server) -> None:
    pictures = {server.picture(server.ended(server.submit(num_inference_steps=2)["id"])) for _ in range(4)}
    assert len(pictures) == 1
    assert server.cluster()["totals"]["digest_failures"] > 0


def test_a_body_that_is_too_large_is_not_read(server: Server) -> None:
    answer = server.client.post("/v1/jobs", json={"prompt": "x" * 4000})
    assert (answer.status_code, answer.json()["error"]["field"]) == (413, "body")
    assert server.ended(server.submit(num_inference_steps=1)["id"])["state"] == "done"


def test_a_second_server_takes_neither_its_port_nor_its_state(server: Server) -> None:
    port = server.url.rpartition(":")[2]
    code, out, said = run(server.folder, "serve", "emoji", "--port", port, "--state", "other")
    assert (code, out) == (2, [])
    assert said == f"error: port: given {port}; allowed: a free one (127.0.0.1: address already in use)\n"
    code, out, said = run(server.folder, "serve", "emoji", "--port", "0", "--state", "state")
    assert (code, out) == (2, []) and said.splitlines()[-1].startswith("error: state: ") and "in use" in said
    assert {worker["pid"] for worker in server.workers().values()} | {server.process.pid} == {
        process.pid for process in processes_of(server.folder)
    }


def test_told_to_stop_while_it_loads_it_leaves_nothing() -> None:
    with short_folder() as folder:
        command = Command(folder, "serve", "emoji", "--layout", "split", "--port", "0", "--state", "state")
        try:
            until(lambda: len(processes_of(folder)) > 3, "its workers")
            command.signal(signal.SIGTERM)
            assert command.end() == 130, command.said
            assert command.said.splitlines()[-1] == "cancelled" and "Traceback" not in command.said
            assert processes_of(folder) == [] and sockets_in(folder) == []
        finally:
            command.close()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("workers: [{stages: paint}]", "workers[0].stages[0]: given 'paint'; allowed: 'encode', 'denoise', 'decode'"),
        ("workers: [{stages: encode}]", "workers: given 'encode'; allowed: one for denoise, decode too"),
        ("workers: [{stages: all}", "layout: given 'wrong.yaml'; allowed: YAML (line "),
        pytest.param("workers: [{stages: all, devices: cuda:99}]", "device: ", marks=pytest.mark.slow),
        ("workers: [{stages: all}]\ntransfer: {pool_bytes: 9TiB, budget_bytes: 9TiB}", "transfer.budget_bytes: given "),
    ],
)
def test_a_layout_that_cannot_be_is_one_line(content: str, line: str) -> None:
    with short_folder() as folder:
        (folder / "wrong.yaml").write_text(content)
        code, out, said = run(folder, "serve", "emoji", "--layout", "wrong.yaml", "--port", "0")
        assert (code, out) == (2, []), said
        last = said.splitlines()[-1]
        assert last.startswith("error: ") and line in last and "Traceback" not in said
        assert processes_of(folder) == [] and sockets_in(folder) == [] and not list((folder / "tmp").glob("triptych-*"))


LACKING = """
workers: [{stages: [encode, decode], threads: 1}]
missing: wait
limits: {missing_worker: fail}
"""


def test_a_stage_without_a_worker_is_named_until_one_joins() -> None:
    with short_folder() as folder:
        (folder / "lacking.yaml").write_text(LACKING)
        server = Server(folder, "--layout", "lacking.yaml", "--state", "state")
        worker = None
        try:
            health = server.client.get("/health")
            assert (health.status_code, health.json()["missing"]) == (503, ["denoise"])
            answer = server.client.post("/v1/jobs", json={"prompt": "x"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_worker")
            assert "denoise" in answer.json()["error"]["message"] and int(answer.headers["Retry-After"]) >= 1
            words = ["denoise", "--device", "cpu", "--threads", "1", "--name", "late"]
            worker = Command(folder, "worker", *words, "--join", f"ipc://{folder}/state/control.sock")
            server.worker("late")
            assert server.client.get("/health").status_code == 200
            done = server.ended(server.submit(num_inference_steps=2)["id"])
            assert done["state"] == "done"
            server.signal()
            assert (server.end(), worker.end()) == (0, 0), (server.said, worker.said)
            assert processes_of(folder) == [] and sockets_in(folder) == []
        finally:
            for command in (server, worker):
                if command is not None:
                    command.close()

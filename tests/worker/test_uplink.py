"""The worker's end of a ZeroMQ line: it says Hello, keeps what matters, and gives up when there is nobody."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.wires import PATIENCE, Coordinator, hello, wait_until
from triptych.cluster.jobs import Link
from triptych.cluster.lines.keys import ClientKeys, load_client_keys, make_client_keys, make_server_keys
from triptych.cluster.lines.network import Listener
from triptych.errors import InvalidRequest
from triptych.messages import (
    Cancel,
    Descriptor,
    Drain,
    Goodbye,
    Heartbeat,
    Hello,
    Proved,
    Refused,
    Run,
    Stepped,
    Stop,
    Task,
    TaskDone,
    ToWorker,
    Welcome,
)
from triptych.worker.uplink import SOFT_OUTBOX, ProcessUplink


@pytest.fixture
def at(tmp_path: Path) -> str:
    return f"ipc://{tmp_path / 'run' / 'triptych.sock'}"


@pytest.fixture
def coordinator() -> Coordinator:
    return Coordinator()


@pytest.fixture
def listener(coordinator: Coordinator, at: str) -> Iterator[Listener]:
    with Listener(coordinator, [at]) as listening:
        yield listening


@pytest.fixture
def keys(tmp_path: Path) -> ClientKeys:
    make_server_keys(tmp_path / "keys")
    return load_client_keys(make_client_keys(tmp_path / "keys", "a"))


def receive(uplink: ProcessUplink) -> ToWorker:
    message = uplink.receive(PATIENCE)
    assert message is not None
    return message


def done(job: str) -> TaskDone:
    descriptor = Descriptor(payload=job, generation=1, head=1, body=1, owner="o", addresses=())
    return TaskDone(job=job, stage="encode", attempt=1, descriptor=descriptor, seconds=1.0, steps=1, peak_bytes=0)


def test_receive_waits_no_longer_than_it_is_told(listener: Listener, at: str) -> None:
    with ProcessUplink(at, hello()) as uplink:
        assert isinstance(uplink.receive(None), Welcome)
        assert uplink.receive(0) is None
        assert uplink.receive(0.05) is None


def test_a_worker_may_be_there_before_its_coordinator(coordinator: Coordinator, at: str) -> None:
    Path(at.removeprefix("ipc://")).parent.mkdir(mode=0o700)
    with ProcessUplink(at, hello()) as uplink:
        uplink.send(Proved(healthy=True))
        with Listener(coordinator, [at]):
            assert isinstance(receive(uplink), Welcome)
            wait_until(lambda: coordinator.heard)
    assert coordinator.heard == [("first", Proved(healthy=True))]


def test_an_orphan_is_told_to_stop(coordinator: Coordinator, at: str) -> None:
    with Listener(coordinator, [at]) as listener, ProcessUplink(at, hello(), orphan_seconds=1.0) as uplink:
        assert isinstance(receive(uplink), Welcome)
        assert uplink.receive(2.5) is None, "a coordinator with nothing to say is there nevertheless"
        listener.close()
        assert receive(uplink) == Stop()
        uplink.send(Proved(healthy=True))
        assert uplink.receive(0) is None


def test_a_worker_without_a_coordinator_says_where_it_looked(tmp_path: Path) -> None:
    at = f"ipc://{tmp_path / 'nobody'}"
    with ProcessUplink(at, hello(), orphan_seconds=0.3) as uplink:
        assert receive(uplink) == Refused(reason=f"no coordinator answered at {at} for 0.3 s")


@pytest.mark.parametrize(
    "endpoint",
    ["", "nonsense", "tcp://localhost", "tcp://localhost:port", "localhost:0", "localhost:65536", "pigeon://loft:1"],
)
def test_what_is_no_endpoint_is_refused(endpoint: str, keys: ClientKeys) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ProcessUplink(endpoint, hello(), keys)
    assert caught.value.field == "join"


def test_keys_that_are_none_are_refused(keys: ClientKeys) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ProcessUplink("localhost:1", hello(), dataclasses.replace(keys, server="short"))
    assert caught.value.field == "join"


def test_something_else_at_the_address_is_noticed(keys: ClientKeys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            connection.recv(1)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" + b" " * 200)
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with ProcessUplink(f"127.0.0.1:{server.getsockname()[1]}", hello(), keys) as uplink:
            refused = receive(uplink)
        thread.join()
    assert isinstance(refused, Refused) and "is no coordinator" in refused.reason


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\1\0\0\0x"])
def test_something_else_at_the_socket_is_noticed(tmp_path: Path, said: bytes) -> None:
    path, ended = tmp_path / "socket", threading.Event()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        server.settimeout(0.05)

        def answer() -> None:
            while not ended.is_set():
                with contextlib.suppress(TimeoutError, OSError), server.accept()[0] as connection:
                    connection.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        with ProcessUplink(f"ipc://{path}", hello()) as uplink:
            refused = receive(uplink)
        ended.set()
        thread.join()
    assert isinstance(refused, Refused) and "is no coordinator" in refused.reason


def test_a_coordinator_that_is_stopped_is_waited_for(keys: ClientKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triptych.worker.wires.HANDSHAKE_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        at = f"127.0.0.1:{silent.getsockname()[1]}"
        with ProcessUplink(at, hello(), keys, orphan_seconds=3.0) as uplink:
            assert uplink.receive(2.0) is None, "many handshakes time out meanwhile"
            refused = receive(uplink)
    assert isinstance(refused, Refused) and "no coordinator answered" in refused.reason


def test_a_final_refusal_ends_the_line(at: str) -> None:
    class Strict(Coordinator):
        def hello(self, hello: Hello, link: Link) -> None:
            self.links[hello.incarnation] = link
            link.send(Refused(reason="another model"))
            link.close()

    strict = Strict()
    with Listener(strict, [at]), ProcessUplink(at, hello()) as uplink:
        assert receive(uplink) == Refused(reason="another model")
        uplink.send(Proved(healthy=True))
        assert uplink.receive(1.5) is None
    assert list(strict.links) == ["first"]
    assert not strict.heard


def test_results_are_said_again_to_who_does_not_know_the_worker(coordinator: Coordinator, at: str) -> None:
    with ProcessUplink(at, hello()) as uplink:
        with Listener(Coordinator(), [at]):
            assert isinstance(receive(uplink), Welcome)
            uplink.send(Proved(healthy=True, reason="heard by the first"))
        uplink.send(Proved(healthy=True, reason="of no interest to the second"))
        uplink.send(done("a"))
        uplink.send(done("b"))
        with Listener(coordinator, [at]):
            refused = receive(uplink)
            assert isinstance(refused, Refused) and refused.again
            assert isinstance(receive(uplink), Welcome)
            uplink.send(Goodbye())
            wait_until(lambda: len(coordinator.heard) == 3)
    assert [message for _, message in coordinator.heard] == [done("a"), done("b"), Goodbye()]
    assert {incarnation for incarnation, _ in coordinator.heard} == {"first~1"}


@pytest.mark.parametrize("how", ["told to stop", "said goodbye"])
def test_who_leaves_says_no_hello_to_a_coordinator_that_has_forgotten_it(
    how: str, coordinator: Coordinator, listener: Listener, at: str
) -> None:
    with ProcessUplink(at, hello()) as uplink:
        assert isinstance(receive(uplink), Welcome)
        if how == "told to stop":
            coordinator.links["first"].send(Stop())
            coordinator.links["first"].close()
            assert receive(uplink) == Stop()
            uplink.send(Heartbeat())
        else:
            coordinator.links["first"].close()
            uplink.send(Goodbye())
        assert receive(uplink) == Stop(), "the line has ended"
    assert list(coordinator.links) == ["first"]


def test_every_return_is_a_new_incarnation(coordinator: Coordinator, listener: Listener, at: str) -> None:
    with ProcessUplink(at, hello()) as uplink:
        seen = []
        for _ in range(3):
            assert isinstance(receive(uplink), Welcome)
            seen.append(uplink.incarnation)
            link = coordinator.links[uplink.incarnation]
            link.send(Refused(reason="silent", again=True))
            link.close()
            assert receive(uplink) == Refused(reason="silent", again=True)
    assert seen == ["first", "first~1", "first~2"]


def test_a_worker_that_is_sent_away_again_and_again_asks_less_and_less_often(at: str) -> None:
    class Full(Coordinator):
        def hello(self, hello: Hello, link: Link) -> None:
            self.heard.append((hello.incarnation, hello))
            link.send(Refused(reason="full", again=True))
            link.close()

    full = Full()
    with Listener(full, [at]), ProcessUplink(at, hello()) as uplink:
        for _ in range(4):
            assert receive(uplink) == Refused(reason="full", again=True)
        began = time.monotonic()
    assert len(full.heard) <= 5
    assert time.monotonic() - began < 3, "closing does not wait for its next turn"


def test_without_a_coordinator_news_is_dropped_and_results_are_kept(coordinator: Coordinator, at: str) -> None:
    Path(at.removeprefix("ipc://")).parent.mkdir(mode=0o700)
    with ProcessUplink(at, hello()) as uplink:
        for number in range(2 * SOFT_OUTBOX):
            uplink.send(Heartbeat(kept=number))
        for number in range(100):
            uplink.send(done(str(number)))
        with Listener(coordinator, [at]):
            wait_until(lambda: len(coordinator.heard) >= 100 and coordinator.heard[-1][1] == done("99"))
    results = [message for _, message in coordinator.heard if isinstance(message, TaskDone)]
    assert results == [done(str(number)) for number in range(100)]
    assert len(coordinator.heard) - len(results) <= SOFT_OUTBOX


def test_what_may_wait_for_more_comes_in_order_and_without_more(
    coordinator: Coordinator, listener: Listener, at: str
) -> None:
    steps = [Stepped(job="a", stage="denoise", attempt=1, step=n, steps=9, seconds=0.01 * n) for n in range(1, 10)]
    with ProcessUplink(at, hello()) as uplink:
        for step in steps:
            uplink.send(step)
        uplink.send(done("a"))
        wait_until(lambda: [message for _, message in coordinator.heard] == [*steps, done("a")])


def test_a_step_soon_after_its_task_came_is_told_without_anything_more(
    coordinator: Coordinator, listener: Listener, at: str
) -> None:
    task = Task(job="a", stage="denoise", attempt=1, fields={}, seed=0)
    step = Stepped(job="a", stage="denoise", attempt=1, step=1, steps=9, seconds=0.01)
    with ProcessUplink(at, hello()) as uplink:
        assert isinstance(receive(uplink), Welcome)
        coordinator.links["first"].send(Run(task=task))
        assert receive(uplink) == Run(task=task)
        uplink.send(step)
        wait_until(lambda: coordinator.heard == [("first", step)])


def test_closing_sends_what_is_queued(coordinator: Coordinator, listener: Listener, at: str) -> None:
    uplink = ProcessUplink(at, hello())
    for number in range(1000):
        uplink.send(done(str(number)))
    uplink.send(Goodbye())
    uplink.close()
    uplink.close()
    assert len(coordinator.heard) == 1001


def test_closing_without_a_coordinator_does_not_take_long(tmp_path: Path) -> None:
    uplink = ProcessUplink(f"ipc://{tmp_path / 'nobody'}", hello())
    began = time.monotonic()
    uplink.close()
    assert time.monotonic() - began < 10
    uplink.send(Goodbye())
    assert uplink.receive(0) is None
    assert uplink.receive(None) == Stop(), "nobody waits for ever"


def test_several_threads_may_send_and_receive(coordinator: Coordinator, listener: Listener, at: str) -> None:
    got: list[ToWorker | None] = []
    with ProcessUplink(at, hello()) as uplink:
        assert isinstance(receive(uplink), Welcome)
        threads = [threading.Thread(target=lambda: got.append(uplink.receive(PATIENCE))) for _ in range(4)]
        threads += [threading.Thread(target=uplink.send, args=(done(str(i)),)) for i in range(20)]
        for thread in threads:
            thread.start()
        for job in "abc":
            coordinator.links["first"].send(Cancel(job=job))
        coordinator.links["first"].send(Drain())
        for thread in threads:
            thread.join(PATIENCE)
        wait_until(lambda: len(coordinator.heard) == 20)
    assert len(got) == 4 and Drain() in got

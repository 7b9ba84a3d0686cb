"""The listener: who may join and how, and that what is said arrives once and in order, whatever happens between."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from tests.cluster.wires import PATIENCE, Cable, Coordinator, environment, hello, wait_until
from triptych.cluster.jobs import Link
from triptych.cluster.lines.doors import Came, UnixDoor
from triptych.cluster.lines.keys import ServerKeys, load_client_keys, make_client_keys, make_server_keys, remove_client
from triptych.cluster.lines.network import Listener
from triptych.errors import InvalidRequest, TriptychError
from triptych.line import MAX_MESSAGE, MAX_QUEUED, Line
from triptych.messages import (
    PROTOCOL,
    Cancel,
    FromWorker,
    Goodbye,
    Hello,
    Loading,
    Proved,
    Ready,
    Refused,
    Stop,
    ToWorker,
    Welcome,
    decode_to_worker,
    encode,
)
from triptych.stream import GREETING, Stream
from triptych.worker.uplink import ProcessUplink


@pytest.fixture
def coordinator() -> Coordinator:
    return Coordinator()


@pytest.fixture
def at(tmp_path: Path) -> str:
    """A place for a Unix socket."""
    return f"ipc://{tmp_path / 'run' / 'triptych.sock'}"


@pytest.fixture
def keys(tmp_path: Path) -> ServerKeys:
    return make_server_keys(tmp_path / "keys")


@pytest.fixture
def listener(coordinator: Coordinator, at: str, keys: ServerKeys) -> Iterator[Listener]:
    with Listener(coordinator, [at, "127.0.0.1:0"], keys) as listening:
        yield listening


class Raw:
    """A peer at a Unix socket that need not behave."""

    def __init__(self, connection: socket.socket) -> None:
        self._stream = Stream(connection)
        self._frames: list[bytes] = []

    def send(self, frame: bytes) -> None:
        self._stream.send(frame)

    def send_bytes(self, data: bytes) -> None:
        self._stream.connection.sendall(data)

    def receive(self, seconds: float = PATIENCE) -> bytes:
        """The next frame. Raises ConnectionResetError once the other end has hung up."""
        while not self._frames:
            assert select.select([self._stream.connection], [], [], seconds)[0]
            self._frames = self._stream.receive()
        return self._frames.pop(0)


@contextlib.contextmanager
def raw(at: str, incarnation: str) -> Iterator[Raw]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(at.removeprefix("ipc://"))
        peer = Raw(connection)
        assert peer.receive() == GREETING
        peer.send(incarnation.encode())
        yield peer


def answer(peer: Raw, line: Line) -> ToWorker:
    while True:
        body, _ = line.take(peer.receive())
        if body is not None:
            return decode_to_worker(body)


def receive(uplink: ProcessUplink) -> ToWorker:
    message = uplink.receive(PATIENCE)
    assert message is not None
    return message


def test_a_worker_joins_says_and_hears_in_order_and_leaves(
    coordinator: Coordinator, listener: Listener, at: str
) -> None:
    with ProcessUplink(at, hello()) as uplink:
        assert isinstance(receive(uplink), Welcome)
        for number in range(500):
            uplink.send(Proved(healthy=True, reason=str(number)))
            coordinator.links["first"].send(Cancel(job=str(number)))
        assert [receive(uplink) for _ in range(500)] == [Cancel(job=str(number)) for number in range(500)]
        uplink.send(Goodbye(reason="done"))
    wait_until(lambda: len(coordinator.heard) == 501)
    assert coordinator.heard[:500] == [("first", Proved(healthy=True, reason=str(number))) for number in range(500)]
    assert coordinator.heard[500] == ("first", Goodbye(reason="done"))
    assert not coordinator.gone


def test_the_clock_is_driven(coordinator: Coordinator, listener: Listener) -> None:
    wait_until(lambda: coordinator.ticks >= 3)


def test_after_a_pause_workers_are_heard_before_they_are_judged(
    coordinator: Coordinator, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triptych.cluster.lines.network.STOPPED_SECONDS", 0.5)
    events: list[str] = []
    stopped, go_on = threading.Event(), threading.Event()

    def tick() -> None:
        events.append("tick")

    def hear(incarnation: str, message: object) -> None:
        events.append(str(message.reason))  # pyright: ignore[reportAttributeAccessIssue]
        if message == Proved(healthy=True, reason="pause"):
            stopped.set()
            go_on.wait(PATIENCE)
            time.sleep(0.6)

    monkeypatch.setattr(coordinator, "tick", tick)
    monkeypatch.setattr(coordinator, "hear", hear)
    with Listener(coordinator, [at]), ProcessUplink(at, hello()) as uplink:
        uplink.send(Proved(healthy=True, reason="pause"))
        assert stopped.wait(PATIENCE)
        go_on.set()
        uplink.send(Proved(healthy=True, reason="heard"))
        wait_until(lambda: "heard" in events and events[-1] == "tick")
    assert "tick" not in events[events.index("pause") : events.index("heard")]


def test_a_listed_key_joins_over_tcp(coordinator: Coordinator, listener: Listener, keys: ServerKeys) -> None:
    client = load_client_keys(make_client_keys(keys.clients.parent, "gpu-1"))
    with ProcessUplink(listener.endpoints[1], hello(), client) as uplink:
        assert isinstance(receive(uplink), Welcome)


def test_a_key_that_is_not_listed_is_refused_on_both_sides(
    coordinator: Coordinator, listener: Listener, keys: ServerKeys, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = make_server_keys(tmp_path / "elsewhere")
    client = load_client_keys(make_client_keys(keys.clients.parent, "a"))
    client = dataclasses.replace(client, public=stranger.public, secret=stranger.secret)
    with ProcessUplink(listener.endpoints[1], hello(), client) as uplink:
        refused = receive(uplink)
    assert isinstance(refused, Refused) and not refused.again
    assert "does not have this key on its list" in refused.reason
    assert any(stranger.public in record.getMessage() for record in caplog.records)
    assert not coordinator.links


def test_a_server_with_another_key_is_refused(
    coordinator: Coordinator, listener: Listener, keys: ServerKeys, tmp_path: Path
) -> None:
    client = load_client_keys(make_client_keys(keys.clients.parent, "a"))
    other = dataclasses.replace(client, server=make_server_keys(tmp_path / "elsewhere").public)
    with ProcessUplink(listener.endpoints[1], hello(), other) as uplink:
        refused = receive(uplink)
    assert isinstance(refused, Refused) and "its key is not the one" in refused.reason
    assert not coordinator.links


def test_a_worker_without_keys_is_refused(coordinator: Coordinator, listener: Listener) -> None:
    with pytest.raises(InvalidRequest, match="key file") as caught:
        ProcessUplink(listener.endpoints[1], hello())
    assert caught.value.field == "key"
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.set(zmq.ROUTING_ID, b"first")
        dealer.set(zmq.LINGER, 0)
        dealer.connect(listener.endpoints[1])
        dealer.send(Line().send(encode(hello())))
        assert not dealer.poll(1000)
    assert not coordinator.links


def test_a_key_can_be_added_and_taken_away_while_it_listens(
    coordinator: Coordinator, listener: Listener, keys: ServerKeys
) -> None:
    client = load_client_keys(make_client_keys(keys.clients.parent, "late"))
    with ProcessUplink(listener.endpoints[1], hello(), client) as uplink:
        assert isinstance(receive(uplink), Welcome)
        remove_client(keys.clients.parent, "late")
        refused = receive(uplink)
        assert refused == Refused(reason="its key is no longer on the list")
    wait_until(lambda: coordinator.gone)
    assert coordinator.gone == [("first", "its key is no longer on the list")]
    with ProcessUplink(listener.endpoints[1], hello("second"), client) as uplink:
        assert isinstance(receive(uplink), Refused)


def test_tcp_without_keys_is_refused(coordinator: Coordinator) -> None:
    with pytest.raises(InvalidRequest, match="needs keys") as caught:
        Listener(coordinator, ["127.0.0.1:0"])
    assert caught.value.field == "keys"


@pytest.mark.parametrize("endpoint", ["", "udp://127.0.0.1:1", "tcp://", "tcp://127.0.0.1", "127.0.0.1:no", "ipc://"])
def test_what_is_no_endpoint_is_refused(coordinator: Coordinator, keys: ServerKeys, endpoint: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Listener(coordinator, [endpoint], keys)
    assert caught.value.field == "listen"


def test_a_port_in_use_is_one_clear_line(coordinator: Coordinator, keys: ServerKeys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TriptychError) as caught:
            Listener(coordinator, [f"127.0.0.1:{port}"], keys)
    assert str(caught.value) == f"listen: the port of 127.0.0.1:{port} is in use"


def test_an_address_of_another_machine_is_refused(coordinator: Coordinator, keys: ServerKeys) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Listener(coordinator, ["192.0.2.1:0"], keys)
    assert caught.value.field == "listen"


def test_a_unix_socket_needs_a_folder_that_is_ours_alone(coordinator: Coordinator, tmp_path: Path) -> None:
    open_folder = tmp_path / "open"
    open_folder.mkdir(mode=0o755)
    with pytest.raises(InvalidRequest, match=f"chmod 700 {open_folder}"):
        Listener(coordinator, [f"ipc://{open_folder}/s"])
    (tmp_path / "link").symlink_to(open_folder)
    with pytest.raises(InvalidRequest, match="not a folder of this user"):
        Listener(coordinator, [f"ipc://{tmp_path}/link/s"])
    with pytest.raises(InvalidRequest, match="at most 107 bytes"):
        Listener(coordinator, [f"ipc://{tmp_path}/{'long' * 30}/s"])


def test_a_file_in_the_sockets_place_is_left_alone(coordinator: Coordinator, at: str) -> None:
    path = Path(at.removeprefix("ipc://"))
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.write_text("a letter")
    with pytest.raises(InvalidRequest) as caught:
        Listener(coordinator, [at])
    assert str(caught.value) == f"listen: {at} is a file that is no socket"
    assert path.read_text() == "a letter"


def test_a_unix_socket_and_its_folder_are_private(listener: Listener, at: str) -> None:
    path = Path(at.removeprefix("ipc://"))
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_a_second_coordinator_does_not_take_the_socket_of_the_first(
    coordinator: Coordinator, listener: Listener, at: str
) -> None:
    with pytest.raises(InvalidRequest, match="another coordinator listens"):
        Listener(Coordinator(), [at])
    with ProcessUplink(at, hello()) as uplink:
        assert isinstance(receive(uplink), Welcome)
    assert "first" in coordinator.links


def test_nothing_is_left_behind(coordinator: Coordinator, at: str) -> None:
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for number in range(3):
        with Listener(coordinator, [at]), ProcessUplink(at, hello(str(number))) as uplink:
            assert isinstance(receive(uplink), Welcome)
    assert not Path(at.removeprefix("ipc://")).exists()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) <= files


def test_a_worker_comes_back_by_itself_to_a_restarted_coordinator(at: str) -> None:
    first, second = Coordinator(), Coordinator()
    with Listener(first, [at]) as listener, ProcessUplink(at, hello()) as uplink:
        assert isinstance(receive(uplink), Welcome)
        listener.close()
        with Listener(second, [at]):
            refused = receive(uplink)
            assert isinstance(refused, Refused) and refused.again
            assert isinstance(receive(uplink), Welcome)
            assert uplink.incarnation != "first"
            assert list(second.links) == [uplink.incarnation]
            second.links[uplink.incarnation].send(Stop())
            assert receive(uplink) == Stop()


def test_a_coordinator_that_is_killed_leaves_a_place_for_the_next(coordinator: Coordinator, at: str) -> None:
    code = (
        "import sys\n"
        "from tests.cluster.wires import Coordinator\n"
        "from triptych.cluster.lines.network import Listener\n"
        "with Listener(Coordinator(), [sys.argv[1]]):\n"
        "    print('listening', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code, at], stdin=pipe, stdout=pipe, env=environment()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"listening\n"
        with ProcessUplink(at, hello()) as uplink:
            assert isinstance(receive(uplink), Welcome)
            process.send_signal(signal.SIGKILL)
            process.wait()
            with Listener(coordinator, [at]):
                assert receive(uplink) == Refused(reason="it is not known here, or was taken for dead", again=True)
                assert isinstance(receive(uplink), Welcome)


def test_a_cable_pulled_and_put_back_loses_and_repeats_nothing(
    coordinator: Coordinator, listener: Listener, keys: ServerKeys
) -> None:
    client = load_client_keys(make_client_keys(keys.clients.parent, "a"))
    port = int(listener.endpoints[1].rpartition(":")[2])
    with Cable(port) as cable, ProcessUplink(cable.at, hello(), client) as uplink:
        assert isinstance(receive(uplink), Welcome)
        link = coordinator.links["first"]
        for number in range(200):
            uplink.send(Goodbye(reason=str(number)))
            link.send(Cancel(job=str(number)))
            if number % 50 == 20:
                cable.pull()
            if number % 50 == 40:
                cable.put_back()
        cable.put_back()
        assert [receive(uplink) for _ in range(200)] == [Cancel(job=str(number)) for number in range(200)]
        wait_until(lambda: len(coordinator.heard) >= 200)
        assert coordinator.heard == [("first", Goodbye(reason=str(number))) for number in range(200)]
        assert uplink.incarnation == "first"


def test_an_outage_behind_something_that_answers_is_waited_out(
    coordinator: Coordinator, listener: Listener, keys: ServerKeys
) -> None:
    client = load_client_keys(make_client_keys(keys.clients.parent, "a"))
    port = int(listener.endpoints[1].rpartition(":")[2])
    with Cable(port) as cable, ProcessUplink(cable.at, hello(), client) as uplink:
        assert isinstance(receive(uplink), Welcome)
        cable.pull()  # from now on connections are taken and closed, as by a proxy with nothing behind it
        assert uplink.receive(4.0) is None, "a worker that was welcome does not leave for that"
        cable.put_back()
        coordinator.links["first"].send(Cancel(job="x"))
        assert receive(uplink) == Cancel(job="x")
        assert uplink.incarnation == "first"


def test_a_worker_of_another_protocol_is_refused_with_the_reason_on_both_sides(
    coordinator: Coordinator, listener: Listener, at: str, caplog: pytest.LogCaptureFixture
) -> None:
    later = {"type": "Hello", "protocol": PROTOCOL + 1, "unheard_of": True}
    with raw(at, "later") as dealer:
        dealer.send(Line().send(msgspec.msgpack.encode(later)))
        refused = answer(dealer, Line())
    reason = f"it speaks protocol {PROTOCOL + 1}; this coordinator speaks {PROTOCOL}"
    assert refused == Refused(reason=reason) and reason in caplog.text
    assert not coordinator.links


def test_a_worker_at_whose_hello_the_coordinator_fails_may_try_again(
    coordinator: Coordinator, listener: Listener, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hear, failures = coordinator.hello, iter([RuntimeError("a bug")])

    def picky(hello: Hello, link: Link) -> None:
        for failure in failures:
            raise failure
        hear(hello, link)

    monkeypatch.setattr(coordinator, "hello", picky)
    with ProcessUplink(at, hello()) as uplink:
        refused = receive(uplink)
        assert isinstance(refused, Refused) and refused.again
        assert isinstance(receive(uplink), Welcome)


def test_what_cannot_be_read_is_logged_and_dropped(
    coordinator: Coordinator, listener: Listener, at: str, caplog: pytest.LogCaptureFixture
) -> None:
    line = Line()
    with raw(at, "first") as dealer:
        dealer.send(line.send(encode(hello())))
        assert isinstance(answer(dealer, line), Welcome)
        for junk in (b"", b"?", b"\xff" * 40, line.send(b"\xc1 no msgpack"), line.send(encode(Stop()))):
            dealer.send(junk)
        dealer.send(line.send(encode(Loading(what="good"))))
        wait_until(lambda: coordinator.heard)
    assert coordinator.heard == [("first", Loading(what="good"))]
    assert sum("dropped" in record.getMessage() for record in caplog.records) == 5


@pytest.mark.parametrize("junk", [b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\0", struct.pack("<I", 256) + bytes(256)])
def test_what_is_no_worker_is_hung_up_and_the_others_go_on(
    coordinator: Coordinator, listener: Listener, at: str, junk: bytes
) -> None:
    with socket.socket(socket.AF_UNIX) as connection, ProcessUplink(at, hello()) as uplink:
        assert isinstance(receive(uplink), Welcome)
        connection.connect(at.removeprefix("ipc://"))
        peer = Raw(connection)
        assert peer.receive() == GREETING
        peer.send_bytes(junk)
        with pytest.raises(ConnectionResetError):
            peer.receive()
        coordinator.links["first"].send(Cancel(job="x"))
        assert receive(uplink) == Cancel(job="x")


def test_who_comes_back_takes_the_place_of_its_dead_connection(
    coordinator: Coordinator, listener: Listener, at: str
) -> None:
    line = Line()
    with raw(at, "first") as dead, raw(at, "first") as alive:
        alive.send(line.send(encode(hello())))
        assert isinstance(answer(alive, line), Welcome)
        with pytest.raises(ConnectionResetError):
            dead.receive()
        coordinator.links["first"].send(Cancel(job="x"))
        assert answer(alive, line) == Cancel(job="x")


def test_what_a_worker_said_before_it_left_is_heard(
    coordinator: Coordinator, listener: Listener, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hear = coordinator.hear

    def answering(incarnation: str, message: FromWorker) -> None:
        coordinator.links["first"].send(Cancel(job="x"))
        hear(incarnation, message)

    monkeypatch.setattr(coordinator, "hear", answering)
    line = Line()
    with raw(at, "first") as peer:
        peer.send(line.send(encode(hello())))
        assert isinstance(answer(peer, line), Welcome)
        for number in range(50):
            peer.send(line.send(encode(Loading(what=str(number)))))
    wait_until(lambda: len(coordinator.heard) == 50)


def test_messages_that_no_socket_holds_pass_both_ways(coordinator: Coordinator, listener: Listener, at: str) -> None:
    long = [f"{number}" * (3 << 20) for number in range(4)]
    with ProcessUplink(at, hello()) as uplink:
        assert isinstance(receive(uplink), Welcome)
        for text in long:
            uplink.send(Proved(healthy=True, reason=text))
            coordinator.links["first"].send(Cancel(job=text))
        assert [receive(uplink) for _ in long] == [Cancel(job=text) for text in long]
        wait_until(lambda: len(coordinator.heard) == 4)
    assert coordinator.heard == [("first", Proved(healthy=True, reason=text)) for text in long]


def _asking_again() -> bytes:
    line = Line()
    line.send(b"")
    return line.resume()[-1]


def test_who_does_not_say_hello_is_told_to(coordinator: Coordinator, listener: Listener, at: str) -> None:
    for frame in (Line().send(encode(Loading(what="x"))), Line().idle(), _asking_again()):
        with raw(at, "x") as dealer:
            dealer.send(frame)
            refused = answer(dealer, Line())
            assert isinstance(refused, Refused) and refused.again
    with raw(at, "mine") as dealer:
        dealer.send(Line().send(encode(hello("anothers"))))
        refused = answer(dealer, Line())
        assert isinstance(refused, Refused) and not refused.again
    assert not coordinator.links


def test_another_key_cannot_speak_for_a_worker(
    coordinator: Coordinator, listener: Listener, keys: ServerKeys, at: str
) -> None:
    client = load_client_keys(make_client_keys(keys.clients.parent, "a"))
    with ProcessUplink(listener.endpoints[1], hello(), client) as uplink, raw(at, "first") as dealer:
        assert isinstance(receive(uplink), Welcome)
        liar = Line()
        liar.send(b"")
        dealer.send(liar.send(encode(Goodbye(reason="a lie"))))
        uplink.send(Loading(what="mine"))
        wait_until(lambda: coordinator.heard)
    assert coordinator.heard[0] == ("first", Loading(what="mine"))


def test_links_are_sent_over_from_many_threads(coordinator: Coordinator, listener: Listener, at: str) -> None:
    with ProcessUplink(at, hello()) as uplink:
        assert isinstance(receive(uplink), Welcome)
        link = coordinator.links["first"]
        threads = [
            threading.Thread(target=lambda name=name: [link.send(Cancel(job=f"{name}{i}")) for i in range(200)])
            for name in "abcd"
        ]
        for thread in threads:
            thread.start()
        got = [receive(uplink) for _ in range(800)]
        for thread in threads:
            thread.join()
    jobs = [message.job for message in got if isinstance(message, Cancel)]
    assert all([job for job in jobs if job[0] == name] == [f"{name}{i}" for i in range(200)] for name in "abcd")


def test_a_worker_that_takes_nothing_is_hung_up_and_the_others_go_on(
    coordinator: Coordinator, listener: Listener, at: str
) -> None:
    line = Line()
    with raw(at, "deaf") as dealer, ProcessUplink(at, hello()) as uplink:
        dealer.send(line.send(encode(hello("deaf"))))
        assert isinstance(receive(uplink), Welcome)
        wait_until(lambda: "deaf" in coordinator.links)
        for number in range(MAX_QUEUED + 10):
            coordinator.links["deaf"].send(Cancel(job=str(number)))
        wait_until(lambda: coordinator.gone)
        assert coordinator.gone == [("deaf", "it does not take what it is sent")]
        coordinator.links["first"].send(Cancel(job="x"))
        assert receive(uplink) == Cancel(job="x")


def test_a_closed_link_sends_what_came_before_and_forgets_the_worker(
    coordinator: Coordinator, listener: Listener, at: str
) -> None:
    with ProcessUplink(at, hello()) as uplink:
        assert isinstance(receive(uplink), Welcome)
        link = coordinator.links["first"]
        link.send(Cancel(job="x"))
        link.close()
        link.send(Cancel(job="y"))
        assert receive(uplink) == Cancel(job="x")
        refused = receive(uplink)  # when it next says something
        assert isinstance(refused, Refused) and refused.again
        assert isinstance(receive(uplink), Welcome)


def test_a_coordinator_that_fails_at_one_message_hears_the_next(
    listener: Listener,
    coordinator: Coordinator,
    at: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hear = coordinator.hear

    def picky(incarnation: str, message: object) -> None:
        if message == Loading(what="bad"):
            raise RuntimeError("a bug")
        hear(incarnation, message)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(coordinator, "hear", picky)
    with caplog.at_level(logging.ERROR), ProcessUplink(at, hello()) as uplink:
        uplink.send(Loading(what="bad"))
        uplink.send(Loading(what="good"))
        wait_until(lambda: coordinator.heard)
    assert coordinator.heard[0] == ("first", Loading(what="good"))
    assert "the coordinator failed" in caplog.text


def test_a_listener_that_stumbles_goes_on(
    coordinator: Coordinator,
    listener: Listener,
    at: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    failures = iter([RuntimeError("a bug")])
    take = UnixDoor.take

    def stumble(door: UnixDoor) -> Iterator[Came]:
        for failure in failures:
            raise failure
        yield from take(door)

    monkeypatch.setattr(UnixDoor, "take", stumble)
    wait_until(lambda: "the listener stumbled" in caplog.text)
    ticks = coordinator.ticks
    with ProcessUplink(at, hello()) as uplink:
        assert isinstance(receive(uplink), Welcome)
    wait_until(lambda: coordinator.ticks > ticks)


def test_large_messages_pass_and_larger_ones_are_refused_by_their_sender(
    coordinator: Coordinator, listener: Listener, at: str
) -> None:
    def ready(size: int) -> Ready:
        return Ready(topology=bytes(size), capacity={}, credits={}, weights={})

    with ProcessUplink(at, hello()) as uplink:
        uplink.send(ready(8 << 20))
        wait_until(lambda: coordinator.heard)
        with pytest.raises(TriptychError, match="at most"):
            uplink.send(ready(MAX_MESSAGE))

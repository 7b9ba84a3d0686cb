"""Who may read what is kept: processes of this user on this host, and whoever shows an unused ticket's token."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from triptych.errors import PayloadLost, Unsupported
from triptych.messages import Address, Descriptor, Ticket, ticket_for
from triptych.transfer import Exchange, Payload, TransferSettings
from triptych.transfer import local as local_module
from triptych.transfer.local import SegmentReader
from triptych.transfer.mooncake import HCA_FOLDER, Mooncake, protocol_in_use
from triptych.transfer.wire import ANSWER, Ask, Unreachable, client_connection, receive_into, send_message

MIB = 2**20
SMALL: dict[str, Any] = {"pool_bytes": MIB, "budget_bytes": 16 * MIB}
linux = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no memfd")


@pytest.fixture
def tcp() -> Iterator[Exchange]:
    with Exchange(TransferSettings(**SMALL, routes=("tcp",))) as exchange:
        yield exchange


def published(exchange: Exchange) -> Descriptor:
    return exchange.publish(Payload({"x": torch.ones(5000)}))


def answered(at: str, ask: Ask) -> bytes:
    """What a connection that asks so gets back before it is dropped."""
    with client_connection(at, 10.0, 10.0) as connection:
        send_message(connection, ask)
        return connection.recv(ANSWER.size)


def test_a_connection_without_a_good_token_is_dropped(tcp: Exchange) -> None:
    descriptor, at = published(tcp), tcp.addresses[0].at
    good = ticket_for(descriptor, tcp.secret).token
    foreign = ticket_for(msgspec.structs.replace(descriptor, payload=f"{tcp.owner}-77"), tcp.secret).token
    for token in (b"", b"x" * 48, good[:-1], good[:-1] + bytes([good[-1] ^ 1]), foreign):
        assert answered(at, Ask(descriptor.payload, descriptor.generation, token)) == b""
    assert tcp.stats().refused == 5
    assert len(answered(at, Ask(descriptor.payload, descriptor.generation, good))) == ANSWER.size


def test_a_token_is_good_once(tcp: Exchange) -> None:
    ticket = ticket_for(published(tcp), tcp.secret)
    with Exchange(TransferSettings(**SMALL, routes=("tcp",))) as reader:
        reader.fetch(ticket).close()
        with pytest.raises(PayloadLost, match="broke"):
            reader.fetch(ticket)
    assert tcp.stats().refused >= 1
    assert tcp.stats().sent == {"tcp": 1}


def test_what_speaks_something_else_is_dropped(tcp: Exchange) -> None:
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\xff\xff" + bytes(100), b"\x03\x00abc"):
        connection = client_connection(tcp.addresses[0].at, 10.0, 10.0)
        with connection, contextlib.suppress(OSError):  # dropped, perhaps with our bytes unread
            connection.sendall(noise)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(10) == b""


def test_connections_are_bounded() -> None:
    with Exchange(TransferSettings(**SMALL, routes=("tcp",), max_connections=2)) as exchange:
        descriptor, at = published(exchange), exchange.addresses[0].at
        held = [client_connection(at, 10.0, 10.0) for _ in range(2)]
        with client_connection(at, 10.0, 10.0) as third:
            assert third.recv(1) == b"", "two that have shown nothing yet are all"
        for connection in held:
            connection.close()
        for _ in range(5):  # more than there is room for, none of which hangs up
            held.append(served(exchange, descriptor))
        for connection in held:
            connection.close()


def served(exchange: Exchange, descriptor: Descriptor) -> socket.socket:
    """A connection over which a payload has come whole; tried again until there is room for it."""
    end = time.monotonic() + 30.0
    while True:
        connection = client_connection(exchange.addresses[0].at, 10.0, 10.0)
        token = ticket_for(descriptor, exchange.secret).token
        with contextlib.suppress(OSError):
            send_message(connection, Ask(descriptor.payload, descriptor.generation, token))
            whole = bytearray(ANSWER.size + descriptor.head + descriptor.body)
            if receive_into(connection, memoryview(whole)):
                return connection
        connection.close()
        assert time.monotonic() < end, "nobody makes room"


@linux
def test_want_of_descriptors_passes(tcp: Exchange) -> None:
    descriptor, at = published(tcp), tcp.addresses[0].at
    accepting = next(one for one in threading.enumerate() if one.name == "transfer-accept")
    with Exchange(TransferSettings(**SMALL, routes=("tcp",))) as reader, contextlib.ExitStack() as stack:
        client = stack.enter_context(socket.socket())
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 2, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
            host, _, port = at.rpartition(":")
            client.connect((host, int(port)))
            accepting.join(0.5)  # it cannot take the connection, and must not end of it
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        stack.close()
        reader.fetch(ticket_for(descriptor, tcp.secret)).close()
        assert accepting.is_alive()


def test_tls_is_pinned_to_the_announced_certificate() -> None:
    settings = TransferSettings(**SMALL, routes=("tcp",), tls=True)
    with Exchange(settings) as a, Exchange(settings) as other, Exchange(settings) as reader:
        descriptor = published(a)
        mine, foreign = a.addresses[0].at, other.addresses[0].at
        wrong = Address(route="tcp", at=mine.partition("#")[0] + "#" + foreign.partition("#")[2])
        forged = msgspec.structs.replace(descriptor, addresses=(wrong,))
        with pytest.raises(PayloadLost, match="another certificate"):
            reader.fetch(ticket_for(forged, a.secret))
        reader.fetch(ticket_for(descriptor, a.secret)).close()
        plain = Address(route="tcp", at=mine.partition("#")[0])
        bare = msgspec.structs.replace(descriptor, addresses=(plain,))
        with pytest.raises(PayloadLost):
            reader.fetch(ticket_for(bare, a.secret))


def test_with_tls_nothing_is_readable_on_the_wire() -> None:
    """A tap between the two sees neither the header's words nor the body's bytes; without tls it sees both."""
    marks = (b"a-secret-prompt", bytes(range(64)))
    for tls in (False, True):
        settings = TransferSettings(**SMALL, routes=("tcp",), tls=tls)
        with Exchange(settings) as a, Tap(a.addresses[0].at) as tap, Exchange(settings) as b:
            descriptor = a.publish(Payload({"x": torch.arange(64, dtype=torch.uint8), "p": "a-secret-prompt"}))
            tapped = msgspec.structs.replace(descriptor, addresses=(Address(route="tcp", at=tap.at),))
            with b.fetch(ticket_for(tapped, a.secret)) as got:
                assert got.payload.values["p"] == "a-secret-prompt"
        assert [mark in tap.seen for mark in marks] == [not tls, not tls]


class Tap:
    """Listens in on one connection to an address."""

    def __init__(self, at: str) -> None:
        where, _, fingerprint = at.partition("#")
        self._port = int(where.rpartition(":")[2])
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.at = f"127.0.0.1:{self._listening.getsockname()[1]}" + (f"#{fingerprint}" if fingerprint else "")
        self.seen = b""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        near, _ = self._listening.accept()
        far = socket.create_connection(("127.0.0.1", self._port))
        back = threading.Thread(target=self._copy, args=(far, near), daemon=True)
        back.start()
        self._copy(near, far)
        back.join(30.0)
        near.close()
        far.close()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self.seen += data
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(30.0)
        self._listening.close()


@linux
def test_the_folder_and_what_is_handed_out(short_path: Path) -> None:
    folder = short_path / "sockets"
    with Exchange(TransferSettings(**SMALL, routes=("memfd",)), folder=folder) as exchange:
        published(exchange)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        reader = SegmentReader(10.0)
        fd, size, live = reader.ask(str(folder / f"{exchange.owner}.sock"), 0)
        reader.close()
        try:
            assert size == MIB and live == [0]
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(fd, b"x", 0)
        finally:
            os.close(fd)
    assert not folder.exists()


@linux
def test_a_folder_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(Unsupported, match="mode 0700"):
        Exchange(TransferSettings(**SMALL, routes=("memfd",)), folder=tmp_path)
    with pytest.raises(Unsupported, match="too long"):
        Exchange(TransferSettings(**SMALL, routes=("memfd",)), folder=tmp_path / ("x" * 120))


@linux
def test_a_folder_that_cannot_be_is_said(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TransferSettings(**SMALL, routes=("memfd",))
    (short_path / "file").touch()
    for folder in (short_path / "file", short_path / "file" / "below"):
        with pytest.raises(Unsupported, match="cannot be a folder"):
            Exchange(settings, folder=folder)
    deep = short_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(Unsupported, match="no socket can be in"):
        Exchange(settings)
    assert list(deep.iterdir()) == []


@linux
def test_another_user_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with Exchange(TransferSettings(**SMALL, routes=("memfd",))) as exchange:
        published(exchange)
        path = exchange.addresses[0].at.partition(":")[2]
        reader = SegmentReader(10.0)
        monkeypatch.setattr(local_module, "peer_uid", lambda connection: os.getuid() + 1)
        with pytest.raises(Unreachable, match="another user"):
            reader.ask(path, 0)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10.0)
            connection.connect(path)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # dropped with our bytes unread
                connection.sendall(b"tripfd01" + bytes(4))
                assert connection.recv(10) == b""
        reader.close()


@linux
def test_sockets_of_the_dead_are_swept_and_the_living_stay(short_path: Path) -> None:
    folder = short_path / "sockets"
    folder.mkdir(mode=0o700)
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(folder / "0123456789abcdef.sock"))
    dead.close()
    settings = TransferSettings(**SMALL, routes=("memfd",))
    with Exchange(settings, folder=folder) as first, Exchange(settings, folder=folder) as second:
        assert sorted(path.stem for path in folder.iterdir()) == sorted([first.owner, second.owner])
    assert list(folder.iterdir()) == []


@linux
@pytest.mark.parametrize("place", ["0:1:4096", "0:0:999999999", "0:-4096:4096", "9:0:4096", "nonsense", "0:0:0"])
def test_a_forged_place_reads_nothing(place: str) -> None:
    settings = TransferSettings(**SMALL, routes=("memfd",))
    with Exchange(settings) as a, Exchange(settings) as b:
        descriptor = published(a)
        at = descriptor.addresses[0].at.partition("#")[0]
        forged = msgspec.structs.replace(descriptor, addresses=(Address(route="memfd", at=f"{at}#{place}"),))
        with pytest.raises(PayloadLost):
            b.fetch(Ticket(descriptor=forged))
        larger = msgspec.structs.replace(descriptor, body=MIB // 2)
        with pytest.raises(PayloadLost):
            b.fetch(Ticket(descriptor=larger))


def test_the_protocol_really_in_use_is_told(tmp_path: Path) -> None:
    """Mooncake takes any name and runs over TCP where there is no adapter."""
    assert protocol_in_use("rdma", tmp_path / "none") == "tcp"
    assert protocol_in_use("rdma", tmp_path) == "tcp"
    (tmp_path / "mlx5_0").mkdir()
    assert protocol_in_use("rdma", tmp_path) == "rdma"


@pytest.mark.skipif(HCA_FOLDER.exists(), reason="this machine has an RDMA adapter")
def test_rdma_without_an_adapter_is_refused() -> None:
    with pytest.raises(Unsupported, match="would run over tcp"):
        Exchange(TransferSettings(**SMALL, routes=("mooncake",), mooncake=True, mooncake_protocol="rdma"))


def test_mooncake_is_refused_on_a_public_address(monkeypatch: pytest.MonkeyPatch) -> None:
    from triptych.transfer import mooncake

    monkeypatch.setattr(mooncake, "public_addresses", lambda: ["93.184.216.34"])
    settings = TransferSettings(**SMALL, mooncake=True)
    with pytest.raises(Unsupported, match="open to everybody on 93"):
        Mooncake(settings)


def test_mooncake_that_cannot_be_loaded_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    with pytest.raises(Unsupported, match="extra `mooncake`"):
        Exchange(TransferSettings(**SMALL, mooncake=True))


def test_tls_fingerprints_are_of_the_certificate() -> None:
    with Exchange(TransferSettings(**SMALL, routes=("tcp",), tls=True)) as exchange:
        assert len(bytes.fromhex(exchange.addresses[0].at.partition("#")[2])) == hashlib.sha256().digest_size

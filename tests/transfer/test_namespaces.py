"""Two hosts, as network namespaces with a cable between them, which is pulled and put back."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.transfer.peer import Peer, packed, unpacked
from tests.transfer.test_exchange import mooncake_missing
from triptych.messages import Descriptor, ticket_for

MIB = 2**20
NEAR, FAR = "10.213.7.1", "10.213.7.2"


class Cable:
    """Two namespaces joined by a veth pair. Raises OSError where the system does not allow that."""

    def __init__(self) -> None:
        self._holders: list[subprocess.Popen[bytes]] = []
        try:
            self.near = self._hold(("unshare", "-rn"))
            self.far = self._hold((*self._enter(self.near, "-U"), "unshare", "-n"))
            self._ip(self.near, "link", "add", "near", "type", "veth", "peer", "name", "far", "netns", str(self.far))
            for pid, name, address in ((self.near, "near", NEAR), (self.far, "far", FAR)):
                self._ip(pid, "link", "set", "lo", "up")
                self._ip(pid, "address", "add", f"{address}/24", "dev", name)
                self._ip(pid, "link", "set", name, "up")
        except BaseException:
            self.close()
            raise

    def _hold(self, command: tuple[str, ...]) -> int:
        if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
            raise OSError("unshare, nsenter and ip are needed")
        holder = subprocess.Popen([*command, "sleep", "600"], stderr=subprocess.PIPE)
        self._holders.append(holder)
        before = {os.readlink(f"/proc/{pid}/ns/net") for pid in ("self", *(one.pid for one in self._holders[:-1]))}
        ends = time.monotonic() + 30.0
        while holder.poll() is None and time.monotonic() < ends:
            # exec of `sleep` comes after the namespace is there
            with open(f"/proc/{holder.pid}/cmdline", "rb") as line:
                if line.read().startswith(b"sleep") and os.readlink(f"/proc/{holder.pid}/ns/net") not in before:
                    return holder.pid
            time.sleep(0.01)
        assert holder.stderr is not None
        holder.kill()
        raise OSError(holder.stderr.read().decode().strip() or "no namespace came")

    @staticmethod
    def _enter(pid: int, *kinds: str) -> tuple[str, ...]:
        return ("nsenter", "-t", str(pid), *kinds, "--preserve-credentials")

    def inside(self, pid: int) -> tuple[str, ...]:
        """What runs a command in that namespace."""
        return self._enter(pid, "-U", "-n")

    def _ip(self, pid: int, *arguments: str) -> None:
        done = subprocess.run([*self.inside(pid), "ip", *arguments], capture_output=True, text=True, timeout=30)
        if done.returncode:
            raise OSError(done.stderr.strip())

    def pull(self) -> None:
        """Out."""
        self._ip(self.far, "link", "set", "far", "down")

    def put_back(self) -> None:
        """In again."""
        self._ip(self.far, "link", "set", "far", "up")

    def close(self) -> None:
        """Removes it all."""
        for holder in reversed(self._holders):
            holder.kill()
            holder.wait(30)
            if holder.stderr is not None:
                holder.stderr.close()


@pytest.fixture
def cable() -> Iterator[Cable]:
    try:
        made = Cable()
    except OSError as error:
        pytest.skip(f"no network namespaces here: {error}")
    yield made
    made.close()


SETTINGS: dict[str, Any] = {"pool_bytes": MIB, "budget_bytes": 256 * MIB, "stall_seconds": 1.5, "connect_seconds": 1.5}


@pytest.mark.parametrize("kind", ["tcp", "tls", "mooncake"])
def test_a_cable_is_pulled_and_put_back(kind: str, cable: Cable) -> None:
    settings = {**SETTINGS, "routes": ["mooncake" if kind == "mooncake" else "tcp"], "tls": kind == "tls"}
    if kind == "mooncake":
        if reason := mooncake_missing():
            pytest.skip(reason)
        settings |= {"mooncake": True}
    with (
        Peer(cable.inside(cable.near), host=NEAR, **settings) as near,
        Peer(cable.inside(cable.far), host=FAR, **settings) as far,
    ):
        secret = bytes.fromhex(near.told["secret"])
        small, large = (unpacked(near.ask("publish", size=size)["descriptor"], Descriptor) for size in (1000, 30 * MIB))

        def fetch(descriptor: Descriptor) -> dict[str, Any]:
            return far.ask("fetch", ticket=packed(ticket_for(descriptor, secret)))

        assert fetch(small) == {"good": True, "route": settings["routes"][0]}
        cable.pull()
        began = time.monotonic()
        assert fetch(small)["code"] == "payload_lost"
        assert time.monotonic() - began < 20.0
        cable.put_back()
        assert eventually(lambda: fetch(small).get("good") is True)
        far.tell("fetch", ticket=packed(ticket_for(large, secret)))
        cable.pull()
        answer = far._answer()  # in time or not: whole, or lost
        assert answer.get("good") is True or answer["code"] == "payload_lost"
        cable.put_back()
        assert eventually(lambda: fetch(large).get("good") is True)
        far.ask("gone", owner=near.told["owner"])
        near.ask("gone", owner=far.told["owner"])
        for peer in (near, far):
            stats = peer.ask("stats")
            assert (stats["quarantined"], stats["open"], stats["damaged"]) == (0, 0, 0)


def eventually(condition: Any) -> bool:
    ends = time.monotonic() + 30.0
    while time.monotonic() < ends:
        if condition():
            return True
        time.sleep(0.1)
    return False

"""A coordinator and a worker in two network namespaces, joined by a cable that is pulled and put back."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.cluster.wires import environment
from triptych.cluster.lines.keys import make_client_keys, make_server_keys

COUNT = 200
OUTAGE = 7.0  # longer than either end's patience with a silent connection (5 s)

COORDINATOR = f"""
import sys, time
from pathlib import Path
from tests.cluster.wires import Coordinator, wait_until
from triptych.cluster.lines.keys import load_server_keys
from triptych.cluster.lines.network import Listener
from triptych.messages import Cancel, Proved

coordinator = Coordinator()
with Listener(coordinator, [sys.argv[2] + ":7000"], load_server_keys(Path(sys.argv[1]))):
    print("listening", flush=True)
    wait_until(lambda: coordinator.links)
    (link,) = coordinator.links.values()
    for number in range({COUNT}):
        link.send(Cancel(job=str(number)))
        time.sleep(0.02)
    wait_until(lambda: len(coordinator.heard) >= {COUNT})
    assert [message for _, message in coordinator.heard] == [
        Proved(healthy=True, reason=str(number)) for number in range({COUNT})
    ]
    assert len(coordinator.links) == 1
    print("heard everything once", flush=True)
    sys.stdin.read()
"""
WORKER = f"""
import sys, time
from pathlib import Path
from tests.cluster.wires import hello
from triptych.cluster.lines.keys import load_client_keys
from triptych.messages import Cancel, Proved, Welcome
from triptych.worker.uplink import ProcessUplink

with ProcessUplink(sys.argv[2] + ":7000", hello(), load_client_keys(Path(sys.argv[1]) / "a.key")) as uplink:
    assert isinstance(uplink.receive(30), Welcome)
    print("welcome", flush=True)
    for number in range({COUNT}):
        uplink.send(Proved(healthy=True, reason=str(number)))
        time.sleep(0.02)
    assert [uplink.receive(30) for _ in range({COUNT})] == [Cancel(job=str(number)) for number in range({COUNT})]
    print("heard everything once", flush=True)
    sys.stdin.read()
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def spaces() -> Iterator[tuple[str, str]]:
    """Two namespaces, 198.18.7.1 and 198.18.7.2, with a cable called `cable` at both ends."""
    near, far = (f"triptych-{uuid4().hex[:6]}" for _ in "ab")
    made = []
    try:
        if shutil.which("ip") is None:
            pytest.skip("there is no `ip` command to make network namespaces with")
        try:
            for space in (near, far):
                ip("netns", "add", space)
                made.append(space)
            ip("-n", near, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", far)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are impossible here: {error.stderr.strip()}")
        for space, address in ((near, "198.18.7.1/30"), (far, "198.18.7.2/30")):
            ip("-n", space, "address", "add", address, "dev", "cable")
            ip("-n", space, "link", "set", "cable", "up")
        yield near, far
    finally:
        for space in made:
            ip("netns", "delete", space)


def start(space: str, script: str, folder: Path) -> subprocess.Popen[str]:
    command = ["ip", "netns", "exec", space, sys.executable, "-c", script, str(folder), "198.18.7.1"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment(), text=True)


def expect(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == f"{line}\n"


def test_an_outage_loses_and_repeats_nothing(spaces: tuple[str, str], tmp_path: Path) -> None:
    near, far = spaces
    make_server_keys(tmp_path / "keys")
    make_client_keys(tmp_path / "keys", "a")
    with start(near, COORDINATOR, tmp_path / "keys") as coordinator:
        expect(coordinator, "listening")
        with start(far, WORKER, tmp_path / "keys") as worker:
            expect(worker, "welcome")
            time.sleep(0.5)
            ip("-n", far, "link", "set", "cable", "down")
            time.sleep(OUTAGE)
            ip("-n", far, "link", "set", "cable", "up")
            expect(worker, "heard everything once")
            expect(coordinator, "heard everything once")
            worker.communicate(timeout=30)
            coordinator.communicate(timeout=30)
    assert (coordinator.returncode, worker.returncode) == (0, 0)

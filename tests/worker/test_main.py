"""Workers in processes of their own, over real sockets: work, signals, exit codes, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.worker.fakes import TRANSFER, FakeCoordinator, toy_task
from tests.worker.jobs import alone, resolved, task_of, topology_of
from triptych.cluster import Listener
from triptych.messages import Goodbye, Ready, Refused, Release, TaskDone, Ticket, ticket_for
from triptych.transfer import Exchange
from triptych.worker import WorkerSettings, worker_main

ROOT = Path(__file__).resolve().parents[2]

EMOJI = """
import sys
from pathlib import Path
from triptych.transfer import TransferSettings
from triptych.worker import WorkerSettings, worker_main

endpoint, folder = sys.argv[1:]
transfer = TransferSettings(pool_bytes=1 << 20, budget_bytes=1 << 26)
settings = WorkerSettings("emoji", device="cpu", threads=1, slot="w0", transfer=transfer)
sys.exit(worker_main(settings, endpoint, folder=Path(folder)))
"""

TOY = """
import sys, time
from pathlib import Path
from tests.worker.fakes import ToyStage, toy_opened
from triptych.transfer import Exchange
from triptych.worker import Worker, WorkerSettings, ProcessUplink
from triptych.worker.main import signals

endpoint, folder = sys.argv[1:]
stage = ToyStage()
stage.toy.network.forward = lambda **_: (print("stuck", flush=True), time.sleep(600))
with Exchange(folder=Path(folder)) as exchange:
    settings = WorkerSettings("toy")
    worker = Worker(settings, lambda hello: ProcessUplink(endpoint, hello), exchange, toy_opened(stage))
    with signals(worker, exchange):
        worker.run()
"""


class Process:
    """A worker's process and the coordinator it talks to."""

    def __init__(self, place: Path, script: str) -> None:
        self.coordinator = FakeCoordinator()
        self.folder = place / "exchange"
        endpoint = endpoint_in(place)
        self.listener = Listener(self.coordinator, [endpoint])
        self.child = subprocess.Popen(
            [sys.executable, "-c", script, endpoint, str(self.folder)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"src{os.pathsep}.", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def end(self) -> tuple[int, str]:
        """Its exit code and what it wrote, once it has ended."""
        _, log = self.child.communicate(timeout=60)
        return self.child.returncode, log

    def close(self) -> None:
        self.child.kill()
        self.child.communicate()
        self.listener.close()


@contextlib.contextmanager
def process(place: Path, script: str) -> Iterator[Process]:
    own = Process(place, script)
    try:
        yield own
    finally:
        own.close()


@pytest.fixture
def place() -> Iterator[Path]:
    """A short path: a socket's may not be long."""
    with tempfile.TemporaryDirectory(prefix="tw-") as folder:
        yield Path(folder)


def test_a_process_serves_a_model_and_drains_at_the_first_signal(place: Path) -> None:
    topology = topology_of("emoji")
    wanted = resolved(topology, prompt="a cat", width=64, height=64, num_inference_steps=2, seed=1)
    with process(place, EMOJI) as own, contextlib.closing(Exchange(TRANSFER)) as exchange:
        coordinator = own.coordinator
        coordinator.wait(Ready)
        hello = coordinator.hellos[0]
        assert (hello.pid, hello.slot) == (own.child.pid, "w0")
        ticket: Ticket | None = None
        for count, part in enumerate(topology.stages, 1):
            coordinator.run(task_of(topology, wanted, part.name, payload=ticket))
            ticket = ticket_for(coordinator.wait(TaskDone, count=count).descriptor, hello.secret)
        assert ticket is not None
        fetched = exchange.fetch(ticket)
        assert fetched.route == "memfd"
        assert torch.equal(fetched.payload.values["images"], alone(topology, wanted).values["images"])
        fetched.close()
        kept = tuple(done.descriptor.payload for done in coordinator.all(TaskDone))
        own.child.send_signal(signal.SIGTERM)
        coordinator.send(Release(payloads=kept))
        code, log = own.end()
    assert code == 0 and coordinator.wait(Goodbye).reason == "it was drained"
    assert not own.folder.exists() or not any(own.folder.iterdir())
    assert "ready: encode, denoise, decode" in log and "Traceback" not in log


def test_the_second_signal_stops_whatever_runs(place: Path) -> None:
    with process(place, TOY) as own:
        own.coordinator.wait(Ready)
        own.coordinator.run(toy_task("job"))
        assert own.child.stdout is not None and own.child.stdout.readline() == "stuck\n"
        own.child.send_signal(signal.SIGTERM)
        own.child.send_signal(signal.SIGINT)
        code, _ = own.end()
        assert code == 1 and own.coordinator.wait(Goodbye).reason == "it was told to stop"
    assert not own.folder.exists() or not any(own.folder.iterdir())


def test_however_late_it_is_told_again_nothing_stays(place: Path) -> None:
    with process(place, EMOJI) as own:
        own.coordinator.wait(Ready)
        while own.child.poll() is None:
            own.child.send_signal(signal.SIGTERM)
            time.sleep(0.001)
        own.end()
    assert not own.folder.exists() or not any(own.folder.iterdir())


@pytest.fixture
def listener(place: Path) -> Iterator[Listener]:
    with contextlib.closing(Listener(FakeCoordinator(), [endpoint_in(place)])) as opened:
        yield opened


def endpoint_in(place: Path) -> str:
    (place / "door").mkdir(mode=0o700)
    return f"ipc://{place}/door/c"


def run(endpoint: str, model: str = "emoji", **more: float) -> int:
    """A worker's whole process, but in this one: it is the main thread's."""
    return worker_main(WorkerSettings(model, device="cpu", transfer=TRANSFER), endpoint, **more)  # type: ignore[arg-type]


def test_what_is_wrong_is_said_in_one_line(listener: Listener, caplog: pytest.LogCaptureFixture) -> None:
    assert run(listener.endpoints[0], "no-such-model") == 2
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "no model 'no-such-model'" in record.getMessage() and record.exc_info is None


def test_a_refused_process_says_why(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    coordinator = FakeCoordinator(lambda _: Refused(reason="its model is another one"))
    with contextlib.closing(Listener(coordinator, [endpoint_in(place)])) as listener:
        assert run(listener.endpoints[0]) == 2
    assert "its model is another one" in caplog.text and "Traceback" not in caplog.text


def test_no_orphan_stays(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    coordinator = FakeCoordinator()
    listener = Listener(coordinator, [endpoint_in(place)])

    def vanish() -> None:
        coordinator.wait(Ready)
        listener.close()

    end = threading.Thread(target=vanish)
    end.start()
    try:
        assert run(listener.endpoints[0], orphan_seconds=3.0) == 0
    finally:
        end.join()
        listener.close()
    assert "no coordinator answered" in caplog.text


def test_signals_are_as_they_were_afterwards(listener: Listener) -> None:
    before = [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)]
    assert run(listener.endpoints[0], "no-such-model") == 2
    assert [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)] == before
    assert not [thread for thread in threading.enumerate() if thread.name == "triptych-signals"]

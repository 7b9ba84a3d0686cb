"""`triptych worker`: its command line is the one that a layout's slot writes; what is wrong is one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from triptych.cli import main
from triptych.cluster import Coordinator, Listener, MemoryStore, load_server_keys
from triptych.config import Layout, TransferSection
from triptych.transfer import TransferSettings

SOURCE = Path(__file__).resolve().parents[2] / "src"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a worker would have been started with."""
    calls: list[Any] = []

    def start(settings: Any, endpoint: str, keys: Any, **options: Any) -> int:
        calls.append((settings, endpoint, keys, options))
        return 3

    monkeypatch.setattr("triptych.worker.main.worker_main", start)
    return calls


def test_a_slots_arguments_are_read_back(started: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "layout.yaml"
    path.write_text(
        "workers: [{stages: [decode, encode], name: both, devices: cpu, threads: 2, cpus: [0, 2], dtype: float32, "
        "capacity: 3}]\nmissing: wait\n"
        "transfer: {pool_bytes: 1MiB, routes: [tcp], tls: true, advertise: null, host: 127.0.0.2, corrupt_every: 5}"
    )
    layout = Layout.load(path)
    (slot,) = layout.slots(("encode", "denoise", "decode"))
    words = [*slot.arguments(), *layout.transfer.arguments(), "--join", "ipc:///run/x", "-m", "some/model"]
    assert (
        main(["worker", *words, "--workflow", "edit", "--orphan-seconds", "5", "--folder", "f", "--topology", "t"]) == 3
    )
    ((settings, endpoint, keys, options),) = started
    assert (endpoint, keys) == ("ipc:///run/x", None)
    assert options == {"orphan_seconds": 5.0, "folder": Path("f"), "topology": Path("t")}
    assert (settings.model, settings.stages, settings.workflow) == ("some/model", ("encode", "decode"), "edit")
    assert (settings.device, settings.threads, settings.cpus, settings.dtype) == ("cpu", 2, (0, 2), "float32")
    assert (settings.capacity, settings.name, settings.slot) == (3, "both", "both")
    assert settings.transfer == TransferSettings(
        pool_bytes=2**20, routes=("tcp",), tls=True, host="127.0.0.2", corrupt_every=5
    )
    assert settings.transfer == TransferSettings(**layout.transfer.given())


def test_all_means_all_and_aliases_are_taken(started: list[Any]) -> None:
    assert main(["worker", "all", "--join", "ipc://x"]) == 3
    assert main(["worker", "encoder,transformer", "--join", "ipc://x"]) == 3
    assert [call[0].stages for call in started] == [(), ("encode", "denoise")]
    assert started[0][0].transfer == TransferSettings(**TransferSection().model_dump()) == TransferSettings()


def test_a_key_file_is_read(started: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", str(tmp_path), "--client", "one"]) == 0
    assert main(["worker", "encode", "--join", "server:7400", "--key", str(tmp_path / "one.key")]) == 3
    assert started[0][2].name == "one"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["rewrite", "--join", "ipc://x"], "stages: given 'rewrite'; allowed: encode, denoise, decode (or encoder"),
        (["encode", "--join", "ipc://x", "--cpus", "1-"], "cpus: given '1-'; allowed: processor numbers"),
        (["encode", "--join", "ipc://x", "--capacity", "0"], "capacity: given 0; allowed: at least 1"),
        (["encode", "--join", "ipc://x", "--orphan-seconds", "-1"], "orphan_seconds: given -1.0; allowed: seconds"),
        (["encode", "--join", "ipc://x", "--transfer", "tls"], "transfer: given 'tls'; allowed: KEY=VALUE, each"),
        (["encode", "--join", "ipc://x", "--transfer", "pool=3"], "transfer: given 'pool'; allowed: the keys pool_b"),
        (["encode", "--join", "ipc://x", "--transfer", "tls=3"], "transfer.tls: given 3; allowed: a valid boolean"),
        (["encode", "--join", "ipc://x", "--transfer", "pool_bytes=9TiB"], "transfer.budget_bytes: given "),
        (["encode", "--join", "server:7400"], "key: given 'none'; allowed: the file that `triptych keys --client`"),
        (["encode", "--join", "server:7400", "--key", "none.key"], "keys: none.key cannot be read: No such file"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["worker", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {line}") and printed.err.count("\n") == 1, printed.err


def test_without_a_coordinator_it_ends_by_itself(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    command = [sys.executable, "-m", "triptych", "worker", "decode", "--join", f"ipc://{tmp_path}/socket"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--orphan-seconds", "1"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.strip(), done.stderr


class NoKeeper:
    """Nothing is kept, as no job runs."""

    def keep(self, job: str, what: str, descriptor: Any, secret: bytes, done: Any) -> None:
        raise AssertionError

    def offer(self, kept: str) -> tuple[Any, bytes]:
        raise KeyError(kept)

    def drop(self, job: str, what: str | None = None) -> None:
        pass


def run_worker(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "triptych", "worker", *arguments, "--device", "cpu", "--orphan-seconds", "30"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def test_it_joins_with_its_key_and_leaves_when_told(tmp_path: Path) -> None:
    assert main(["keys", str(tmp_path / "keys"), "--client", "one", "--client", "out"]) == 0
    keys = load_server_keys(tmp_path / "keys")
    (keys.clients / "out.pub").unlink()
    coordinator = Coordinator(("encode", "denoise", "decode"), store=MemoryStore(), keeper=NoKeeper())
    with Listener(coordinator, ["tcp://127.0.0.1:0"], keys) as listener:
        (endpoint,) = listener.endpoints
        good = run_worker("decoder", "--join", endpoint, "--key", str(tmp_path / "keys" / "one.key"), "--name", "w")
        bad = run_worker("decoder", "--join", endpoint, "--key", str(tmp_path / "keys" / "out.key"))
        with good, bad:
            try:
                missing = coordinator.require(("decode",), timeout=120)
                assert missing == ()
                (worker,) = coordinator.status().workers
                assert (worker.name, worker.stages, worker.pid) == ("w", ("decode",), good.pid)
                good.send_signal(signal.SIGTERM)
                assert good.wait(timeout=60) == 0
                assert bad.wait(timeout=60) == 2
                assert bad.stderr is not None and "key" in bad.stderr.read()
            finally:
                good.kill()
                bad.kill()
    coordinator.close()

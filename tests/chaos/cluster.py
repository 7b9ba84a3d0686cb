"""A cluster of real processes with a cable between any two: a coordinator behind HTTP, and two workers of each stage.

The first worker of a stage is started, watched and, when it hangs, killed by the coordinator; the second one joined, as
from another host: nobody but the harness restarts it, and one that was taken for dead comes back.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from tests.chaos.cables import Cable, free_port, ports_of
from tests.chaos.remote import Panel, Puppet
from triptych.cluster import RestartPolicy, Supervisor, WorkerSlot, make_client_keys, make_server_keys
from triptych.engine.opening import CONTROL

__all__ = ["LEASE", "STAGES", "Cluster", "Lost", "Wanted"]

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("encode", "denoise", "decode")
COORDINATOR = "coordinator"
LEASE = 2.0
MIB = 1 << 20
PATIENCE = 120.0
TORCHS_OWN = "torchinductor_"
"""A folder that torch makes for its caches, and leaves."""
LIMITS = {"heartbeat_seconds": 0.5, "lease_seconds": LEASE, "checkpoint_seconds": 0.0, "prove_seconds": 30.0}
TRANSFER = {
    "routes": ["tcp"], "host": "127.0.0.1", "advertise": "127.0.0.2", "pool_bytes": 4 * MIB,
    "budget_bytes": 256 * MIB, "connect_seconds": 3.0, "stall_seconds": 2.5, "reserve_seconds": 3.0,
}  # fmt: skip


class Lost(AssertionError):
    """A job that was accepted did not end well."""


@dataclass(frozen=True)
class Wanted:
    """A request; the same gives the same picture."""

    prompt: str
    seed: int
    exact: bool = True
    steps: int = 8

    @property
    def body(self) -> bytes:
        """As the server takes it."""
        fields = {"prompt": self.prompt, "seed": self.seed, "exact": self.exact, "width": 64, "height": 64}
        return json.dumps({**fields, "num_inference_steps": self.steps}).encode()


class Cluster:
    """Use as a context manager. `limits` go over the harness's own; `routes` are those between the workers that the
    coordinator starts, which are on one host and join at a Unix socket; all else crosses TCP."""

    def __init__(self, limits: dict[str, Any] | None = None, routes: Sequence[str] = ("tcp",)) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        self.panel = Panel(self.folder)
        self.restarts = 0
        """of the coordinator"""
        self.left: list[str] = []
        """what was still there when it had ended"""
        self._shared = _shared()
        self._http = free_port()
        self._ends = contextlib.ExitStack()
        (self.folder / "tmp").mkdir()
        (self.folder / "sockets").mkdir(mode=0o700)
        self._local = {f"{stage}-local": stage for stage in STAGES}
        self._joined = {f"{stage}-joined": stage for stage in STAGES}
        self.stages = {**self._local, **self._joined}
        listen = free_port()
        self.control = {name: self._cable(free_port(), listen) for name in self._joined}
        (self.folder / "state").mkdir(mode=0o700)
        for name in self._local:
            self.control[name] = self._cable(self.folder / "sockets" / f"{name}.cable", self.folder / "state" / CONTROL)
        self.data = {name: self._cable(free_port()) for name in (*self.stages, COORDINATOR)}
        keys = self.folder / "keys"
        make_server_keys(keys)
        self._key = make_client_keys(keys, "worker")
        self._write_plan({**LIMITS, **(limits or {})}, keys, listen, routes)
        slots = [WorkerSlot(name, self._command(name, ())) for name in self._joined]
        policy = RestartPolicy(first=0.1, longest=0.5, quick_deaths=1 << 30)
        self._supervisor = Supervisor(slots, self.folder / "joined", policy=policy, on_line=self._note)
        self._log = (self.folder / "workers.log").open("a", encoding="utf-8")
        self._coordinator: subprocess.Popen[bytes] | None = None

    def _cable(self, near: int | Path, far: int | Path | None = None) -> Cable:
        cable = Cable(near, far)
        self._ends.callback(cable.close)
        return cable

    def _write_plan(self, limits: dict[str, Any], keys: Path, listen: int, routes: Sequence[str]) -> None:
        layout = {
            "name": "chaos",
            "workers": [{"stages": "each"}],  # as many as the coordinator starts; the others join
            "limits": limits,
            "listen": {"endpoint": f"tcp://127.0.0.1:{listen}", "keys": str(keys)},
            "serve": {"port": self._http},
        }
        (self.folder / "layout.yaml").write_text(json.dumps(layout), encoding="utf-8")  # JSON is YAML
        plan = {
            "layout": str(self.folder / "layout.yaml"),
            "state": str(self.folder / "state"),
            "panel": str(self.panel.path),
            "transfer": json.dumps({**TRANSFER, "port": self.data[COORDINATOR].near}),
            "commands": {name: self._command(name, routes) for name in self._local},
        }
        (self.folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")

    def _command(self, name: str, routes: Sequence[str]) -> list[str]:
        transfer = {**TRANSFER, "port": self.data[name].near, "routes": list(routes) or ["tcp"]}
        near = self.control[name].near
        words = ["--panel", str(self.panel.path), "--key", str(self._key), "--name", name, "--stage", self.stages[name]]
        words += ["--join", f"ipc://{near}" if isinstance(near, Path) else f"127.0.0.2:{near}"]
        words += ["--folder", str(self.folder / "sockets"), "--transfer", json.dumps(transfer)]
        words += ["--slot", name] if name in self._local else []
        surroundings = [f"{key}={value}" for key, value in self._surroundings.items()]
        return ["env", *surroundings, sys.executable, "-m", "tests.chaos.worker", *words]

    @property
    def _surroundings(self) -> dict[str, str]:
        """Where processes find the code, and a folder of the cluster's own for what is temporary."""
        return {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "TMPDIR": str(self.folder / "tmp")}

    def _note(self, slot: str, line: str) -> None:
        self._log.write(f"{time.strftime('%X')} [{slot}] {line}\n")
        self._log.flush()

    def __enter__(self) -> Cluster:
        self._supervisor.start()
        self._start_coordinator()
        return self

    def _start_coordinator(self) -> None:
        environment = {**os.environ, **self._surroundings}
        with (self.folder / "coordinator.log").open("ab") as log:
            self._coordinator = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.coordinator", str(self.folder / "plan.json")],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
            )  # fmt: skip

    def tend(self) -> None:
        """Starts the coordinator again if it has died, as a service manager does."""
        assert self._coordinator is not None
        if self._coordinator.poll() is not None:
            self.restarts += 1
            self._start_coordinator()

    def heal(self) -> None:
        """Takes back every fault that has not happened yet or still goes on."""
        for cable in (*self.control.values(), *self.data.values()):
            cable.clear()
            cable.mend()
        for puppet in self.panel.living():
            puppet.signal(signal.SIGCONT)
            puppet.disarm()
            puppet.go()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
        self.panel.close()
        self.left = self._leftovers()
        self._log.close()
        if kind is None:
            shutil.rmtree(self.folder)
        else:
            print(f"logs and state are left in {self.folder}", file=sys.stderr)

    def stop(self) -> None:
        """Ends every process, in good order."""
        self.heal()
        self._supervisor.stop(20.0)
        if self._coordinator is not None:
            self._coordinator.send_signal(signal.SIGTERM)
            try:
                self._coordinator.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self._coordinator.kill()
                raise
        self._ends.close()

    def _leftovers(self) -> list[str]:
        """Processes, sockets, temporary folders and shared memory that have outlived it."""
        found = [f"process {pid}" for pid in _processes(str(self.folder))]
        found += [str(path) for path in (self.folder / "tmp").iterdir() if not path.name.startswith(TORCHS_OWN)]
        found += [str(path) for path in self.folder.rglob("*") if path.is_socket()]
        return found + sorted(_shared() - self._shared)

    # Its processes.

    @property
    def coordinator(self) -> Puppet:
        """The coordinator's process."""
        return self.panel.wait(lambda: self.panel.get(COORDINATOR), "the coordinator")

    def of(self, who: str) -> list[Puppet]:
        """The living processes that hold a stage, or the coordinator."""
        if who == COORDINATOR:
            return [self.coordinator]
        names = [name for name, stage in self.stages.items() if stage == who]
        return [puppet for name in names if (puppet := self.panel.get(name)) is not None]

    def cut(self, puppet: Puppet) -> None:
        """Parts a process from all others."""
        for cable in self._cables(puppet):
            cable.cut()
        for cable in self.data.values():
            cable.block(lambda port: port in ports_of(puppet.pid))

    def mend(self, puppet: Puppet) -> None:
        """Joins it again; what was on its way arrives."""
        for cable in (*self._cables(puppet), *self.data.values()):
            cable.mend()

    def _cables(self, puppet: Puppet) -> list[Cable]:
        own = [self.data[puppet.name]]
        return own + (list(self.control.values()) if puppet.name == COORDINATOR else [self.control[puppet.name]])

    # Its server.

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """One request; raises OSError or HTTPException while the coordinator is away."""
        connection = http.client.HTTPConnection("127.0.0.1", self._http, timeout=10.0)
        with contextlib.closing(connection):
            connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def insist(self, method: str, path: str, body: bytes | None = None, *, wanted: int = 200) -> bytes:
        """The same until it is answered as wanted: a coordinator may be dead, stopped, full, or without workers."""
        end, said = time.monotonic() + PATIENCE, "nothing"
        while time.monotonic() < end:
            self.tend()
            with contextlib.suppress(OSError, http.client.HTTPException):
                status, data = self.ask(method, path, body)
                if status == wanted:
                    return data
                said = f"{status} {data[:300]!r}"
                if status not in (429, 500, 503):
                    break
            time.sleep(0.05)
        raise Lost(f"{method} {path}: {said}")

    def submit(self, wanted: Wanted) -> str:
        """Sends a job until it is accepted; its id."""
        return json.loads(self.insist("POST", "/v1/jobs", wanted.body, wanted=202))["id"]

    def job(self, job: str) -> dict[str, Any]:
        """A job as the server tells it."""
        return json.loads(self.insist("GET", f"/v1/jobs/{job}"))

    def ended(self, job: str, patience: float = PATIENCE) -> dict[str, Any]:
        """The job once it has ended. Raises Lost if it does not."""
        end = time.monotonic() + patience
        while (found := self.job(job))["state"] in ("queued", "running"):
            if time.monotonic() > end:
                raise Lost(f"job {job} is still {found['state']} in {found['stage']} after {patience:g} s")
            time.sleep(0.05)
        return found

    def result(self, job: str) -> bytes:
        """The picture's file. Raises Lost if there is none."""
        found = self.ended(job)
        if found["state"] != "done":
            raise Lost(f"job {job} {found['state']}: {found['error']}; {found['failures']}")
        return self.insist("GET", found["results"][0])

    def status(self) -> dict[str, Any]:
        """What the server tells of the cluster."""
        return json.loads(self.insist("GET", "/v1/cluster"))

    def until(self, met: Callable[[dict[str, Any]], bool], what: str, patience: float = PATIENCE) -> dict[str, Any]:
        """The status once it is so. Raises TimeoutError."""
        end = time.monotonic() + patience
        while not met(status := self.status()):
            if time.monotonic() > end:
                raise TimeoutError(f"waited {patience:g} s for {what}; it is {status}")
            time.sleep(0.1)
        return status

    def whole(self, stage: str | None = None) -> dict[str, Any]:
        """Waits until every worker is there and has nothing to do; with a stage, both of that one and one of each
        other stage."""

        def met(status: dict[str, Any]) -> bool:
            here = [one for one in status["workers"] if one["last_seen"] < LEASE and self.panel.get(one["name"])]
            idle = {one["name"] for one in here if one["state"] == "idle"}
            busy = any(one["tasks"] for one in here)
            count = Counter(self.stages[name] for name in idle)
            return not busy and all(count[one] >= (2 if stage in (None, one) else 1) for one in STAGES)

        return self.until(met, f"every worker of {stage or 'each stage'} to be idle")


def _shared() -> set[str]:
    folder = Path("/dev/shm")
    return {str(path) for path in folder.iterdir()} if folder.is_dir() else set()


def _processes(folder: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and any(folder in word for word in process.cmdline()):
                found.append(process.pid)
    return found

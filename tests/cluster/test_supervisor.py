"""The supervisor, with real processes: started, watched, started again, given up, found again, and gone after stop."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.wires import environment, wait_until
from triptych.cluster.host.processes import OwnProcess
from triptych.cluster.host.supervisor import RestartPolicy, SlotState, Supervisor, WorkerSlot
from triptych.errors import InvalidRequest

SLEEP = "import time; print('up', flush=True); time.sleep(600)"
QUICK = RestartPolicy(first=0.02, longest=0.1, quick_deaths=3)

Start = Callable[..., Supervisor]


@pytest.fixture
def lines() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def start(tmp_path: Path, lines: list[tuple[str, str]]) -> Iterator[Start]:
    """Starts a supervisor over scripts by slot; all are stopped afterwards."""
    started: list[Supervisor] = []

    def begin(scripts: dict[str, str], policy: RestartPolicy = QUICK, **options: object) -> Supervisor:
        slots = [WorkerSlot(name, command(script)) for name, script in scripts.items()]
        options.setdefault("on_line", lambda slot, line: lines.append((slot, line)))
        supervisor = Supervisor(slots, tmp_path / "run", policy=policy, **options)  # pyright: ignore[reportArgumentType]
        started.append(supervisor)
        supervisor.start()
        return supervisor

    yield begin
    for supervisor in started:
        supervisor.stop(timeout=0)
    assert not alive_children()


def command(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def alive_children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child.name().startswith("python")]


def state(supervisor: Supervisor, slot: str = "a") -> SlotState:
    return next(each for each in supervisor.states() if each.name == slot)


def up(supervisor: Supervisor, slot: str = "a") -> int:
    """Waits for a slot's process to have said that it is up; returns its number."""
    wait_until(lambda: state(supervisor, slot).state == "running" and state(supervisor, slot).last[-1:] == ("up",))
    pid = state(supervisor, slot).pid
    assert pid is not None
    return pid


def test_every_slot_gets_a_process_in_a_session_of_its_own(start: Start) -> None:
    supervisor = start({"a": SLEEP, "b": SLEEP})
    first, second = up(supervisor, "a"), up(supervisor, "b")
    assert first != second
    assert os.getsid(first) == first != os.getsid(0)
    assert os.getpgid(second) == second


def test_a_dead_process_is_told_at_once_and_replaced(start: Start) -> None:
    exits: list[tuple[str, int, int | None]] = []
    supervisor = start({"a": SLEEP}, on_exit=lambda *what: exits.append(what))
    first = up(supervisor)
    os.kill(first, signal.SIGKILL)
    began = time.monotonic()
    wait_until(lambda: exits)
    assert time.monotonic() - began < 2.5, "long before a lease runs out"
    assert exits == [("a", first, -signal.SIGKILL)]
    wait_until(lambda: state(supervisor).pid not in {None, first})
    second = up(supervisor)
    assert second != first
    assert state(supervisor).starts == 2


def test_a_callback_that_fails_does_not_end_the_watch(start: Start) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    supervisor = start({"a": SLEEP}, on_exit=fail)
    first = up(supervisor)
    supervisor.kill("a")
    wait_until(lambda: state(supervisor).pid not in {None, first})


def test_a_process_that_hangs_can_be_killed_with_what_it_started(start: Start) -> None:
    child = (
        f"import subprocess, sys, signal; signal.signal(15, 1); c = subprocess.Popen([sys.executable, '-c', {SLEEP!r}])"
    )
    supervisor = start({"a": f"{child}; print(c.pid, flush=True); c.wait()"})
    wait_until(lambda: len(state(supervisor).last) == 2)  # its number, and that it is up
    first = state(supervisor).pid
    assert first is not None
    grandchild = next(int(line) for line in state(supervisor).last if line.isdigit())
    os.kill(first, signal.SIGSTOP)
    supervisor.kill("a")
    wait_until(lambda: state(supervisor).pid not in {None, first})
    wait_until(lambda: not psutil.pid_exists(grandchild) or psutil.Process(grandchild).status() == "zombie")
    supervisor.kill("no such slot")


def test_what_a_process_leaves_behind_goes_with_it(start: Start) -> None:
    child = f"import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); print(c.pid, flush=True)"
    supervisor = start({"a": child}, RestartPolicy(quick_deaths=1))
    wait_until(lambda: state(supervisor).state == "given up")
    grandchild = next(int(line) for line in state(supervisor).last if line.isdigit())
    wait_until(lambda: not psutil.pid_exists(grandchild) or psutil.Process(grandchild).status() == "zombie")


def test_restarts_come_later_and_later_and_end_with_giving_up(start: Start, lines: list[tuple[str, str]]) -> None:
    given_up: list[tuple[str, tuple[str, ...]]] = []
    policy = RestartPolicy(first=0.2, longest=0.4, quick_deaths=4)
    began = time.monotonic()
    supervisor = start(
        {"bad": "import sys; sys.exit('no such model')", "good": SLEEP},
        policy,
        on_given_up=lambda *w: given_up.append(w),
    )
    wait_until(lambda: given_up)
    assert time.monotonic() - began >= 0.2 + 0.4 + 0.4
    slot, last = given_up[0]
    assert slot == "bad"
    assert "no such model" in last and last[-1] == "given up: 4 processes in a row died early"
    assert any("ended with code 1" in line for line in last)
    assert (state(supervisor, "bad").state, state(supervisor, "bad").starts) == ("given up", 4)
    assert ("bad", last[-1]) in lines
    up(supervisor, "good")


def test_a_slot_that_was_given_up_can_be_revived(start: Start, tmp_path: Path) -> None:
    flag = tmp_path / "repaired"
    script = f"import os, sys; os.path.exists({str(flag)!r}) or sys.exit(1)\n{SLEEP}"
    supervisor = start({"a": script})
    wait_until(lambda: state(supervisor).state == "given up")
    flag.touch()
    supervisor.revive("a")
    up(supervisor)


def test_deaths_after_it_was_ready_do_not_count_as_early(start: Start) -> None:
    supervisor = start({"a": SLEEP}, RestartPolicy(first=0.01, longest=0.01, quick_deaths=2))
    for starts in range(1, 6):
        wait_until(lambda starts=starts: state(supervisor).starts == starts and state(supervisor).pid)
        supervisor.steady("a")
        supervisor.kill("a")
    wait_until(lambda: state(supervisor).starts == 6)


def test_a_long_life_starts_the_count_anew(start: Start) -> None:
    policy = RestartPolicy(first=0.01, longest=0.01, steady=0.05, quick_deaths=2)
    supervisor = start({"a": "import time; time.sleep(0.2)"}, policy)
    wait_until(lambda: state(supervisor).starts >= 4)
    assert state(supervisor).state != "given up"


def test_a_program_that_is_not_there_is_given_up_with_the_reason(tmp_path: Path) -> None:
    given_up: list[tuple[str, tuple[str, ...]]] = []
    slot = WorkerSlot("a", [str(tmp_path / "nothing")])
    supervisor = Supervisor(
        [slot], tmp_path / "run", policy=QUICK, on_line=lambda *_: None, on_given_up=lambda *w: given_up.append(w)
    )
    supervisor.start()
    wait_until(lambda: given_up)
    supervisor.stop()
    assert any("cannot be started: No such file" in line for line in given_up[0][1])


def test_lines_are_logged_with_their_slot_by_default(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    supervisor = Supervisor([WorkerSlot("a", command(SLEEP))], tmp_path / "run")
    with caplog.at_level(logging.INFO, "triptych.workers"):
        supervisor.start()
        up(supervisor)
        supervisor.stop()
    assert ("triptych.workers", logging.INFO, "[a] up") in caplog.record_tuples
    assert capfd.readouterr() == ("", ""), "a program that shows no log is not written over"


def test_a_full_disk_ends_no_watch(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exits: list[tuple[str, int, int | None]] = []
    supervisor = start({"a": SLEEP}, on_exit=lambda *what: exits.append(what))
    first = up(supervisor)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("triptych.cluster.host.supervisor.json.dump", full)
    supervisor.kill("a")
    wait_until(lambda: exits and state(supervisor).pid not in {None, first})


def test_output_is_kept_in_a_bounded_private_file(start: Start, tmp_path: Path, lines: list[tuple[str, str]]) -> None:
    script = "for i in range(20000): print('line', i, 'x' * 50)\nprint('up', flush=True)\nimport time; time.sleep(600)"
    supervisor = start({"a": script}, max_log_bytes=100_000)
    up(supervisor)
    supervisor.stop()
    kept = {file.name: file.stat() for file in (tmp_path / "run").glob("a.log*")}
    assert set(kept) == {"a.log", "a.log.1"}
    assert kept["a.log"].st_size <= 100_000
    assert {status.st_mode & 0o777 for status in kept.values()} == {0o600}
    assert ("a", "up") in lines


def test_a_log_that_somebody_took_away_ends_no_watch(start: Start, tmp_path: Path) -> None:
    supervisor = start({"a": SLEEP})
    first = up(supervisor)
    (tmp_path / "run" / "a.log").unlink()
    supervisor.kill("a")
    wait_until(lambda: state(supervisor).pid not in {None, first})
    up(supervisor)
    (tmp_path / "run" / "a.log").unlink()
    supervisor.stop(timeout=5.0)
    assert not alive_children()


def test_a_signal_to_a_dead_process_does_not_take_it_away() -> None:
    with open(os.devnull, "wb") as output:
        process = OwnProcess(command("pass"), output, {})
    wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
    process.signal(signal.SIGTERM)
    wait_until(process.ended)
    process.signal(signal.SIGTERM)
    assert process.code == 0


def test_an_endless_line_and_odd_bytes_hurt_nobody(start: Start, lines: list[tuple[str, str]]) -> None:
    script = "import sys, time; sys.stdout.buffer.write(b'x' * 100000 + b'\\n\\xff\\xfe\\nup\\n'); sys.stdout.flush()"
    supervisor = start({"a": f"{script}; time.sleep(600)"})
    up(supervisor)
    assert max(len(line) for _, line in lines) <= 8192
    assert ("a", "\ufffd\ufffd") in lines


def test_stop_asks_first_and_kills_who_does_not_listen(start: Start, lines: list[tuple[str, str]]) -> None:
    polite = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('bye', flush=True), sys.exit()))\n"
        "print('up', flush=True)\n"
        "while True: time.sleep(0.01)"
    )
    stubborn = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"
    supervisor = start({"polite": polite, "stubborn": stubborn, "frozen": SLEEP})
    pids = [up(supervisor, name) for name in ("polite", "stubborn", "frozen")]
    os.kill(pids[2], signal.SIGSTOP)
    supervisor.stop(timeout=1.0)
    assert ("polite", "bye") in lines
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert {each.state for each in supervisor.states()} == {"stopped"}
    supervisor.stop()


def test_no_process_follows_after_stop(start: Start) -> None:
    supervisor = start({"a": "pass"}, RestartPolicy(first=0.01, longest=0.01, quick_deaths=10**6))
    wait_until(lambda: state(supervisor).starts > 3)
    supervisor.stop()
    assert not alive_children()
    starts = state(supervisor).starts
    time.sleep(0.1)
    assert state(supervisor).starts == starts


OTHER = """
import sys, time
from pathlib import Path
from triptych.cluster.host.supervisor import Supervisor, WorkerSlot
slots = [WorkerSlot(name, [sys.executable, "-c", script]) for name, script in zip(sys.argv[2::2], sys.argv[3::2])]
supervisor = Supervisor(slots, Path(sys.argv[1]), on_line=lambda slot, line: print(slot, line, flush=True))
supervisor.start()
time.sleep(600)
"""


@pytest.fixture
def killed(tmp_path: Path) -> dict[str, int]:
    """Two slots of a supervisor whose process was killed: their processes live on."""
    arguments = [str(tmp_path / "run"), "a", SLEEP, "b", SLEEP]
    run = [sys.executable, "-c", OTHER, *arguments]
    with subprocess.Popen(run, stdout=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        assert sorted(process.stdout.readline() for _ in "ab") == [b"a up\n", b"b up\n"]
        process.kill()
    note = json.loads((tmp_path / "run" / "workers.json").read_text())
    return {name: entry["pid"] for name, entry in note.items()}


def test_workers_of_a_killed_supervisor_are_found_again(start: Start, killed: dict[str, int]) -> None:
    exits: list[tuple[str, int, int | None]] = []
    supervisor = start({"a": SLEEP, "b": SLEEP}, on_exit=lambda *what: exits.append(what))
    assert {each.name: each.pid for each in supervisor.states()} == killed
    assert state(supervisor).starts == 0
    assert state(supervisor).last == ("up",)
    os.kill(killed["a"], signal.SIGKILL)
    wait_until(lambda: state(supervisor).pid not in {None, killed["a"]})
    assert [exit[:2] for exit in exits] == [("a", killed["a"])]
    supervisor.stop()
    wait_until(lambda: not psutil.pid_exists(killed["b"]) or psutil.Process(killed["b"]).status() == "zombie")


def test_workers_that_no_slot_wants_any_more_are_ended(start: Start, killed: dict[str, int]) -> None:
    supervisor = start({"a": f"{SLEEP} # changed"})
    wait_until(lambda: state(supervisor).pid)
    assert state(supervisor).pid not in killed.values()
    for pid in killed.values():
        wait_until(lambda pid=pid: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie")


def test_a_number_that_another_process_has_now_is_left_alone(start: Start, tmp_path: Path) -> None:
    with subprocess.Popen(command(SLEEP), start_new_session=True, stdout=subprocess.DEVNULL) as stranger:
        (tmp_path / "run").mkdir(mode=0o700)
        entry = {"pid": stranger.pid, "created": time.time() - 3600, "command": command(SLEEP)}
        (tmp_path / "run" / "workers.json").write_text(json.dumps({"a": entry, "b": entry}))
        supervisor = start({"a": SLEEP})
        wait_until(lambda: state(supervisor).pid)
        assert state(supervisor).pid != stranger.pid
        supervisor.stop()
        assert stranger.poll() is None
        stranger.kill()


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": {"pid": "x"}}'])
def test_a_note_that_cannot_be_read_does_not_keep_it_from_starting(start: Start, tmp_path: Path, text: str) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    (tmp_path / "run" / "workers.json").write_text(text)
    up(start({"a": SLEEP}))


def test_slots_need_names_and_programs(tmp_path: Path) -> None:
    for slots in ([WorkerSlot("a", ["x"])] * 2, [WorkerSlot("../a", ["x"])], [WorkerSlot("a", [])]):
        with pytest.raises(InvalidRequest):
            Supervisor(slots, tmp_path / "run")
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(InvalidRequest, match="chmod 700"):
        Supervisor([], tmp_path / "open")

"""Jobs in SQLite: what was put is there after anything short of a burning disk."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.cluster.wires import environment
from triptych.cluster.jobs import Failure, JobRecord, JobSpec, JobState, Kept, StageRecord, StageSpec
from triptych.cluster.storage.sqlite_store import SCHEMA, SqliteStore
from triptych.errors import LoadError, Unsupported
from triptych.messages import Descriptor


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "jobs.sqlite"


@pytest.fixture
def store(path: Path):
    opened = SqliteStore(path)
    yield opened
    opened.close()


def record(job: str, state: JobState = "queued", *, client: str = "", ended: float | None = None, kept: int = 0):
    spec = JobSpec(id=job, stages=(StageSpec(stage="encode", fields={"prompt": "a cat"}),), seed=1, client=client)
    result = Kept(name=f"{job}/result", bytes=kept) if kept else None
    return JobRecord(spec=spec, state=state, submitted=1.0, ended=ended, result=result)


def ids(records: list[JobRecord]) -> list[str]:
    return [each.spec.id for each in records]


def test_a_job_comes_back_whole(path: Path) -> None:
    descriptor = Descriptor(payload="p", generation=3, head=1, body=2, owner="o", addresses=())
    full = record("a", "running", client="me")
    full.attempts, full.inputs, full.checkpoint, full.checkpoint_step = [1, 2], [None, descriptor], Kept(name="c"), 7
    full.failures.append(Failure(stage="denoise", worker="w", code="c", message="m"))
    full.finished.append(
        StageRecord(stage="encode", worker="w", seconds=1.5, waited=0.1, fetched=0.0, steps=1, peak_bytes=2)
    )
    store = SqliteStore(path)
    store.put(full)
    store.close()
    store.close()
    again = SqliteStore(path)
    assert again.get("a") == full
    assert again.get("b") is None
    again.close()


def test_a_changed_job_takes_its_own_place(store: SqliteStore) -> None:
    store.put(record("a"))
    store.put(record("b"))
    store.put(record("a", "running"))
    assert ids(store.unfinished()) == ["a", "b"]
    store.put(record("a", "done", ended=2.0))
    assert ids(store.unfinished()) == ["b"]
    assert ids(store.list()) == ["b", "a"]


def test_lists_are_newest_first_and_go_on_where_they_stopped(store: SqliteStore) -> None:
    for number in range(6):
        store.put(record(str(number), "done" if number % 2 else "queued", client="even" if number % 2 == 0 else "odd"))
    assert ids(store.list(limit=4)) == ["5", "4", "3", "2"]
    assert ids(store.list(limit=4, before="2")) == ["1", "0"]
    assert ids(store.list(client="odd")) == ["5", "3", "1"]
    assert ids(store.list(states=["queued"], client="even", before="4")) == ["2", "0"]
    assert ids(store.list(states=[])) == ids(store.list(before="unknown")) == ids(store.list(limit=0)) == []


def test_ended_jobs_expire_by_age_and_by_size(store: SqliteStore) -> None:
    store.put(record("running", "running", kept=1000))
    for number in range(5):
        store.put(record(str(number), "done", ended=float(number), kept=10))
    assert ids(store.expire(before=2.0)) == ["0", "1"]
    assert ids(store.expire(before=2.0, keep_bytes=20)) == ["2"]
    assert ids(store.expire(before=0.0, keep_bytes=0)) == ["3", "4"]
    assert store.expire(before=100.0, keep_bytes=0) == []
    assert ids(store.list()) == ["running"]


def test_a_checkpoint_ends_with_its_job_and_counts_no_more(store: SqliteStore) -> None:
    ended = record("a", "failed", ended=1.0)
    ended.checkpoint = Kept(name="a/checkpoint", bytes=1000)
    store.put(ended)
    assert store.expire(before=0.0, keep_bytes=10) == []


def test_all_its_files_are_private(path: Path) -> None:
    before = os.umask(0)
    try:
        store = SqliteStore(path)
        store.put(record("a"))
        files = list(path.parent.iterdir())
        assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
        assert path.parent.stat().st_mode & 0o777 == 0o700
        store.close()
    finally:
        os.umask(before)


def test_a_file_that_others_could_read_is_closed_to_them(path: Path) -> None:
    SqliteStore(path).close()
    path.chmod(0o644)
    SqliteStore(path).close()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_second_coordinator_is_told(store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triptych.cluster.storage.sqlite_store.BUSY_SECONDS", 0.05)
    code = f"from triptych.cluster import SqliteStore as S; from pathlib import Path; S(Path({str(path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode and "is in use by another coordinator" in done.stderr
    with pytest.raises(LoadError, match="in use"):
        SqliteStore(path)


def test_a_newer_schema_is_refused_and_left_as_it_is(path: Path) -> None:
    SqliteStore(path).close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    db.close()
    with pytest.raises(Unsupported, match=f"newer version .schema {SCHEMA + 1}"):
        SqliteStore(path)


@pytest.mark.parametrize("content", [b"no database at all, " * 100, b"SQLite format 3\0" + b"\xff" * 4080])
def test_a_file_of_something_else_is_refused(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(LoadError, match="damaged or no job store") as caught:
        SqliteStore(path)
    assert caught.value.field == "state"
    assert path.read_bytes() == content


def test_another_programs_database_is_refused(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE songs (title TEXT)")
    db.close()
    with pytest.raises(LoadError, match="something else"):
        SqliteStore(path)


def test_a_damaged_page_is_noticed_when_it_is_opened(path: Path) -> None:
    store = SqliteStore(path)
    for number in range(200):
        store.put(record(f"job-{number}"))
    store.close()
    data = bytearray(path.read_bytes())
    data[4096 * 3 : 4096 * 5] = os.urandom(8192)
    path.write_bytes(data)
    with pytest.raises(LoadError, match="damaged"):
        SqliteStore(path)


def test_a_record_that_cannot_be_read_is_a_clear_error(path: Path) -> None:
    store = SqliteStore(path)
    store.put(record("a"))
    store.close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE jobs SET record = ?", [b"\xc1"])
    db.close()
    store = SqliteStore(path)
    with pytest.raises(LoadError, match="cannot be read"):
        store.unfinished()
    store.close()


def test_a_folder_that_cannot_be_used_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LoadError, match="cannot be opened"):
        SqliteStore(tmp_path / "file" / "jobs.sqlite")
    with pytest.raises(LoadError, match="cannot be opened"):
        SqliteStore(tmp_path)


def test_several_threads_may_use_it(store: SqliteStore) -> None:
    def work(name: str) -> None:
        for number in range(20):
            store.put(record(f"{name}{number}"))
            assert store.get(f"{name}{number}") is not None

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.unfinished()) == 80


def test_what_was_accepted_survives_a_kill_in_the_middle_of_a_write(path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.cluster.test_sqlite_store import record, SqliteStore\n"
        "store, start = SqliteStore(Path(sys.argv[1])), int(sys.argv[2])\n"
        "for number in range(start, 10**9):\n"
        "    store.put(record(f'job-{number}', kept=number))\n"
        "    begun = record(f'job-{number}', 'running', kept=number)\n"
        "    begun.attempts = [1]\n"
        "    store.put(begun)\n"
        "    print(number, flush=True)\n"
    )
    accepted = 0
    for kill_after in (1, 7, 30, 3, 50):
        command = [sys.executable, "-c", code, str(path), str(accepted)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as process:
            assert process.stdout is not None
            for _ in range(kill_after):
                accepted = int(process.stdout.readline()) + 1
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().split()
        accepted = int(rest[-1]) + 1 if rest else accepted
        store = SqliteStore(path)
        for number in range(accepted):
            found = store.get(f"job-{number}")
            assert found is not None and (found.state, found.result) == (
                "running",
                Kept(name=f"job-{number}/result", bytes=number) if number else None,
            )
        store.close()

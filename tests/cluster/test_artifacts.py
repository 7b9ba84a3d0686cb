"""Named blobs per job, in a folder and behind a URL."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from triptych.cluster.storage import object_store
from triptych.cluster.storage.artifacts import ArtifactFolder
from triptych.errors import InvalidRequest


@pytest.fixture(params=["folder", "folder as a URL", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str | Path:
    here = tmp_path / "a folder"
    return {"folder": here, "folder as a URL": here.as_uri(), "memory": f"memory://{uuid4().hex}/a"}[request.param]


def test_what_is_written_comes_back(root: str | Path) -> None:
    artifacts = ArtifactFolder(root)
    assert artifacts.write("job", "result.0.png", b"12", bytearray(b"34"), memoryview(b"5")) == 5
    assert artifacts.write("job", "empty") == 0
    assert artifacts.read("job", "result.0.png") == b"12345"
    assert bytes(artifacts.view("job", "result.0.png")[1:3]) == b"23"
    assert artifacts.view("job", "result.0.png").readonly
    assert artifacts.read("job", "empty") == b""
    assert artifacts.names("job") == {"empty": 0, "result.0.png": 5}
    assert (artifacts.size("job", "empty"), artifacts.size("job", "result.0.png")) == (0, 5)


def test_a_blob_takes_the_place_of_the_one_before(root: str | Path) -> None:
    artifacts = ArtifactFolder(root)
    artifacts.write("job", "checkpoint", b"step 1")
    artifacts.write("job", "checkpoint", b"step 10")
    assert artifacts.read("job", "checkpoint") == b"step 10"
    assert artifacts.total_bytes() == 7


def test_sizes_are_known_again_after_a_restart(root: str | Path) -> None:
    artifacts = ArtifactFolder(root)
    artifacts.write("one", "a", b"123")
    artifacts.write("two", "b", b"45678")
    again = ArtifactFolder(root)
    assert (again.jobs(), again.total_bytes()) == (["one", "two"], 8)
    assert (again.names("one"), again.read("two", "b")) == ({"a": 3}, b"45678")


def test_deleting(root: str | Path) -> None:
    artifacts = ArtifactFolder(root)
    for job in ("one", "two"):
        artifacts.write(job, "a", b"1")
        artifacts.write(job, "b", b"2")
    artifacts.delete("one", "a")
    artifacts.delete("one", "a")
    artifacts.delete("two")
    artifacts.delete("two")
    artifacts.delete("never")
    assert (artifacts.jobs(), artifacts.names("one"), artifacts.total_bytes()) == (["one"], {"b": 1}, 1)
    artifacts.write("three", "a", b"again")
    artifacts.delete("three")
    artifacts.write("three", "a", b"anew")
    artifacts.delete("one", "b")
    assert artifacts.jobs() == ["three"] and artifacts.read("three", "a") == b"anew"
    artifacts.close()
    again = ArtifactFolder(root)
    assert again.jobs() == ["three"] and again.read("three", "a") == b"anew", "not deleted behind its writer's back"


def test_what_is_not_there_is_a_key_error(root: str | Path) -> None:
    artifacts = ArtifactFolder(root)
    artifacts.write("job", "a", b"1")
    for ask in (artifacts.read, artifacts.view, artifacts.size, artifacts.path):
        with pytest.raises(KeyError, match="job/b"):
            ask("job", "b")
    assert artifacts.names("other") == {}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "a\\b", ".hidden", "a\0b", "a\n", "x" * 129, "é"])
def test_names_with_separators_and_the_like_are_refused(root: str | Path, name: str) -> None:
    artifacts = ArtifactFolder(root)
    for job, blob in ((name, "a"), ("job", name)):
        with pytest.raises(InvalidRequest) as caught:
            artifacts.write(job, blob, b"")
        assert caught.value.field == "name"
        with pytest.raises(InvalidRequest):
            artifacts.view(job, blob)
        with pytest.raises(InvalidRequest):
            artifacts.delete(job, blob)


def test_files_and_folders_are_private(tmp_path: Path) -> None:
    artifacts = ArtifactFolder(tmp_path / "artifacts")
    before = os.umask(0)
    try:
        artifacts.write("job", "a", b"1")
    finally:
        os.umask(before)
    path = artifacts.path("job", "a")
    assert path is not None
    assert [each.stat().st_mode & 0o777 for each in (path, path.parent, path.parent.parent)] == [0o600, 0o700, 0o700]


def test_a_folder_open_to_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(InvalidRequest, match="chmod 700"):
        ArtifactFolder(tmp_path / "open")


def test_an_unknown_kind_of_url_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        ArtifactFolder("pigeon://loft")
    assert caught.value.field == "artifacts"


def test_the_path_of_a_blob_is_a_file_with_what_it_holds(root: str | Path) -> None:
    artifacts = ArtifactFolder(root)
    artifacts.write("job", "a", b"12")
    assert artifacts.path("job", "a").read_bytes() == b"12"
    assert ArtifactFolder(root).path("job", "a").read_bytes() == b"12", "fetched, where it lies elsewhere"


def test_a_write_that_fails_leaves_the_old_blob_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts = ArtifactFolder(tmp_path / "artifacts")
    artifacts.write("job", "a", b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            artifacts.write("job", "a", b"new")
    assert artifacts.read("job", "a") == b"old"
    assert os.listdir(tmp_path / "artifacts" / "job") == ["a"]


def test_what_a_killed_writer_left_is_cleared_away(tmp_path: Path) -> None:
    root = tmp_path / "artifacts"
    ArtifactFolder(root).write("job", "a", b"1")
    (root / "job" / ".new-0123456789abcdef").write_bytes(b"half")
    assert ArtifactFolder(root).total_bytes() == 1
    assert os.listdir(root / "job") == ["a"]


def test_a_view_outlives_its_blob(tmp_path: Path) -> None:
    artifacts = ArtifactFolder(tmp_path / "artifacts")
    artifacts.write("job", "a", bytes(1 << 20))
    view = artifacts.view("job", "a")
    artifacts.delete("job")
    assert bytes(view) == bytes(1 << 20)


def test_writers_and_readers_do_not_meet(tmp_path: Path) -> None:
    artifacts = ArtifactFolder(tmp_path / "artifacts")
    artifacts.write("job", "a", b"0" * 1000)
    wrong: list[bytes] = []

    def read() -> None:
        for _ in range(200):
            blob = artifacts.read("job", "a")
            if len(blob) != 1000 or len(set(blob)) != 1:
                wrong.append(blob)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(50):
        artifacts.write("job", "a", b"%d" % (number % 10) * 1000)
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.fixture
def url() -> str:
    return f"memory://{uuid4().hex}/a"


class Outage:
    """A store of which some calls fail for a time."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.calls = 0

    def begin(self, *names: str) -> None:
        def fail(*_: Any, **__: Any) -> None:
            self.calls += 1
            raise RuntimeError("SlowDown")

        for name in names:
            self.patch.setattr(MemoryFileSystem, name, fail)

    def end(self) -> None:
        self.patch.undo()


@pytest.fixture
def outage(monkeypatch: pytest.MonkeyPatch) -> Outage:
    monkeypatch.setattr(object_store, "RETRY_SECONDS", 0.02)
    return Outage(monkeypatch)


def until(holds: Any) -> None:
    ends = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_a_store_that_fails_is_told_and_leaves_the_old_blob(url: str, outage: Outage) -> None:
    artifacts = ArtifactFolder(url)
    artifacts.write("job", "a", b"old")
    outage.begin("put_file")
    with pytest.raises(OSError, match=r"memory://\w+/a failed: SlowDown"):
        artifacts.write("job", "a", b"newer")
    with pytest.raises(OSError, match="SlowDown"):
        artifacts.write("job", "b", b"new")
    outage.end()
    assert (artifacts.read("job", "a"), artifacts.names("job")) == (b"old", {"a": 3})
    assert ArtifactFolder(url).read("job", "a") == b"old"


def test_what_was_written_last_is_read_without_the_store(url: str, outage: Outage) -> None:
    artifacts = ArtifactFolder(url)
    artifacts.write("job", "a", b"1")
    outage.begin("get_file", "cat_file", "open")
    assert artifacts.read("job", "a") == b"1"
    assert outage.calls == 0


def test_a_read_that_fails_or_brings_less_is_an_error_and_never_a_wrong_blob(url: str, outage: Outage) -> None:
    ArtifactFolder(url).write("job", "a", b"12345")
    artifacts = ArtifactFolder(url)
    outage.begin("get_file")
    with pytest.raises(OSError, match="SlowDown"):
        artifacts.read("job", "a")
    outage.end()
    outage.patch.setattr(MemoryFileSystem, "get_file", lambda self, at, to: Path(to).write_bytes(b"123") and None)
    with pytest.raises(OSError, match="3 bytes of job/a; expected: 5"):
        artifacts.read("job", "a")
    outage.patch.undo()
    assert artifacts.read("job", "a") == b"12345"


def test_deletions_are_tried_until_the_store_takes_them(
    url: str, outage: Outage, caplog: pytest.LogCaptureFixture
) -> None:
    artifacts = ArtifactFolder(url)
    artifacts.write("job", "a", b"1")
    artifacts.write("job", "b", b"2")
    outage.begin("rm_file")
    with caplog.at_level(logging.ERROR):
        artifacts.delete("job")
        until(lambda: outage.calls > 2)
    assert artifacts.jobs() == [], "for whoever asks here it is gone"
    with pytest.raises(KeyError):
        artifacts.read("job", "a")
    assert sum("cannot be removed yet" in record.getMessage() for record in caplog.records) == 1
    outage.end()
    artifacts.close()
    assert ArtifactFolder(url).jobs() == []


def test_what_is_written_soon_can_be_read_at_once_and_gets_there(url: str, outage: Outage) -> None:
    artifacts = ArtifactFolder(url)
    outage.begin("put_file")
    artifacts.write_soon("job", "a", b"1")
    assert artifacts.read("job", "a") == b"1"
    until(lambda: outage.calls > 1)
    outage.end()
    artifacts.close()
    assert ArtifactFolder(url).read("job", "a") == b"1"


def test_copies_of_blobs_are_bounded(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "SPOOL_BYTES", 1000)
    artifacts = ArtifactFolder(url, spool=tmp_path / "spool")
    for number in range(50):
        artifacts.write("job", f"blob{number}", bytes([number]) * 100)
    assert sum(file.stat().st_size for file in (tmp_path / "spool").iterdir()) <= 2000
    assert artifacts.read("job", "blob0") == bytes(100) and artifacts.read("job", "blob49") == b"1" * 100
    artifacts.write("job", "large", bytes(5000))
    assert artifacts.path("job", "large").stat().st_size == 5000
    artifacts.close()
    assert not (tmp_path / "spool").exists()


def test_its_own_alone_is_deleted_at_the_end(url: str) -> None:
    ArtifactFolder(url).write("other", "a", b"1")
    mine = ArtifactFolder(url, own=True)
    mine.write("job", "a", b"1")
    assert mine.jobs() == ["job"]
    mine.close()
    assert ArtifactFolder(url).jobs() == ["other"]


def test_a_store_that_cannot_be_written_is_refused_without_its_password(outage: Outage) -> None:
    outage.begin("pipe_file")
    with pytest.raises(InvalidRequest) as caught:
        ArtifactFolder("memory://user:secret@host/a")
    assert caught.value.field == "artifacts" and "secret" not in str(caught.value) and "SlowDown" in str(caught.value)


def slow(patch: pytest.MonkeyPatch, name: str) -> tuple[threading.Event, threading.Event]:
    """Has a call of the store wait. Returns what tells that it has begun, and what lets it go on."""
    begun, go, real = threading.Event(), threading.Event(), getattr(MemoryFileSystem, name)

    def wait(*given: Any, **more: Any) -> Any:
        begun.set()
        assert go.wait(20)
        return real(*given, **more)

    patch.setattr(MemoryFileSystem, name, wait)
    return begun, go


def test_nobody_who_writes_soon_waits_for_the_store(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts = ArtifactFolder(url)
    begun, go = slow(monkeypatch, "put_file")
    artifacts.write_soon("job", "a", b"old")
    assert begun.wait(10)
    before = time.monotonic()
    artifacts.write_soon("job", "a", b"newer")
    artifacts.delete("job", "b")
    assert time.monotonic() - before < 1 and artifacts.read("job", "a") == b"newer"
    go.set()
    artifacts.close()
    assert ArtifactFolder(url).read("job", "a") == b"newer"


def test_a_download_does_not_hide_what_was_written_meanwhile(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ArtifactFolder(url).write("job", "a", b"old")
    artifacts = ArtifactFolder(url)
    begun, go = slow(monkeypatch, "get_file")
    reader = threading.Thread(target=artifacts.read, args=("job", "a"))
    reader.start()
    assert begun.wait(10)
    artifacts.write_soon("job", "a", b"new")
    go.set()
    reader.join()
    assert artifacts.read("job", "a") == b"new"


def test_one_blob_that_cannot_be_dealt_with_holds_up_no_other(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "RETRY_SECONDS", 0.02)
    artifacts = ArtifactFolder(url)
    for name in ("bad", "good", "better"):
        artifacts.write("job", name, b"1")
    real = MemoryFileSystem._rm

    def remove(self: MemoryFileSystem, path: str) -> None:
        if path.endswith("/bad"):
            raise PermissionError(path)
        real(self, path)

    def put(self: MemoryFileSystem, at: str, to: str, **more: Any) -> None:
        if to.endswith("/ugly"):
            raise PermissionError(to)
        self.pipe_file(to, Path(at).read_bytes())

    monkeypatch.setattr(MemoryFileSystem, "_rm", remove)
    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    artifacts.delete("job")
    artifacts.write_soon("other", "ugly", b"1")
    artifacts.write_soon("other", "fine", b"1")
    until(lambda: ArtifactFolder(url).names("job") == {"bad": 1} and ArtifactFolder(url).names("other") == {"fine": 1})
    artifacts.close()


def test_what_waits_to_be_written_is_bounded(url: str, tmp_path: Path, outage: Outage) -> None:
    outage.patch.setattr(object_store, "SPOOL_BYTES", 1000)
    artifacts = ArtifactFolder(url, spool=tmp_path / "spool")
    outage.begin("put_file")
    for number in range(10):
        artifacts.write_soon("job", f"{number}", bytes(100))
    with pytest.raises(OSError, match="1000 bytes wait to be written already"):
        artifacts.write_soon("job", "more", bytes(100))
    assert "more" not in artifacts.names("job")
    outage.end()
    outage.patch.setattr(object_store, "SPOOL_BYTES", 1000)
    until(lambda: len(ArtifactFolder(url).names("job")) == 10)
    until(lambda: not artifacts._place._spool._pinned)  # pyright: ignore[reportAttributeAccessIssue]
    artifacts.write_soon("job", "more", bytes(100))
    artifacts.close()


def test_what_is_forgotten_of_a_store_that_fails_is_no_longer_held_here(url: str, outage: Outage) -> None:
    outage.patch.setattr(object_store, "MAX_LEFT", 3)
    artifacts = ArtifactFolder(url)
    outage.begin("put_file")
    for number in range(10):
        artifacts.write_soon("job", f"{number}", b"1")
    until(lambda: len(artifacts._place._spool._pinned) <= 4)  # pyright: ignore[reportAttributeAccessIssue]
    outage.end()
    artifacts.close()


def test_many_of_its_own_are_deleted_together(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = ArtifactFolder(url, own=True)
    for number in range(250):
        mine.write(f"job{number}", "a", b"1")
    calls: list[int] = []
    real = MemoryFileSystem.rm

    def rm(self: MemoryFileSystem, path: Any, *given: Any, **more: Any) -> None:
        calls.append(len(path))
        time.sleep(0.05)
        real(self, path, *given, **more)

    def rmdir(*_: Any) -> None:
        calls.append(0)

    monkeypatch.setattr(MemoryFileSystem, "rm", rm)
    monkeypatch.setattr(MemoryFileSystem, "rmdir", rmdir)
    mine.close()
    assert ArtifactFolder(url).jobs() == []
    assert len(calls) <= 5 and sum(calls) >= 249 and 0 not in calls, calls


def test_a_pattern_in_the_url_is_none(outage: Outage) -> None:
    base = uuid4().hex
    MemoryFileSystem().pipe_file(f"/{base}/ab/job/0", b"others'")
    mine = ArtifactFolder(f"memory://{base}/a[b]", own=True)
    for name in "01":
        mine.write("job", name, b"1")
    mine.close()
    assert [path.rpartition(f"{base}/")[2] for path in MemoryFileSystem().find(f"/{base}")] == ["ab/job/0"]


def test_deletions_go_on_after_a_restart(url: str, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    artifacts = ArtifactFolder(url, spool=spool)
    for name in ("a", "b", "c"):
        artifacts.write("job", name, b"1")
    artifacts.delete("job", "b")
    (kept,) = tmp_path.glob("spool-*.removals")
    artifacts.write("job", "b", b"anew")
    artifacts.close()
    kept.write_text("-job/a\n-job/b\n+job/b\n-job/c")  # as a process that is killed leaves it
    again = ArtifactFolder(url, spool=spool)
    assert again.names("job") == {"b": 4, "c": 1}, "what was cut off is no removal"
    until(lambda: set(ArtifactFolder(url).names("job")) == {"b", "c"})
    until(lambda: kept.read_text() == "")
    again.close()


def test_the_journal_says_what_is_left(url: str, tmp_path: Path, outage: Outage) -> None:
    artifacts = ArtifactFolder(url, spool=tmp_path / "spool")
    for name in ("a", "b"):
        artifacts.write("job", name, b"1")
    outage.begin("rm_file", "rm", "_rm")
    artifacts.delete("job")
    (kept,) = tmp_path.glob("spool-*.removals")
    assert sorted(kept.read_text().splitlines()) == ["-job/a", "-job/b"] and kept.stat().st_mode & 0o777 == 0o600
    artifacts.write("job", "b", b"anew")
    artifacts.close()
    assert kept.read_text() == "-job/a\n"
    outage.end()
    again = ArtifactFolder(url, spool=tmp_path / "spool")
    assert again.names("job") == {"b": 4}
    again.close()
    assert ArtifactFolder(url).names("job") == {"b": 4} and kept.read_text() == ""


def test_a_copy_in_use_stays(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ArtifactFolder(url).write("job", "a", bytes(100))
    monkeypatch.setattr(object_store, "SPOOL_BYTES", 1000)
    artifacts = ArtifactFolder(url, spool=tmp_path / "spool")
    path = artifacts.path("job", "a")
    for number in range(50):
        artifacts.write("job", f"blob{number}", bytes(100))
    assert path.exists()


def test_a_copy_that_goes_before_it_is_opened_is_fetched_again(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts = ArtifactFolder(url, spool=tmp_path / "spool")
    artifacts.write("job", "a", b"1")
    real, taken = object_store._Spool.find, []

    def find(self: Any, key: Any) -> Path | None:
        path = real(self, key)
        if path is not None and not taken:
            taken.append(path)
            path.unlink()
        return path

    monkeypatch.setattr(object_store._Spool, "find", find)
    assert artifacts.read("job", "a") == b"1" and taken

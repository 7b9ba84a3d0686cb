"""Results, checkpoints and pictures at a URL, and what files say of how they were made."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from tests.families import folder
from triptych import Engine, Request
from triptych.cluster import ArtifactFolder, NotNear, coordinator
from triptych.cluster.storage import object_store
from triptych.config import Layout, LimitsSection
from triptych.decode import read_settings, repeat_settings
from triptych.engine import opening
from triptych.engine.jobs import Job
from triptych.engine.keeper import Folder, PayloadKeeper
from triptych.errors import InvalidRequest, StorageFailed, TriptychError
from triptych.transfer import Exchange, Payload, TransferSettings

SECONDS = 60.0


@pytest.fixture
def url() -> str:
    return f"memory://{uuid4().hex}/triptych"


def ask(**fields: Any) -> Request:
    known = {"prompt": "a cat", "width": 64, "height": 64, "num_inference_steps": 3, "max_sequence_length": 32}
    return Request.parse(**{**known, "seed": 1, **fields})


def opened(family: str = "flux", **options: Any) -> Engine:
    return Engine.open(str(folder(family)), device="cpu", **options)


def stored(url: str) -> set[str]:
    return {path.rpartition("/triptych/")[2] for path in MemoryFileSystem().find(url.removeprefix("memory:/"))}


def finished(job: Job) -> Job:
    job.result()
    return job


def until(holds: Callable[[], Any]) -> None:
    ends = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.02)


def data(engine: Engine, job: Job) -> bytes:
    (file,) = engine.result_files(job.id)
    path = file.path
    assert path is not None
    return path.read_bytes()


def levels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def test_results_lie_at_the_url_and_outlive_the_process(url: str, tmp_path: Path) -> None:
    with opened(state=tmp_path / "state", artifacts=url) as engine:
        expected = engine.generate(ask()).images[0]
        job = finished(engine.submit(ask(), files=True))
        assert stored(url) == {f"{job.id}/0.png"}
        first = data(engine, job)
    assert np.array_equal(levels(first), np.asarray(expected))
    with opened(state=tmp_path / "state", artifacts=url) as engine:
        assert data(engine, job) == first
        assert engine.forget(job.id) and not engine.result_files(job.id)
        until(lambda: not stored(url))


def test_what_has_expired_is_deleted_there(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "EXPIRE_EVERY", 0.1)
    layout = Layout.fused().model_copy(update={"limits": LimitsSection(retention_seconds=0.5)})
    with opened(layout=layout, artifacts=url) as engine:
        job = finished(engine.submit(ask(), files=True))
        until(lambda: engine.view(job.id) is None)
        until(lambda: not stored(url))
        assert not engine.result_files(job.id)


def test_without_a_state_folder_nothing_is_left_behind(url: str) -> None:
    MemoryFileSystem().pipe_file(f"{url.removeprefix('memory:/')}/others/0.png", b"1")
    with opened(artifacts=url) as engine:
        finished(engine.submit(ask(), files=True))
        assert len(stored(url)) == 2
    assert stored(url) == {"others/0.png"}


class Outage:
    """Fails so many writes."""

    def __init__(self, patch: pytest.MonkeyPatch, times: float) -> None:
        real, self.left = MemoryFileSystem.put_file, times

        def put_file(*given: Any, **more: Any) -> None:
            if self.left > 0:
                self.left -= 1
                raise RuntimeError("SlowDown")
            real(*given, **more)

        patch.setattr(MemoryFileSystem, "put_file", put_file)


def test_a_store_that_fails_once_costs_a_retry(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(artifacts=url) as engine:
        expected = engine.generate(ask()).images[0]
        outage = Outage(monkeypatch, 1)
        job = finished(engine.submit(ask(), files=True))
        assert outage.left == 0 and np.array_equal(levels(data(engine, job)), np.asarray(expected))


def test_a_store_that_goes_on_failing_is_a_clear_error(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "RETRY_SECONDS", 0.05)
    with opened(artifacts=url) as engine:
        outage = Outage(monkeypatch, float("inf"))
        with pytest.raises(TriptychError, match=r"the result of job .* cannot be kept: memory://.* SlowDown") as caught:
            engine.submit(ask(), files=True).result()
        assert caught.value.code == "storage_failed"
        outage.left = 0
        finished(engine.submit(ask(), files=True))


def test_pictures_that_cannot_be_kept_are_refused_at_the_door(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.new("RGB", (64, 64), "red")
    with opened("flux", workflow="image2image", artifacts=url) as engine:
        outage = Outage(monkeypatch, float("inf"))
        with pytest.raises(StorageFailed):
            engine.submit(ask(images=[picture]), files=True)
        outage.left = 0
        finished(engine.submit(ask(images=[picture]), files=True))


def test_a_read_that_fails_is_an_error_and_no_other_picture(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(state=tmp_path / "state", artifacts=url) as engine:
        job = finished(engine.submit(ask(), files=True))
        good = data(engine, job)
    with opened(state=tmp_path / "state", artifacts=url) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, "get_file", lambda self, at, to: Path(to).write_bytes(good[:-1]) and None)
            with pytest.raises(StorageFailed, match=f"gave {len(good) - 1} bytes"):
                data(engine, job)
        assert data(engine, job) == good


class SlowReads:
    """Reads wait until they may go on."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun, self.go, real = threading.Event(), threading.Event(), MemoryFileSystem.get_file

        def get_file(*given: Any, **more: Any) -> None:
            self.begun.set()
            assert self.go.wait(20)
            real(*given, **more)

        patch.setattr(MemoryFileSystem, "get_file", get_file)


def test_nobody_waits_while_pictures_are_brought_back_after_a_restart(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = Image.new("RGB", (64, 64), "red")
    options: dict[str, Any] = {"workflow": "image2image", "state": tmp_path / "state", "artifacts": url}
    with opened(**options) as engine:
        job = engine.submit(ask(images=[picture], num_inference_steps=50), files=True)
    slow = SlowReads(monkeypatch)
    with opened(**options) as engine:
        assert slow.begun.wait(SECONDS)
        before = time.monotonic()
        found = engine.view(job.id)
        assert found is not None and found.record.state == "running" and time.monotonic() - before < 2
        slow.go.set()
        until(lambda: (now := engine.view(job.id)) is not None and now.record.state == "done")
        assert len(data(engine, job))


def test_a_job_whose_pictures_are_on_their_way_when_all_is_closed_goes_on_later(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = Image.new("RGB", (64, 64), "red")
    options: dict[str, Any] = {"workflow": "image2image", "state": tmp_path / "state", "artifacts": url}
    with opened(**options) as engine:
        job = engine.submit(ask(images=[picture], num_inference_steps=50), files=True)
    with monkeypatch.context() as patch:
        failing = SlowReads(patch)
        engine = opened(**options)
        assert failing.begun.wait(SECONDS)
        closing = threading.Thread(target=engine.close)
        closing.start()
        closing.join(2)
        assert closing.is_alive(), "what is being fetched is waited for"
        MemoryFileSystem().pipe_file(f"{url.removeprefix('memory:/')}/{job.id}/pictures", b"cut off")
        failing.go.set()
        closing.join(SECONDS)
    with opened(**options) as engine:
        found = engine.view(job.id)
        assert found is not None and found.record.state in ("queued", "running")
        engine.forget(job.id)


@pytest.fixture
def exchange() -> Iterator[Exchange]:
    made = Exchange(TransferSettings(routes=("reference",)))
    yield made
    made.close()


def pictures_of_another(url: str, exchange: Exchange) -> tuple[ArtifactFolder, PayloadKeeper]:
    """A server that finds pictures of one before it, which it has no copy of."""
    Folder(ArtifactFolder(url)).put("job", "pictures", Payload({"n": 1}))
    artifacts = ArtifactFolder(url)
    return artifacts, PayloadKeeper(exchange, Folder(artifacts))


def test_what_is_far_is_offered_once_it_is_near(url: str, exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    _, keeper = pictures_of_another(url, exchange)
    slow = SlowReads(monkeypatch)
    with pytest.raises(NotNear) as caught:
        keeper.offer("job/pictures")
    slow.go.set()
    caught.value.coming.result(20)
    assert keeper.offer("job/pictures") == keeper.offer("job/pictures")
    keeper.drop("job")
    with pytest.raises(KeyError):
        keeper.offer("job/pictures")
    keeper.close()


def test_what_cannot_be_brought_here_is_gone(url: str, exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    _, keeper = pictures_of_another(url, exchange)
    go = threading.Event()

    def fail(*_: Any, **__: Any) -> None:
        assert go.wait(20)
        raise RuntimeError("SlowDown")

    monkeypatch.setattr(MemoryFileSystem, "get_file", fail)
    with pytest.raises(NotNear) as caught:
        keeper.offer("job/pictures")
    go.set()
    assert isinstance(caught.value.coming.exception(20), OSError)
    with pytest.raises(KeyError):
        keeper.offer("job/pictures")
    keeper.close()


def test_a_failed_task_is_kept_without_waiting_for_its_pictures(
    url: str, exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts, keeper = pictures_of_another(url, exchange)
    slow = SlowReads(monkeypatch)
    keeper.keep_failed("job", b"task")
    keeper.drop("job", "pictures")
    assert slow.begun.wait(10) and not slow.go.is_set()
    slow.go.set()
    until(lambda: set(artifacts.names("job")) == {"failed.task", "failed.pictures"})
    keeper.close()


def test_a_failed_task_is_kept_when_its_pictures_cannot_be_read(
    url: str, exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts, keeper = pictures_of_another(url, exchange)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("SlowDown")

    monkeypatch.setattr(MemoryFileSystem, "get_file", fail)
    Folder(artifacts).keep_failed("job", b"task")
    assert artifacts.read("job", "failed.task") == b"task"
    keeper.keep_failed("job", b"task")
    keeper.drop("job", None)
    until(lambda: not artifacts.names("job"))
    keeper.close()


def test_the_store_is_opened_before_workers_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any) -> None:
        raise AssertionError("workers were started first")

    monkeypatch.setattr(opening, "_start_early", start)
    with pytest.raises(InvalidRequest) as caught:
        opened(isolate=True, artifacts="pigeon://loft")
    assert caught.value.field == "artifacts"


@pytest.fixture(scope="module")
def signing() -> Iterator[Engine]:
    with opened(signed="1.2.3", dtype="float32") as engine:
        yield engine


@pytest.fixture(scope="module")
def silent() -> Iterator[Engine]:
    with opened() as engine:
        yield engine


def written(engine: Engine, folder: Path, **fields: Any) -> list[Path]:
    job = finished(engine.submit(ask(**fields), files=True))
    paths = []
    for index, file in enumerate(engine.result_files(job.id)):
        assert file.data is not None
        path = folder / f"{index}.{file.media_type.rpartition('/')[2]}"
        path.write_bytes(file.data)
        paths.append(path)
    return paths


@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
def test_signed_pictures_say_how_to_make_them_again(signing: Engine, tmp_path: Path, format: str) -> None:
    paths = written(signing, tmp_path, seed=None, num_outputs=2, output_format=format)
    found = [read_settings(path) for path in paths]
    assert [one.output for one in found] == [0, 1]
    assert (found[0].triptych, found[0].workflow, found[0].dtype) == ("1.2.3", "text2image", "float32")
    assert found[0].model == folder("flux").name and found[0].source == "folder", "without its path"
    again = signing.generate(Request.parse(**repeat_settings(found[0], {})))
    if format != "jpeg":
        assert np.array_equal(np.asarray(again.images[1]), levels(paths[1].read_bytes()))


def chunks(png: bytes) -> list[bytes]:
    found, at = [], 8
    while at < len(png):
        found.append(png[at + 4 : at + 8])
        at += 12 + int.from_bytes(png[at : at + 4], "big")
    return found


@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
def test_unsigned_pictures_say_nothing(silent: Engine, tmp_path: Path, format: str) -> None:
    (path,) = written(silent, tmp_path, output_format=format)
    with Image.open(path) as image:
        image.load()
        known = {"jfif", "jfif_version", "jfif_unit", "jfif_density", "loop", "background", "timestamp", "duration"}
        assert set(image.info) <= known and not image.getexif()
    if format == "png":
        assert set(chunks(path.read_bytes())) == {b"IHDR", b"IDAT", b"IEND"}
    assert b"a cat" not in path.read_bytes()


@pytest.mark.parametrize("signed", [None, "1.2.3"])
def test_clips_say_it_too(tmp_path: Path, signed: str | None) -> None:
    with opened("wan-t2v", signed=signed) as engine:
        (path,) = written(engine, tmp_path, num_frames=5, output_format="mp4")
    if signed is None:
        assert b"a cat" not in path.read_bytes() and b"\xa9cmt" not in path.read_bytes()
    else:
        assert read_settings(path).request["prompt"] == "a cat"


def test_settings_too_long_for_a_file_are_left_out_with_a_warning(signing: Engine, tmp_path: Path) -> None:
    job = signing.submit(ask(extra={"joint_attention_kwargs": {"note": "x" * 70_000}}), files=True)
    record = signing.view(job.id)
    job.cancel()
    assert record is not None and "without their settings" in record.record.spec.warnings[-1]

"""What an engine's callers are told when something underneath goes wrong: always something, and never too late."""

from __future__ import annotations

import dataclasses
import queue
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.families import folder
from tests.stage.toy import topology
from triptych import Cancelled, Engine, InvalidRequest, Request, TriptychError
from triptych.cluster import Coordinator, MemoryStore, Outcome, SqliteStore, Supervisor, make_server_keys
from triptych.config import Layout
from triptych.engine import crew, opening
from triptych.engine import engine as engine_module
from triptych.engine.keeper import Memory, PayloadKeeper
from triptych.errors import NoWorker
from triptych.model import Trust
from triptych.transfer import Exchange, TransferSettings

PATIENCE = 60.0


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose name leaves room for a socket's."""
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        yield Path(made)


def ask(steps: int = 3) -> Request:
    return Request.parse(prompt="a cat", width=64, height=64, num_inference_steps=steps, max_sequence_length=32, seed=1)


def opened(**options: Any) -> Engine:
    return Engine.open(str(folder("flux")), device="cpu", **options)


def raised(work: Callable[[], Any]) -> BaseException | None:
    """What it raises, within a time; whoever waits for ever fails the test."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).exception(timeout=PATIENCE)


def die() -> None:
    raise SystemExit("a library wanted to end the process")


def test_a_worker_thread_that_dies_ends_every_job_and_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened() as engine:
        jobs = [engine.submit(ask(steps=900)) for _ in range(2)]
        monkeypatch.setattr(cast(Any, engine)._parts.crew._worker._desk, "turn", die)
        for job in jobs:
            error = raised(job.result)
            assert isinstance(error, NoWorker) and "SystemExit" in str(error)
        assert isinstance(raised(lambda: engine.generate(ask())), NoWorker)
        jobs_now = engine.status().jobs
        assert not jobs_now["queued"] and not jobs_now["running"]


@pytest.mark.parametrize("durable", [False, True])
def test_whoever_watches_a_job_hears_that_nobody_is_left(
    durable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(state=tmp_path / "state" if durable else None) as engine:
        job = engine.submit(ask(steps=900))
        heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
        engine.watch(job.id, lambda event: heard.put(event) if isinstance(event, Outcome) else None)
        monkeypatch.setattr(cast(Any, engine)._parts.crew._worker._desk, "turn", die)
        assert isinstance(raised(job.result), NoWorker)
        outcome, view = heard.get(timeout=PATIENCE), engine.view(job.id)
        assert (outcome.state, outcome.failures[-1].code) == ("failed", "no_worker")
        assert view is not None and (view.record.state in ("queued", "running")) == durable


def test_a_job_submitted_while_the_worker_thread_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened() as engine:
        real = engine_module.spec_of

        def late(*args: Any) -> Any:
            monkeypatch.setattr(cast(Any, engine)._parts.crew._worker._desk, "turn", die)
            cast(Any, engine)._parts.crew._worker._inbox.put(None)  # an order that it cannot carry out wakes it
            return real(*args)

        monkeypatch.setattr(engine_module, "spec_of", late)
        assert isinstance(raised(lambda: engine.generate(ask())), NoWorker)


def test_a_job_that_was_refused_after_it_was_taken_leaves_its_name_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened() as engine:
        coordinator, job = cast(Any, engine)._coordinator, engine.id_of("client", "name")
        real = coordinator.submit

        def submit(*args: Any) -> None:
            real(*args)
            cast(Any, engine)._broken = "nobody is left"

        monkeypatch.setattr(coordinator, "submit", submit)
        assert isinstance(raised(lambda: engine.submit(ask(), id=job)), NoWorker)
        assert engine.view(job) is None
        monkeypatch.undo()
        cast(Any, engine)._broken = ""
        assert engine.submit(ask(), id=job, files=False).result().images


def test_a_late_word_of_a_forgotten_job_is_not_told_to_the_next_one_of_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with opened() as engine:
        job, told = engine.id_of("client", "name"), list[Callable[[], None]]()
        teller = cast(Any, engine)._teller

        def late(*args: Any) -> Callable[[Any], None]:
            tell = teller(*args)
            return lambda event: told.append(lambda: tell(event))

        monkeypatch.setattr(engine, "_teller", late)
        engine.submit(ask(), id=job)
        assert engine.forget(job)
        monkeypatch.undo()
        again = engine.submit(ask(), id=job, files=False)
        for word in told:
            word()
        assert again.result().images


@pytest.mark.parametrize("error", [KeyError("gone"), OSError("the disk"), NoWorker("of its own")])
def test_a_result_that_cannot_be_read_is_an_error_and_no_wait(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(*_: Any) -> Any:
        raise error

    with opened() as engine:
        monkeypatch.setattr(cast(Any, engine)._keeper, "take", take)
        got = raised(lambda: engine.generate(ask()))
        assert isinstance(got, TriptychError)
        assert got is error or type(error).__name__ in str(got)


def test_a_job_taken_while_the_engine_closes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = opened()
    closing, taken = threading.Event(), threading.Event()
    real_close, real_spec = cast(Any, engine)._parts.cleanup.close, engine_module.spec_of

    def close() -> None:
        closing.set()
        assert taken.wait(PATIENCE)
        real_close()

    def spec(*args: Any) -> Any:
        threading.Thread(target=engine.close).start()
        assert closing.wait(PATIENCE)
        return real_spec(*args)

    monkeypatch.setattr(cast(Any, engine)._parts.cleanup, "close", close)
    monkeypatch.setattr(engine_module, "spec_of", spec)
    job = engine.submit(ask(steps=900))
    taken.set()
    assert isinstance(raised(job.result), Cancelled)


def test_a_worker_that_ends_as_the_engine_closes_is_no_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = opened(state=tmp_path / "state")
    crew = cast(Any, engine)._parts.crew
    leave = crew._leave

    def late() -> None:
        crew._thread.join(PATIENCE)  # it ends by the coordinator's word alone
        assert not crew._thread.is_alive()
        leave()

    monkeypatch.setattr(crew, "_leave", late)
    job = engine.submit(ask(steps=900), files=True)
    engine.close()
    error = raised(job.result)
    assert isinstance(error, Cancelled) and "goes on" in str(error)


def test_what_is_left_of_a_closed_engine_cancels_nothing(tmp_path: Path) -> None:
    engine = opened(state=tmp_path / "state")
    job = engine.submit(ask(steps=900), files=True)
    engine.close()
    assert engine.cancel(job.id) is False
    with_it = SqliteStore(tmp_path / "state" / "jobs.sqlite")
    assert [record.spec.id for record in with_it.unfinished()] == [job.id]
    with_it.close()


def test_keys_without_a_door_are_not_ignored(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="listen"):
        opened(keys=tmp_path)


def test_an_engine_that_does_not_open_leaves_nothing(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, temporary = str(folder("flux")), short / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    make_server_keys(short / "keys")
    before = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        for state in (None, short / "state"):
            trace = short / f"{state is None}.json"
            with pytest.raises(InvalidRequest, match="listen") as caught:
                Engine.open(model, layout="split", listen=listen, keys=short / "keys", state=state, trace=trace)
            assert trace.read_text().rstrip().endswith("]"), "the timeline was ended"
            assert not list(temporary.iterdir())
    SqliteStore(short / "state" / "jobs.sqlite").close()  # not "in use", although the error still holds its frames
    assert caught.value.field == "listen"
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(("state", "seconds"), [(None, "10.0"), (Path("state"), "60.0")])
def test_workers_wait_long_for_a_killed_engine_only_where_another_may_come(state: Path | None, seconds: str) -> None:
    words: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(opening.Opening))
    asked = opening.Opening(**{**words, "model": "emoji", "trust": Trust(), "state": state})
    (slot,) = Layout.fused().slots(("encode", "denoise", "decode"))
    command = opening._command(asked, Layout.fused(), slot, "ipc://x", Path("folder"))
    assert command[command.index("--orphan-seconds") + 1] == seconds


class FakeSupervisor:
    """Starts nothing; says what its workers' logs would."""

    def states(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name, last=("no such device", "given up after 6 deaths")) for name in "abc"]

    def steady(self, slot: str) -> None:
        """Nothing is watched."""

    def stop(self, timeout: float) -> None:
        """Nothing runs."""


@pytest.mark.parametrize("awaited", [False, True])
def test_a_stage_whose_last_slot_is_given_up_is_told_where_nobody_else_may_join(awaited: bool, short: Path) -> None:
    given_up: list[Callable[[str, tuple[str, ...]], None]] = []

    def supervise(exited: crew.OnExit, over: crew.OnGivenUp) -> Supervisor:
        given_up.append(over)
        return cast(Supervisor, FakeSupervisor())

    told: list[str] = []
    with Exchange(TransferSettings(routes=("reference",))) as exchange:
        keeper = PayloadKeeper(exchange, Memory())
        coordinator = Coordinator(("encode", "denoise"), store=MemoryStore(), keeper=keeper)
        processes = crew.Processes(
            crew.Told(coordinator, topology()),
            coordinator,
            [f"ipc://{short / 'control.sock'}"],
            None,
            supervise,
            {"a": ("encode",), "b": ("encode",), "c": ("denoise",)},
            awaited,
        )
        processes.watch(told.append)
        given_up[0]("a", ())
        assert told == [], "slot b is left for encode"
        given_up[0]("c", ())
        assert told == ([] if awaited else ["worker c was given up: no such device"])
        processes.stop()
        coordinator.close()
        keeper.close()

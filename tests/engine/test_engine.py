"""The engine as an application uses it: from threads and coroutines, streamed, cancelled, with previews."""

from __future__ import annotations

import asyncio
import gc
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.families import folder
from triptych import Cancelled, Engine, InvalidRequest, Progress, Request, Result, TriptychError, Unsupported


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.open(str(folder("flux")), device="cpu") as opened:
        yield opened


def ask(prompt: Any = "a photo of a cat", **fields: Any) -> Request:
    known = {"width": 64, "height": 64, "num_inference_steps": 3, "max_sequence_length": 32, "seed": 1}
    return Request.parse(prompt=prompt, **{**known, **fields})


def pixels(result: Result) -> np.ndarray:
    return np.stack([np.asarray(image) for image in result.images])


def nothing_runs(engine: Engine) -> bool:
    jobs = engine.status().jobs
    return not jobs["queued"] and not jobs["running"]


def test_same_seed_same_picture_other_seed_another(engine: Engine) -> None:
    first, again, other = (engine.generate(ask(seed=seed)) for seed in (1, 1, 2))
    assert np.array_equal(pixels(first), pixels(again))
    assert not np.array_equal(pixels(first), pixels(other))
    assert first.images[0].size == (64, 64)


def test_result_repeats_itself(engine: Engine) -> None:
    drawn = engine.generate(ask(seed=None))
    assert drawn.request.seed is not None
    assert np.array_equal(pixels(drawn), pixels(engine.generate(drawn.request)))


def test_threads_see_their_own_pictures_only(engine: Engine) -> None:
    requests = [
        ask(prompt, seed=seed, num_inference_steps=2 + seed) for seed, prompt in enumerate(["cat", "a dog", "x"])
    ]
    alone = [pixels(engine.generate(request)) for request in requests]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda request: pixels(engine.generate(request)), requests * 2))
    for index, got in enumerate(together):
        assert np.array_equal(got, alone[index % 3])


def test_prompts_times_outputs(engine: Engine) -> None:
    result = engine.generate(ask(prompt=["a cat", "a dog"], num_outputs=2))
    assert len(result.images) == 4


def test_stream_tells_stages_and_steps_then_the_result(engine: Engine) -> None:
    events = list(engine.stream(ask()))
    assert isinstance(events[-1], Result)
    steps = [(event.stage, event.step, event.steps) for event in events if isinstance(event, Progress)]
    assert steps == [
        ("encode", 1, 1),
        ("denoise", 1, 3),
        ("denoise", 2, 3),
        ("denoise", 3, 3),
        ("decode", 1, 1),
    ]
    assert [time.stage for time in events[-1].times] == ["encode", "denoise", "decode"]
    assert all(time.seconds > time.ran > 0 and time.peak_bytes > 0 for time in events[-1].times)


def test_cancel_takes_effect_before_the_next_step(engine: Engine) -> None:
    job = engine.submit(ask(num_inference_steps=500))
    seen = 0
    with pytest.raises(Cancelled):
        for event in job.events():
            assert isinstance(event, Progress)
            seen = event.step
            if event.stage == "denoise" and event.step == 2:
                job.cancel()
    assert seen < 500
    assert engine.generate(ask()).images, "the engine goes on"


def test_leaving_a_stream_cancels_the_job(engine: Engine) -> None:
    stream = engine.stream(ask(num_inference_steps=500))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    engine.generate(ask())
    assert nothing_runs(engine)


def test_async_twins(engine: Engine) -> None:
    async def both() -> tuple[Result, list[Progress | Result]]:
        result = await engine.agenerate(ask())
        return result, [event async for event in engine.astream(ask())]

    result, events = asyncio.run(both())
    assert isinstance(events[-1], Result)
    assert np.array_equal(pixels(result), pixels(events[-1]))


def test_cancelling_an_awaiting_task_cancels_the_job(engine: Engine) -> None:
    async def leave() -> None:
        task = asyncio.create_task(engine.agenerate(ask(num_inference_steps=500)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    engine.generate(ask())
    assert nothing_runs(engine)


def test_previews_only_for_those_who_ask(engine: Engine) -> None:
    watched = [event for event in engine.stream(ask(), preview=True) if isinstance(event, Progress)]
    pictures = [event.preview for event in watched if event.stage == "denoise"]
    assert len(pictures) == 3 and all(isinstance(picture, Image.Image) for picture in pictures)
    unwatched = [event for event in engine.stream(ask()) if isinstance(event, Progress)]
    assert all(event.preview is None for event in unwatched)


@pytest.mark.parametrize(
    ("fields", "field", "allowed"),
    [
        ({"width": 63}, "width", "multiples of"),
        ({"width": 10**4, "height": 16 * 10**3, "num_outputs": 64}, "width, height", "GiB"),
        ({"negative_prompt": "ugly"}, "negative_prompt", "nothing"),
        ({"num_frames": 9}, "num_frames", "pictures"),
        ({"extra": {"nonsense": 1}}, "extra", "allowed"),
    ],
)
def test_wrong_fields_are_named_before_any_work(
    engine: Engine, fields: dict[str, object], field: str, allowed: str
) -> None:
    with pytest.raises(TriptychError) as caught:
        engine.submit(ask(**fields))
    assert caught.value.field == field and allowed in str(caught.value)
    assert nothing_runs(engine)


def test_unknown_field_names_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match="num_inference_steps"):
        Request.parse(prompt="x", stepps=3)


def test_a_closed_engine_says_so() -> None:
    engine = Engine.open(str(folder("flux")), device="cpu")
    job = engine.submit(ask(num_inference_steps=900))
    threading.Timer(0.1, engine.close).start()
    with pytest.raises(Cancelled):
        job.result()
    engine.close()
    job.cancel()
    with pytest.raises(Unsupported):
        engine.generate(ask())


def test_a_jobs_outcome_can_be_asked_for_again(engine: Engine) -> None:
    job = engine.submit(ask())
    events = list(job.events())
    assert job.result() is events[-1] and list(job.events()) == events[-1:]


def test_many_waiting_coroutines_leave_the_loops_threads_alone(engine: Engine) -> None:
    async def crowd() -> int:
        tasks = [asyncio.create_task(engine.agenerate(ask(num_inference_steps=200))) for _ in range(40)]
        await asyncio.sleep(0.1)
        answer = await asyncio.wait_for(asyncio.to_thread(lambda: 42), timeout=20)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return answer

    assert asyncio.run(crowd()) == 42
    engine.generate(ask())
    assert nothing_runs(engine)


def test_previews_do_not_depend_on_who_asked_first() -> None:
    def shown(first: int) -> list[bytes]:
        with Engine.open(str(folder("flux")), workflow="text2image", device="cpu") as opened:
            list(opened.stream(ask(width=first, height=first), preview=True))
            events = list(opened.stream(ask(), preview=True))
        pictures = [event.preview for event in events if isinstance(event, Progress)]
        return [picture.tobytes() for picture in pictures if picture is not None]

    assert shown(16) == shown(64) and len(shown(64)) == 3


def test_no_engine_without_capacity_and_none_half_open() -> None:
    with pytest.raises(InvalidRequest, match="capacity"):
        Engine.open(str(folder("flux")), device="cpu", capacity=0)

    def leave(_: object) -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        Engine.open(str(folder("flux")), device="cpu", report=leave)


def test_closing_lets_the_weights_go() -> None:
    def transformers() -> list[object]:
        gc.collect()
        return [thing for thing in gc.get_objects() if type(thing).__name__ == "FluxTransformer2DModel"]

    before = len(transformers())
    with Engine.open(str(folder("flux")), workflow="text2image", device="cpu") as opened:
        opened.generate(ask())
        assert len(transformers()) > before
    assert len(transformers()) == before


def test_a_state_folder_outlives_its_engine(tmp_path: Path) -> None:
    with Engine.open(str(folder("flux")), device="cpu", state=tmp_path / "state") as first:
        # Files, since nobody who waits for pixels outlives the engine.
        job = first.submit(ask(num_inference_steps=200), files=True)
    with pytest.raises(Cancelled, match="goes on"):
        job.result()
    with Engine.open(str(folder("flux")), device="cpu", state=tmp_path / "state") as second:
        assert [record.spec.id for record in second.jobs()] == [job.id]
        end = time.monotonic() + 60
        while (view := second.view(job.id)) is not None and view.record.state != "done":
            assert time.monotonic() < end, view
            time.sleep(0.05)
        (file,) = second.result_files(job.id)
        assert file.path is not None
        with Image.open(file.path) as image:
            assert image.size == (64, 64)


def test_a_state_folder_may_lie_deep(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = short_path / ("deep" * 20) / "state"
    monkeypatch.setattr(tempfile, "tempdir", str(short_path))  # other tests use the system's own meanwhile
    monkeypatch.setenv("TMPDIR", str(short_path))
    for _ in range(2):  # the second time, it finds its sockets where it left them
        with Engine.open("emoji", device="cpu", isolate=True, state=state) as engine:
            assert engine.generate(Request.parse(prompt="a cat", num_inference_steps=1)).images
    assert not list(state.rglob("*.sock"))
    assert [path.name for path in short_path.iterdir()] == ["deep" * 20]

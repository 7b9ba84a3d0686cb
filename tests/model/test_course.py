"""What a loop carries is found by looking, kept as plain data, and put back only where it fits."""

from __future__ import annotations

import types
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from triptych.errors import WrongPayload
from triptych.model import Pause, TaskInputs
from triptych.model.carried import Unkeepable, kept, marks, put_back
from triptych.model.course import Course
from triptych.model.rounds import why_not_resumable
from triptych.transfer import Payload

CPU = torch.device("cpu")


class Buffer:
    """An object with a memory, as guiders have."""

    def __init__(self) -> None:
        self.average: Any = 0
        self.momentum = 0.5


def thing(**values: Any) -> Any:
    return types.SimpleNamespace(**values)


def full(at: float) -> Any:
    """An object as it is before a loop (0), or as it is after some steps of one with other numbers."""
    made = thing(
        constant=torch.ones(3),
        sample=torch.full((2, 2), at),
        history=[None, torch.full((3,), at)],
        pairs=(torch.full((1,), at), 2),
        index=int(at),
        scale=at,
        table={"a": torch.full((1,), at)},
        numbers=np.full(3, at, np.float32),
        number=np.float64(at),
        dtype=torch.float32,
        memory=None,
    )
    made.memory = Buffer()
    made.memory.average = torch.full((2,), at)
    return made


def test_everything_that_changed_and_nothing_else_comes_back() -> None:
    run, replay = full(0.0), full(0.0)
    before, again = marks(run), marks(replay)
    assert kept(before, run) == {}
    vars(run).update({name: value for name, value in vars(full(7.0)).items() if name not in ("constant", "dtype")})
    vars(replay).update({name: value for name, value in vars(full(3.0)).items() if name not in ("constant", "dtype")})
    values = kept(before, run)
    assert set(values) == set(vars(run)) - {"constant", "dtype"}
    Payload({"values": values}).check()
    put_back(again, replay, values, "parts")
    for name in ("sample", "numbers"):
        assert (vars(replay)[name] == 7).all()
    assert (replay.history[1] == 7).all() and replay.history[0] is None and (replay.pairs[0] == 7).all()
    assert replay.index == 7 and type(replay.index) is int and replay.scale == 7.0
    assert replay.number == 7 and type(replay.number) is np.float64 and (replay.table["a"] == 7).all()
    assert (replay.memory.average == 7).all() and replay.memory.momentum == 0.5


def test_a_write_in_place_is_seen() -> None:
    run = thing(sample=torch.zeros(2), history=[torch.zeros(2)], numbers=np.zeros(2), memory=Buffer())
    before = marks(run)
    assert kept(before, run) == {}
    run.history[0].add_(1)
    assert list(kept(before, run)) == ["history"]
    run.sample[0] = 1
    run.numbers[1] = 1
    run.memory.momentum = 0.25
    assert list(kept(before, run)) == ["sample", "history", "numbers", "memory"]
    assert kept(before, run)["memory"] == {"object": "Buffer", "has": {"momentum": 0.25}}


def test_what_was_kept_is_a_copy_and_what_is_put_back_too() -> None:
    run, replay = thing(sample=None), thing(sample=None)
    before = marks(run)
    run.sample, replay.sample = torch.zeros(2), torch.ones(2)
    values = kept(before, run)
    run.sample.add_(5)
    put_back(before, replay, values, "parts")
    replay.sample.add_(5)
    assert values["sample"].tolist() == [0, 0]


def ring() -> Any:
    """An object that refers to itself."""
    made = thing(value=torch.zeros(2))
    made.again = [made]
    return made


@pytest.mark.parametrize(
    "value", [ring(), lambda: 1, {1: 2}, torch.Generator(), np.array([object()]), {"a": [iter([])]}]
)
def test_what_plain_data_cannot_say_is_told(value: Any) -> None:
    run = thing(sample=None)
    before = marks(run)
    run.sample = value
    with pytest.raises(Unkeepable, match=r"^sample"):
        kept(before, run)


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({}, "parts.sample"),
        ({"sample": torch.zeros(3)}, "parts.sample"),
        ({"sample": torch.zeros(2, dtype=torch.float64)}, "parts.sample"),
        ({"sample": [torch.zeros(2)]}, "parts.sample"),
        ({"sample": None}, "parts.sample"),
        ({"sample": torch.zeros(2), "index": True}, "parts.index"),
        ({"sample": torch.zeros(2), "other": 1}, "parts.other"),
        ({"sample": torch.zeros(2), "memory": {"object": "Other", "has": {}}}, "parts.memory"),
        ({"sample": torch.zeros(2), "memory": {"object": "Buffer", "has": {"x": 1}}}, "parts.memory.x"),
        ({"sample": torch.zeros(2), "memory": {"object": "Buffer", "has": 1}}, "parts.memory"),
        (5, "parts"),
    ],
)
def test_what_does_not_fit_is_named(value: Any, field: str) -> None:
    replay = thing(sample=None, index=0, memory=Buffer())
    before = marks(replay)
    replay.sample, replay.index, replay.memory.average = torch.ones(2), 1, 1
    with pytest.raises(WrongPayload) as caught:
        put_back(before, replay, value, "parts")
    assert caught.value.field == field


def course(**given: Any) -> tuple[Course, list[Pause]]:
    pauses: list[Pause] = []
    task = TaskInputs({}, None, torch.Generator().manual_seed(0), **{"keep": pauses.append, **given})
    return Course(task, "Pipe", CPU), pauses


def test_a_second_loop_ends_the_checkpoints() -> None:
    """Chunks of a long clip, say: what one loop came to is not in the state of the next."""
    made, pauses = course()
    parts = {"state": thing(latents=torch.zeros(1))}
    made.begin(parts)
    made.between(1, 3, parts)
    made.refuse()
    made.between(2, 3, parts)
    assert [pause.step for pause in pauses] == [1] and not made.wanted


def test_no_checkpoint_where_the_loop_holds_more_than_data() -> None:
    made, pauses = course()
    parts = {"state": thing(latents=torch.zeros(1), noise=None)}
    made.begin(parts)
    parts["state"].noise = lambda: 0
    made.between(1, 3, parts)
    assert pauses[0].take() is None


def test_nor_where_the_denoiser_answers_with_no_data() -> None:
    made, pauses = course()
    parts = {"state": thing(latents=torch.zeros(1))}
    answer = object()
    net = made.around("transformer", lambda: answer)
    made.begin(parts)
    assert net() is answer, "the job goes on"
    made.between(1, 3, parts)
    assert pauses == []


def test_the_denoiser_is_not_called_in_a_replay() -> None:
    taken: list[Any] = []
    made, _ = course(keep=lambda pause: taken.append(pause.take()))
    calls: list[int] = []

    def forward(x: torch.Tensor) -> tuple[torch.Tensor]:
        calls.append(1)
        return (x.repeat(2),)

    def loop(of: Course, state: Any, steps: int) -> torch.Tensor:
        net = of.around("transformer", forward)
        of.begin({"state": state})
        for index in range(steps):
            if index:
                of.between(index, steps, {"state": state})
            state.latents = state.latents + net(torch.ones(2))[0].sum() + index
        return state.latents

    whole = loop(made, thing(latents=torch.zeros(1)), 4)
    assert len(calls) == 4 and len(taken) == 3
    calls.clear()
    again, _ = course(checkpoint=taken[1])
    assert torch.equal(loop(again, thing(latents=torch.zeros(1)), 4), whole)
    assert len(calls) == 2 and not again.replaying
    short, _ = course(checkpoint=taken[1])
    with pytest.raises(WrongPayload, match=r"checkpoint\.step: the loop has ended before step 2"), short.going():
        loop(short, thing(latents=torch.zeros(1)), 2)


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "WanPipeline",
        "HunyuanVideoPipeline",
        "CogVideoXPipeline",
        "SanaPipeline",
        "MochiPipeline",
        "PixArtSigmaPipeline",
        "LTX2Pipeline",
        "DDPMPipeline",
    ],
)
def test_a_loop_that_hands_on_only_what_its_scheduler_gave_can_be_taken_up(name: str) -> None:
    assert why_not_resumable(getattr(diffusers, name)) is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("SemanticStableDiffusionPipeline", "edit_momentum"),
        ("Flux2KleinKVPipeline", "kv_cache from one step to the next"),
        ("GlmImagePipeline", "its denoiser is called outside of the loop"),
        ("HeliosPipeline", "a loop of loops"),
        ("UnCLIPPipeline", "3 loops of steps"),
        ("KandinskyCombinedPipeline", "0 loops of steps"),
    ],
)
def test_and_another_cannot(name: str, reason: str) -> None:
    assert reason in (why_not_resumable(getattr(diffusers, name)) or "")

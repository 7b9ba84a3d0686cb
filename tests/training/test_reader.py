"""The grader's own tests: it must read real pictures before it may judge made ones."""

import random

import pytest
import torch
from torch import Tensor

from training.reader import Reader, Reading, blur, judge, shares
from training.scenes import PAIR, SHAPE, SINGLE, Renderer, Scene, draw_scene

COUNTS = {SINGLE: 70, PAIR: 40, SHAPE: 30}


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader()


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = random.Random(11)
    return [draw_scene(rng, kind, i % 4 == 3) for kind, count in COUNTS.items() for i in range(count)]


@pytest.fixture(scope="module")
def pictures(scenes: list[Scene]) -> Tensor:
    return Renderer()(scenes)


@pytest.fixture(scope="module")
def readings(reader: Reader, pictures: Tensor) -> list[Reading]:
    return reader(pictures)


def test_real_renders_are_read(scenes: list[Scene], readings: list[Reading]) -> None:
    figures = shares(scenes, readings)
    assert min(figures.values()) >= 99, figures


@pytest.mark.parametrize("sigma", [1.5, 1.75])
def test_blurred_renders_are_read(reader: Reader, scenes: list[Scene], pictures: Tensor, sigma: float) -> None:
    figures = shares(scenes, reader(blur(pictures, sigma)))
    assert min(figures.values()) >= 95, figures


def test_shuffled_scenes_are_near_chance(scenes: list[Scene], readings: list[Reading]) -> None:
    other = [scenes[(i + 1) % COUNTS[SINGLE]] for i in range(COUNTS[SINGLE])]
    assert shares(other, readings[: COUNTS[SINGLE]])["noun"] <= 100 / 64 + 3


def test_order_of_a_pair_counts(reader: Reader) -> None:
    scene = Scene(PAIR, 0, 2, 0, 0, -1, 6, -1)
    reading = reader(Renderer()([scene]))[0]
    assert judge(scene, reading).pair
    assert not judge(scene._replace(first=2, second=0), reading).pair
    assert not judge(scene._replace(relation=1), reading).pair


def test_an_empty_picture_shows_nothing(reader: Reader) -> None:
    reading = reader(torch.zeros(1, 3, 64, 64))[0]
    assert reading.scene is None
    assert not judge(Scene(SINGLE, 0, -1, -1, 0, 0, 0, -1), reading).noun

"""The grader's own tests: it must read real pictures before it may judge made ones."""

import random

import pytest
import torch
from torch import Tensor

from training.reader import Reader, blur, judge, shares
from training.scenes import PAIR, SHAPE, SINGLE, Renderer, Scene, draw_scene

COUNTS = {SINGLE: 120, PAIR: 80, SHAPE: 60}


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


def test_real_renders_are_read(reader: Reader, scenes: list[Scene], pictures: Tensor) -> None:
    figures = shares(scenes, reader(pictures))
    assert min(figures.values()) >= 99, figures


@pytest.mark.parametrize("sigma", [1.1, 1.5])
def test_blurred_renders_are_read(
    reader: Reader, scenes: list[Scene], pictures: Tensor, sigma: float
) -> None:
    figures = shares(scenes, reader(blur(pictures, sigma)))
    assert min(figures.values()) >= 95, figures


def test_shuffled_scenes_are_near_chance(reader: Reader, scenes: list[Scene], pictures: Tensor) -> None:
    readings = reader(pictures)
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

"""The held-out split and the renderer."""

import random

import torch

from training.scenes import (
    KINDS,
    PAIR,
    Renderer,
    all_seen_shapes,
    all_seen_singles,
    draw_scene,
    draw_seen_pairs,
    is_held_out,
)
from training.vocabulary import BACKGROUNDS, NOUNS, POSITIONS, SIZES


def test_the_world_is_large_enough() -> None:
    assert len(NOUNS) >= 64
    assert (len(BACKGROUNDS), len(POSITIONS), len(SIZES)) == (8, 5, 2)
    assert len({noun.word for noun in NOUNS}) == len(NOUNS)


def test_training_scenes_are_never_held_out() -> None:
    scenes = [*all_seen_singles(), *all_seen_shapes(), *draw_seen_pairs(random.Random(0), 500)]
    assert not any(is_held_out(scene) for scene in scenes)


def test_each_kind_has_held_out_scenes() -> None:
    rng = random.Random(0)
    assert all(is_held_out(draw_scene(rng, kind, held_out=True)) for kind in KINDS)


def test_a_picture_does_not_depend_on_its_batch() -> None:
    rng, renderer = random.Random(1), Renderer()
    scenes = [draw_scene(rng, kind) for kind in KINDS for _ in range(4)]
    together = renderer(scenes)
    assert together.shape == (12, 3, 64, 64)
    assert float(together.abs().max()) <= 1
    assert all(torch.equal(together[i], renderer([scene])[0]) for i, scene in enumerate(scenes))


def test_a_pair_shows_both_things() -> None:
    rng, renderer = random.Random(2), Renderer()
    scene = draw_scene(rng, PAIR)._replace(relation=0)
    picture = renderer([scene])[0]
    corner = picture[:, :1, :1]
    changed = (picture - corner).abs().amax(0) > 0.1
    assert changed[:, :32].any() and changed[:, 32:].any()

"""Scenes: what a picture shows, which combinations are held out of training, and the renderer."""

import hashlib
import random
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.sprites import load_sprites
from training.vocabulary import (
    BACKGROUND_NAMES,
    BACKGROUNDS,
    NOUNS,
    PICTURE_SIZE,
    POSITIONS,
    SHAPE_COLOUR_NAMES,
    SHAPE_COLOURS,
    SHAPES,
    SIZES,
)

SINGLE, PAIR, SHAPE = range(3)
KINDS = (SINGLE, PAIR, SHAPE)
LEFT_OF, ABOVE = range(2)
NONE = -1
# Positions (indices into POSITIONS) of the first and second thing of a pair, per relation.
PAIR_POSITIONS = ((0, 1), (2, 3))


class Scene(NamedTuple):
    """What a picture shows, as indices into the vocabulary; NONE where an attribute does not apply.

    `first` is a noun, or a shape where kind is SHAPE; in a pair it is the left or upper thing.
    """

    kind: int
    first: int
    second: int
    relation: int
    size: int
    position: int
    background: int
    colour: int


def _bucket(*key: object) -> int:
    return int(hashlib.md5(repr(key).encode(), usedforsecurity=False).hexdigest()[:8], 16)


@cache
def _noun_on_background_is_held_out(noun: int, background: int) -> bool:
    return _bucket("noun", NOUNS[noun].word, BACKGROUND_NAMES[background]) % 10 == 0


@cache
def _pair_is_held_out(one: int, other: int) -> bool:
    return _bucket("pair", *sorted((NOUNS[one].word, NOUNS[other].word))) % 8 == 0


@cache
def _shape_is_held_out(shape: int, colour: int, background: int) -> bool:
    return _bucket("shape", SHAPES[shape], SHAPE_COLOUR_NAMES[colour], BACKGROUND_NAMES[background]) % 10 == 0


def is_held_out(scene: Scene) -> bool:
    """Whether the combination never appears in training: (noun, background), noun pair, or coloured shape."""
    if scene.kind == SHAPE:
        return _shape_is_held_out(scene.first, scene.colour, scene.background)
    if _noun_on_background_is_held_out(scene.first, scene.background):
        return True
    if scene.kind == SINGLE:
        return False
    return _noun_on_background_is_held_out(scene.second, scene.background) or _pair_is_held_out(
        scene.first, scene.second
    )


def colour_fits(colour: int, background: int) -> bool:
    """A shape of the background's own colour name would be an unfair question."""
    return SHAPE_COLOUR_NAMES[colour] != BACKGROUND_NAMES[background]


def random_scene(rng: random.Random, kind: int) -> Scene:
    size, background = rng.randrange(len(SIZES)), rng.randrange(len(BACKGROUNDS))
    if kind == PAIR:
        first, second = rng.sample(range(len(NOUNS)), 2)
        return Scene(PAIR, first, second, rng.randrange(2), size, NONE, background, NONE)
    position = rng.randrange(len(POSITIONS))
    if kind == SINGLE:
        return Scene(SINGLE, rng.randrange(len(NOUNS)), NONE, NONE, size, position, background, NONE)
    colours = [c for c in range(len(SHAPE_COLOURS)) if colour_fits(c, background)]
    return Scene(SHAPE, rng.randrange(len(SHAPES)), NONE, NONE, size, position, background, rng.choice(colours))


def draw_scene(rng: random.Random, kind: int, held_out: bool = False) -> Scene:
    """A random scene of one side of the split."""
    while is_held_out(scene := random_scene(rng, kind)) != held_out:
        pass
    return scene


def all_seen_singles() -> list[Scene]:
    scenes = (
        Scene(SINGLE, noun, NONE, NONE, size, position, background, NONE)
        for noun, size, position, background in product(
            range(len(NOUNS)), range(len(SIZES)), range(len(POSITIONS)), range(len(BACKGROUNDS))
        )
    )
    return [scene for scene in scenes if not is_held_out(scene)]


def all_seen_shapes() -> list[Scene]:
    scenes = (
        Scene(SHAPE, shape, NONE, NONE, size, position, background, colour)
        for shape, size, position, background, colour in product(
            range(len(SHAPES)),
            range(len(SIZES)),
            range(len(POSITIONS)),
            range(len(BACKGROUNDS)),
            range(len(SHAPE_COLOURS)),
        )
        if colour_fits(colour, background)
    )
    return [scene for scene in scenes if not is_held_out(scene)]


def draw_seen_pairs(rng: random.Random, count: int) -> list[Scene]:
    """Distinct training pairs, in the order drawn."""
    return list(dict.fromkeys(draw_scene(rng, PAIR) for _ in range(count)))


class Renderer:
    """Composes scenes from the sprites on one device; the data of every model here and of its grader."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.layers = self._place_sprites().to(self.device)
        self.backgrounds = torch.tensor(list(BACKGROUNDS.values()), device=self.device) / 255
        self.shape_colours = torch.tensor(list(SHAPE_COLOURS.values()), device=self.device) / 255

    @staticmethod
    def _place_sprites() -> Tensor:
        """Premultiplied RGBA layers, (sprite, size, position, 4, height, width), 0..1."""
        sprites = load_sprites()
        shape = (len(sprites[0]), len(SIZES), len(POSITIONS), 4, PICTURE_SIZE, PICTURE_SIZE)
        layers = np.zeros(shape, np.float32)
        for size, pixels in enumerate(SIZES.values()):
            pictures = sprites[size].transpose(0, 3, 1, 2).astype(np.float32) / 255
            for place, (x, y) in enumerate(POSITIONS.values()):
                top, left = y - pixels // 2, x - pixels // 2
                layers[:, size, place, :, top : top + pixels, left : left + pixels] = pictures
        return torch.from_numpy(layers)

    def __call__(self, scenes: Sequence[Scene]) -> Tensor:
        """Pictures (scenes, 3, 64, 64) in -1..1."""
        kind, first, second, relation, size, position, background, colour = torch.tensor(
            scenes, device=self.device
        ).unbind(1)
        places = torch.tensor(PAIR_POSITIONS, device=self.device)[relation.clamp(min=0)]
        is_pair, is_shape = kind == PAIR, kind == SHAPE
        sprite = torch.where(is_shape, len(NOUNS) + first, first)
        layer = self.layers[sprite, size, torch.where(is_pair, places[:, 0], position)]
        tint = torch.where(is_shape[:, None], self.shape_colours[colour.clamp(min=0)], 1.0)[..., None, None]
        pictures = self.backgrounds[background][..., None, None] * (1 - layer[:, 3:]) + layer[:, :3] * tint
        layer = self.layers[second.clamp(min=0), size, places[:, 1]] * is_pair[:, None, None, None]
        pictures = pictures * (1 - layer[:, 3:]) + layer[:, :3]
        return pictures * 2 - 1


def to_bytes(pictures: Tensor) -> Tensor:
    """Pictures in -1..1 as 0..255, the form they are stored and shown in."""
    return ((pictures + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def render_bytes(renderer: Renderer, scenes: Iterable[Scene], chunk: int = 256) -> Tensor:
    """Many scenes as bytes without holding all of them in float."""
    scenes = list(scenes)
    return torch.cat([to_bytes(renderer(scenes[at : at + chunk])) for at in range(0, len(scenes), chunk)])

"""What does a picture show? Analysis by synthesis: the renderer's own sprites, explained energy, no prompt.

Every sprite at both sizes, sharp and blurred, is composed on the measured background and compared at every
anchor within two pixels. What is chosen is the scene (a single thing, a shape, or a pair) whose templates
explain most of the picture's difference from its background.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from training.scenes import NONE, PAIR, PAIR_POSITIONS, SHAPE, SINGLE, Renderer, Scene
from training.vocabulary import NOUNS, PICTURE_SIZE, POSITIONS, SHAPE_COLOURS, SHAPES, SIZES

TEMPLATE_BLURS = (0.0, 0.8, 1.5)
REACH = 2
WINDOW = 40
# A thing may be paler or stronger than its sprite by this much and still be that thing.
GAINS = (0.6, 1.2)
LEAST_EXPLAINED = 0.5
# A second thing must explain this share of the foreground, or noise would count as one.
SECOND_THING_SHARE = 0.02
CHUNK = 32
CENTRE = list(POSITIONS).index("center")


class Reading(NamedTuple):
    """A scene read off a picture, and the share of the foreground's energy that it explains."""

    scene: Scene | None
    background: int
    explained: float


class Candidate(NamedTuple):
    """What one template stands for."""

    sprite: int
    colour: int
    size: int


def blur(pictures: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (n, c, h, w), edges repeated; sigma in pixels."""
    if sigma <= 0:
        return pictures
    radius = max(1, round(3.3 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=pictures.dtype, device=pictures.device)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    channels = pictures.shape[1]
    padded = F.pad(pictures, (radius,) * 4, mode="replicate")
    across = F.conv2d(padded, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(across, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


def _candidates() -> list[Candidate]:
    nouns = [Candidate(n, NONE, size) for size in range(len(SIZES)) for n in range(len(NOUNS))]
    shapes = [
        Candidate(len(NOUNS) + shape, colour, size)
        for size in range(len(SIZES))
        for shape in range(len(SHAPES))
        for colour in range(len(SHAPE_COLOURS))
    ]
    return nouns + shapes


class Reader:
    """Reads pictures; templates per background are made when first needed."""

    def __init__(self) -> None:
        self.renderer = Renderer()
        self.candidates = _candidates()
        self.sizes = torch.tensor([candidate.size for candidate in self.candidates])
        self.is_noun = torch.tensor([candidate.colour == NONE for candidate in self.candidates])
        self._templates = cache(self._make_templates)

    def __call__(self, pictures: Tensor) -> list[Reading]:
        """Pictures (n, 3, 64, 64) in -1..1."""
        pictures = (pictures.float().cpu() + 1).clamp(0, 2) / 2
        border = torch.cat(
            [
                pictures[..., :2, :].flatten(2),
                pictures[..., -2:, :].flatten(2),
                pictures[..., :2].flatten(2),
                pictures[..., -2:].flatten(2),
            ],
            2,
        )
        measured = border.median(2).values
        backgrounds = (measured[:, None] - self.renderer.backgrounds).norm(dim=2).argmin(1)
        groups: dict[int, list[int]] = defaultdict(list)
        for row, background in enumerate(backgrounds.tolist()):
            groups[background].append(row)
        readings: dict[int, Reading] = {}
        differences = pictures - measured[..., None, None]
        for background, rows in groups.items():
            for at in range(0, len(rows), CHUNK):
                part = rows[at : at + CHUNK]
                scores = self._explained(differences[part], background)
                for row, score in zip(part, scores, strict=True):
                    readings[row] = self._choose(score, differences[row], background)
        return [readings[row] for row in range(len(pictures))]

    def _make_templates(self, background: int) -> tuple[Tensor, Tensor]:
        """Differences from the background, (templates, pixels), and their energies; blurs outermost."""
        colour = self.renderer.backgrounds[background]
        rows = []
        for candidate in self.candidates:
            layer = self.renderer.layers[candidate.sprite, candidate.size, CENTRE]
            tint = 1.0 if candidate.colour == NONE else self.renderer.shape_colours[candidate.colour][:, None, None]
            rows.append(layer[:3] * tint - layer[3:] * colour[:, None, None])
        stack = torch.stack(rows)
        margin = (PICTURE_SIZE - WINDOW) // 2
        cut = slice(margin, PICTURE_SIZE - margin)
        templates = torch.cat([blur(stack, sigma)[..., cut, cut].flatten(1) for sigma in TEMPLATE_BLURS])
        return templates, templates.square().sum(1)

    def _explained(self, differences: Tensor, background: int) -> Tensor:
        """Energy each candidate explains at each anchor, best over shift, blur and gain: (n, anchors, candidates)."""
        templates, energies = self._templates(background)
        pad = WINDOW // 2
        padded = F.pad(differences, (pad,) * 4)
        shifts = range(-REACH, REACH + 1)
        patches = torch.stack(
            [
                padded[..., y + dy : y + dy + WINDOW, x + dx : x + dx + WINDOW].flatten(1)
                for x, y in POSITIONS.values()
                for dy in shifts
                for dx in shifts
            ],
            1,
        )
        match = patches @ templates.T
        gain = (match / energies).clamp(*GAINS)
        explained = 2 * gain * match - gain.square() * energies
        best = explained.unflatten(1, (len(POSITIONS), -1)).amax(2)
        return best.unflatten(2, (len(TEMPLATE_BLURS), -1)).amax(2)

    def _choose(self, score: Tensor, difference: Tensor, background: int) -> Reading:
        """The hypothesis, one thing or a pair, with the most explained energy."""
        energy = float(difference.square().sum())
        best, place, index = self._best_single(score)
        chosen = self.candidates[index]
        kind = SINGLE if chosen.colour == NONE else SHAPE
        first = chosen.sprite - (len(NOUNS) if kind == SHAPE else 0)
        scene = Scene(kind, first, NONE, NONE, chosen.size, place, background, chosen.colour)
        for relation, (one, other) in enumerate(PAIR_POSITIONS):
            for size in range(len(SIZES)):
                usable = torch.where(self.is_noun & (self.sizes == size), score, -torch.inf)
                a, b = usable[one].max(0), usable[other].max(0)
                if float(a.values + b.values) > best + SECOND_THING_SHARE * energy:
                    best = float(a.values + b.values)
                    nouns = (self.candidates[int(a.indices)].sprite, self.candidates[int(b.indices)].sprite)
                    scene = Scene(PAIR, *nouns, relation, size, NONE, background, NONE)
        share = best / energy if energy > 1.0 else 0.0
        return Reading(scene if share >= LEAST_EXPLAINED else None, background, share)

    @staticmethod
    def _best_single(score: Tensor) -> tuple[float, int, int]:
        flat = int(score.argmax())
        place, index = divmod(flat, score.shape[1])
        return float(score[place, index]), place, index


class Verdict(NamedTuple):
    """Which attributes of a scene a reading confirms; None where the scene has no such attribute."""

    noun: bool | None
    pair: bool | None
    shape: bool | None
    background: bool
    position: bool | None
    size: bool


def judge(scene: Scene, reading: Reading) -> Verdict:
    """Compare what was asked with what was read. A pair counts only with both nouns in order."""
    seen = reading.scene
    background = reading.background == scene.background
    if seen is None or seen.kind != scene.kind:
        placed = None if scene.kind == PAIR else bool(seen and seen.position == scene.position)
        size = bool(seen and seen.size == scene.size)
        wrong = [False if scene.kind == kind else None for kind in (SINGLE, PAIR, SHAPE)]
        return Verdict(wrong[0], wrong[1], wrong[2], background, placed, size)
    return Verdict(
        noun=seen.first == scene.first if scene.kind == SINGLE else None,
        pair=(seen.first, seen.second, seen.relation) == (scene.first, scene.second, scene.relation)
        if scene.kind == PAIR
        else None,
        shape=(seen.first, seen.colour) == (scene.first, scene.colour) if scene.kind == SHAPE else None,
        background=background,
        position=None if scene.kind == PAIR else seen.position == scene.position,
        size=seen.size == scene.size,
    )


def shares(scenes: Sequence[Scene], readings: Sequence[Reading]) -> dict[str, float]:
    """Per attribute, the percentage confirmed among the scenes that have it."""
    verdicts = [judge(scene, reading) for scene, reading in zip(scenes, readings, strict=True)]
    columns = {name: [getattr(v, name) for v in verdicts] for name in Verdict._fields}
    asked = {name: [value for value in column if value is not None] for name, column in columns.items()}
    return {name: 100 * sum(values) / len(values) for name, values in asked.items() if values}

"""The transformer's data: latents of every training scene, encoded once, and an endless caption stream."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLQwenImage
from torch import Tensor
from torch.utils.data import IterableDataset

from training.captions import free_caption
from training.scenes import (
    KINDS,
    PAIR,
    SHAPE,
    Renderer,
    Scene,
    all_seen_shapes,
    all_seen_singles,
    draw_seen_pairs,
)
from training.stills import encode_stills, latent_statistics, pack, stills
from training.tokenizer import CaptionTokens
from training.vocabulary import BACKGROUNDS, NOUNS, POSITIONS, SHAPE_COLOURS, SHAPES, SIZES

GROUP_BATCHES = 8
EMPTY_SHARE = 0.1
FOREGROUND_WEIGHT = 4.0
FOREGROUND_CHANGE = 0.25
# What the text encoder's last token must know; an extra class stands for "does not apply".
ATTRIBUTES = {
    "first": len(NOUNS) + len(SHAPES),
    "second": len(NOUNS) + 1,
    "position": len(POSITIONS) + 1,
    "size": len(SIZES),
    "background": len(BACKGROUNDS),
    "relation": 3,
    "colour": len(SHAPE_COLOURS) + 1,
}


def attributes_of(scene: Scene) -> list[int]:
    """Class indices in the order of ATTRIBUTES."""
    is_pair, is_shape = scene.kind == PAIR, scene.kind == SHAPE
    return [
        scene.first + (len(NOUNS) if is_shape else 0),
        scene.second if is_pair else len(NOUNS),
        len(POSITIONS) if is_pair else scene.position,
        scene.size,
        scene.background,
        scene.relation if is_pair else 2,
        scene.colour if is_shape else len(SHAPE_COLOURS),
    ]


@dataclass
class LatentTable:
    """All training scenes: latents as tokens (half precision), loss weights per token, attributes."""

    scenes: list[Scene]
    latents: Tensor
    weights: Tensor
    attributes: Tensor

    def to(self, device: torch.device | str) -> "LatentTable":
        return LatentTable(self.scenes, self.latents.to(device), self.weights.to(device), self.attributes.to(device))


@torch.no_grad()
def encode_scenes(autoencoder: AutoencoderKLQwenImage, renderer: Renderer, scenes: list[Scene]) -> Tensor:
    """Normalised latents as tokens."""
    mean, std = latent_statistics(autoencoder)
    parts = []
    with stills(autoencoder):
        for at in range(0, len(scenes), 128):
            latents = encode_stills(autoencoder, renderer(scenes[at : at + 128]))[0]
            parts.append(pack((latents - mean) / std).half())
    return torch.cat(parts)


@torch.no_grad()
def _encode_backgrounds(autoencoder: AutoencoderKLQwenImage, renderer: Renderer) -> Tensor:
    mean, std = latent_statistics(autoencoder)
    plain = (renderer.backgrounds * 2 - 1)[..., None, None].expand(-1, -1, 64, 64)
    with stills(autoencoder):
        return pack((encode_stills(autoencoder, plain)[0] - mean) / std)


def build_table(autoencoder: AutoencoderKLQwenImage, renderer: Renderer, seed: int, pairs: int) -> LatentTable:
    """Every seen single and shape, and `pairs` draws of the seen pairs."""
    scenes = [*all_seen_singles(), *draw_seen_pairs(random.Random(seed), pairs), *all_seen_shapes()]
    latents = encode_scenes(autoencoder, renderer, scenes)
    backgrounds = _encode_backgrounds(autoencoder, renderer)
    which = torch.tensor([scene.background for scene in scenes], device=latents.device)
    weights = torch.empty(latents.shape[:2], device=latents.device)
    for rows in torch.arange(len(scenes), device=latents.device).split(4096):
        change = (latents[rows].float() - backgrounds[which[rows]]).abs().mean(-1)
        weights[rows] = 1 + (FOREGROUND_WEIGHT - 1) * (change > FOREGROUND_CHANGE).float()
    return LatentTable(scenes, latents, weights, torch.tensor([attributes_of(s) for s in scenes]))


def cached_table(
    path: Path, autoencoder: AutoencoderKLQwenImage, renderer: Renderer, seed: int, pairs: int
) -> LatentTable:
    """The table, kept beside the checkpoints; made anew for another seed or size."""
    key = [seed, pairs, sum(float(p.detach().double().sum()) for p in autoencoder.parameters())]
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if saved["key"] == key:
            scenes = [Scene(*row) for row in saved["scenes"].tolist()]
            return LatentTable(scenes, saved["latents"], saved["weights"], saved["attributes"])
    table = build_table(autoencoder, renderer, seed, pairs)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"latents": table.latents, "weights": table.weights, "attributes": table.attributes}
    torch.save({"key": key, "scenes": torch.tensor(table.scenes), **tensors}, path)
    return table


@dataclass
class CaptionBatch:
    """Rows of the latent table with a caption each; `last` is the caption's last token, -1 if empty."""

    rows: Tensor
    ids: Tensor
    mask: Tensor | None
    last: Tensor

    def to(self, device: torch.device | str) -> "CaptionBatch":
        mask = None if self.mask is None else self.mask.to(device)
        return CaptionBatch(self.rows.to(device), self.ids.to(device), mask, self.last.to(device))


class Mix(NamedTuple):
    """How often each kind of scene (single, pair, shape) is drawn, and how often a caption names everything."""

    kinds: tuple[float, float, float] = (0.45, 0.40, 0.15)
    full: float = 0.4


# Which thing of a pair is meant by "right of" is the hard part of the text, and cheap to learn without pictures.
TEXT_MIX = Mix((0.2, 0.7, 0.1), 0.7)


class CaptionStream(IterableDataset[list[CaptionBatch]]):
    """Groups of batches of like-long captions. Group k depends on (seed, k) alone: resuming is starting at k,
    and loader processes that take turns give the same order as none."""

    def __init__(
        self,
        scenes: list[Scene],
        tokens: CaptionTokens,
        batch: int,
        seed: int,
        first_group: int = 0,
        stride: int = 1,
        mix: Mix = Mix(),  # noqa: B008 - immutable
    ) -> None:
        self.scenes, self.tokens, self.batch, self.seed = scenes, tokens, batch, seed
        self.first_group, self.stride, self.mix = first_group, stride, mix
        self.rows_of = [[row for row, scene in enumerate(scenes) if scene.kind == kind] for kind in KINDS]
        self.suffix_length = len(tokens.suffix)

    def __iter__(self) -> Iterator[list[CaptionBatch]]:
        worker = torch.utils.data.get_worker_info()
        turn, loaders = (worker.id, worker.num_workers) if worker else (0, 1)
        group = self.first_group + turn * self.stride
        while True:
            yield self.group(group)
            group += loaders * self.stride

    def group(self, index: int) -> list[CaptionBatch]:
        rng = random.Random(f"{self.seed}/{index}")
        empty = round(EMPTY_SHARE * self.batch)
        captioned = [self._draw(rng) for _ in range(GROUP_BATCHES * (self.batch - empty))]
        captioned.sort(key=lambda pair: len(pair[1]))
        size = self.batch - empty
        batches = [
            self._collate(captioned[at : at + size] + [(self._draw_row(rng), self.tokens("")) for _ in range(empty)])
            for at in range(0, len(captioned), size)
        ]
        rng.shuffle(batches)
        return batches

    def _draw_row(self, rng: random.Random) -> int:
        return rng.choice(self.rows_of[rng.choices(KINDS, self.mix.kinds)[0]])

    def _draw(self, rng: random.Random) -> tuple[int, list[int]]:
        row = self._draw_row(rng)
        caption = free_caption(rng, self.scenes[row], full=rng.random() < self.mix.full)
        return row, self.tokens(caption)

    def _collate(self, pairs: list[tuple[int, list[int]]]) -> CaptionBatch:
        ids, mask = self.tokens.batch([tokens for _, tokens in pairs])
        lengths = torch.tensor([len(tokens) for _, tokens in pairs])
        last = torch.where(lengths > self.suffix_length, lengths - 1, -1)
        return CaptionBatch(torch.tensor([row for row, _ in pairs]), ids, mask, last)

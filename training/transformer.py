"""Train the emoji transformer with its text encoder: `python -m training.transformer --minutes 100`.

It resumes from --work by itself; `--init FOLDER` starts from a shipped package instead, when there is no
checkpoint. The learning rate follows the elapsed share of --minutes or --samples.
"""

import argparse
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from torch import Tensor, multiprocessing, nn
from torch.utils.data import DataLoader
from transformers import Qwen2_5_VLForConditionalGeneration

from training.captioned_latents import (
    ATTRIBUTES,
    GROUP_BATCHES,
    TEXT_MIX,
    CaptionBatch,
    CaptionStream,
    LatentTable,
    cached_table,
)
from training.flow import build_transformer, predict
from training.half import has_fast_bfloat16, use_half_products
from training.muon import Muon
from training.runs import (
    Budget,
    MovingAverage,
    add_run_options,
    budget_of,
    load_checkpoint,
    save_checkpoint,
    warm_then_decay,
)
from training.scenes import Renderer
from training.text_encoder import WIDTH, build_text_encoder, encode_captions
from training.tokenizer import CaptionTokens, build_tokenizer

EMA_DECAY = 0.996
ATTRIBUTE_WEIGHT = 0.5
UNIFORM_SIGMA_SHARE = 0.1
WARM_UP_STEPS = 150
DECAY_FROM = 0.5
LOWEST_RATE = 0.02
SAVE_SECONDS = 120.0
REPORT_SECONDS = 60.0
VALIDATION_GROUP = 10**9


class Recipe(NamedTuple):
    """What a run may vary; part of its checkpoint."""

    width: int = 128
    layers: int = 6
    batch: int = 48
    seed: int = 0
    pairs: int = 40000
    text_steps: int = 1500
    muon_rate: float = 0.01
    adam_rate: float = 1.5e-3
    sigma_centre: float = 1.0


class Emoji(nn.Module):
    """The two models that train together, and the throw-away attribute heads."""

    prefix: Tensor

    def __init__(self, recipe: Recipe, tokens: CaptionTokens) -> None:
        super().__init__()
        torch.manual_seed(recipe.seed)
        self.transformer = build_transformer(recipe.width, recipe.layers)
        self.text_encoder = build_text_encoder(tokens.tokenizer)
        self.text_encoder.model.visual.requires_grad_(False)
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, count) for name, count in ATTRIBUTES.items()})
        self.register_buffer("prefix", tokens.prefix, persistent=False)

    def encode(self, ids: Tensor) -> Tensor:
        return encode_captions(self.text_encoder, self.prefix, ids)

    def shipped_parameters(self) -> list[nn.Parameter]:
        both = (*self.transformer.parameters(), *self.text_encoder.parameters())
        return [parameter for parameter in both if parameter.requires_grad]

    def load_package(self, folder: Path) -> None:
        transformer = QwenImageTransformer2DModel.from_pretrained(folder / "transformer")
        encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder")
        self.transformer.load_state_dict({k: v.float() for k, v in transformer.state_dict().items()})
        self.text_encoder.load_state_dict({k: v.float() for k, v in encoder.state_dict().items()})


def attribute_loss(model: Emoji, text: Tensor, batch: CaptionBatch, attributes: Tensor) -> Tensor:
    """Cross-entropy of every attribute, read from the caption's last token; empty captions are left out."""
    named = (batch.last >= 0).nonzero()[:, 0]
    last = text[named, batch.last[named]]
    losses = [F.cross_entropy(head(last), attributes[named, i]) for i, head in enumerate(model.heads.values())]
    return torch.stack(losses).sum()


def draw_sigmas(count: int, centre: float, generator: torch.Generator) -> Tensor:
    """Around `centre` in logits, one in ten uniform. 1.0 is mostly high noise, where what the picture shows is
    decided; less gives more of the training to crispness."""
    sigmas = torch.sigmoid(torch.randn(count, generator=generator) + centre)
    uniform = torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < UNIFORM_SIGMA_SHARE, uniform, sigmas)


class Losses(NamedTuple):
    """Flow matching, foreground-weighted; attributes summed over heads."""

    flow: Tensor
    attributes: Tensor


def batch_losses(model: Emoji, table: LatentTable, batch: CaptionBatch, seed: int, centre: float = 1.0) -> Losses:
    device = table.latents.device
    generator = torch.Generator().manual_seed(seed)
    sigmas = draw_sigmas(len(batch.rows), centre, generator).to(device)
    clean = table.latents[batch.rows].float()
    noise = torch.randn(clean.shape, generator=generator).to(device)
    text = model.encode(batch.ids)
    level = sigmas[:, None, None]
    velocity = predict(model.transformer, (1 - level) * clean + level * noise, sigmas, text, batch.mask)
    weights = table.weights[batch.rows]
    error = (velocity - (noise - clean)).square().mean(-1)
    flow = (error * weights).mean() / weights.mean()
    return Losses(flow, attribute_loss(model, text, batch, table.attributes[batch.rows]))


def optimizers_for(model: Emoji, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices; AdamW for modulation, embeddings, ends, biases and the text encoder."""
    muon = [
        parameter
        for name, parameter in model.transformer.transformer_blocks.named_parameters()
        if parameter.ndim == 2 and "_mod." not in name
    ]
    taken = {id(parameter) for parameter in muon}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": 0.01},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=recipe.adam_rate, betas=(0.9, 0.98), eps=1e-8, fused=True)
    for group in adam.param_groups:
        group["peak"] = recipe.adam_rate
    if recipe.muon_rate <= 0:
        adam.add_param_group({"params": muon, "weight_decay": 0.01, "peak": recipe.adam_rate})
        return [adam]
    matrices = Muon(muon, lr=recipe.muon_rate, weight_decay=0.01, half=has_fast_bfloat16())
    matrices.param_groups[0]["peak"] = recipe.muon_rate
    return [adam, matrices]


class Worker:
    """One process's share of the training: its own batches and optimizers on (perhaps shared) parameters."""

    def __init__(
        self, model: Emoji, table: LatentTable, recipe: Recipe, tokens: CaptionTokens, place: tuple[int, int]
    ) -> None:
        self.model, self.table, self.recipe, self.tokens = model, table, recipe, tokens
        self.index, self.count = place
        self.optimizers, self.step, self.warm_from = optimizers_for(model, recipe), 0, 0
        if table.latents.device.type == "cpu" and has_fast_bfloat16():
            use_half_products(model.transformer.transformer_blocks)

    def batches(self, loaders: int = 0) -> Iterator[CaptionBatch]:
        """From the current step on; the same whatever the number of loader processes."""
        turn, skip = divmod(self.step, GROUP_BATCHES)
        stream = CaptionStream(
            self.table.scenes,
            self.tokens,
            self.recipe.batch,
            self.recipe.seed,
            first_group=turn * self.count + self.index,
            stride=self.count,
        )
        device = self.table.latents.device
        for group in DataLoader(stream, batch_size=None, num_workers=loaders) if loaders else stream:
            for batch in group[skip:]:
                yield batch.to(device)
            skip = 0

    def train_step(self, batch: CaptionBatch, fraction: float) -> Losses:
        """One update; `fraction` is how much of the run has passed, which sets the learning rate."""
        factor = warm_then_decay(self.step - self.warm_from, fraction, WARM_UP_STEPS, DECAY_FROM, LOWEST_RATE)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.zero_grad(set_to_none=True)
        seed = self.recipe.seed * 10**9 + self.step * self.count + self.index
        losses = batch_losses(self.model, self.table, batch, seed, self.recipe.sigma_centre)
        (losses.flow + ATTRIBUTE_WEIGHT * losses.attributes).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        return Losses(losses.flow.detach(), losses.attributes.detach())


class Trainer:
    """The run's state: models, average, optimizers, data and clock."""

    def __init__(
        self,
        recipe: Recipe,
        budget: Budget,
        work: Path,
        device: str,
        autoencoder: AutoencoderKLQwenImage,
        workers: int = 1,
    ) -> None:
        self.recipe, self.budget, self.device = recipe, budget, device
        self.path = work / "transformer.pt"
        self.tokens = CaptionTokens(build_tokenizer())
        renderer = Renderer(device)
        self.table = cached_table(work / "latents.pt", autoencoder, renderer, recipe.seed, recipe.pairs).to(device)
        self.model = Emoji(recipe, self.tokens).to(device)
        self.worker = Worker(self.model, self.table, recipe, self.tokens, (0, workers))
        self.average = MovingAverage(self.model.shipped_parameters(), EMA_DECAY)

    def pretrain_text(self) -> None:
        """Teach the text encoder the attributes alone: cheap, and the transformer starts on a good text."""
        parameters = [*self.model.text_encoder.parameters(), *self.model.heads.parameters()]
        optimizer = torch.optim.AdamW(
            [p for p in parameters if p.requires_grad], lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01
        )
        stream = CaptionStream(self.table.scenes, self.tokens, 64, self.recipe.seed + 1, mix=TEXT_MIX)
        batches = (batch.to(self.device) for group in stream for batch in group)
        for step in range(self.recipe.text_steps):
            share = step / self.recipe.text_steps
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * warm_then_decay(step, share, 50, DECAY_FROM, 0.1)
            batch = next(batches)
            loss = attribute_loss(self.model, self.model.encode(batch.ids), batch, self.table.attributes[batch.rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if step % 200 == 199:
                print(f"text encoder: step {step + 1}  attributes {float(loss.detach()):.3f}", flush=True)
        self.average = MovingAverage(self.model.shipped_parameters(), EMA_DECAY)
        self.budget.pause()

    def train_step(self, batch: CaptionBatch) -> Losses:
        losses = self.worker.train_step(batch, self.budget.fraction)
        self.average.update(self.worker.step)
        self.budget.tick(len(batch.rows))
        return losses

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Of the averaged model on fixed captions and noise: what two runs are compared by."""
        self.average.swap()
        stream = CaptionStream(self.table.scenes, self.tokens, 64, self.recipe.seed)
        batches = [batch.to(self.device) for batch in stream.group(VALIDATION_GROUP)]
        losses = [batch_losses(self.model, self.table, b, seed=i).flow for i, b in enumerate(batches)]
        self.average.swap()
        self.budget.pause()
        return float(torch.stack(losses).mean())

    def save(self) -> None:
        parts: dict[str, Any] = {
            "recipe": self.recipe._asdict(),
            "model": self.model.state_dict(),
            "average": self.average.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.worker.optimizers],
        }
        save_checkpoint(self.path, self.budget, self.worker.step, random.Random(0), parts)
        self.budget.pause()

    def resume(self) -> None:
        state = load_checkpoint(self.path, self.budget, random.Random(0))
        self.worker.step = state["step"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.worker.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for average, saved in zip(self.average.average, state["average"], strict=True):
            average.copy_(saved)
        self.budget.pause()


def load_autoencoder(folder: Path, device: str) -> AutoencoderKLQwenImage:
    model = AutoencoderKLQwenImage.from_pretrained(folder, dtype=torch.float32)
    nn.Module.to(model, device)
    return model.eval()


def prepare(arguments: argparse.Namespace) -> Trainer:
    """Resume from the work folder, else start from a package, else from nothing."""
    recipe = Recipe(**{name: getattr(arguments, name) for name in Recipe._fields})
    folder = arguments.work / "autoencoder"
    if not folder.exists():
        if arguments.init is None:
            raise SystemExit("no autoencoder in --work: run training.autoencoder first, or give --init")
        folder = arguments.init / "vae"
    autoencoder = load_autoencoder(folder, arguments.device)
    trainer = Trainer(recipe, budget_of(arguments), arguments.work, arguments.device, autoencoder, arguments.workers)
    if trainer.path.exists() and not arguments.fresh:
        trainer.resume()
        if arguments.teach_text:
            trainer.pretrain_text()
    elif arguments.init:
        trainer.model.load_package(arguments.init)
        trainer.average = MovingAverage(trainer.model.shipped_parameters(), EMA_DECAY)
    else:
        trainer.pretrain_text()
    return trainer


@dataclass
class SharedClock:
    """What the first process tells its helpers (how much of the run has passed) and they tell it (samples)."""

    fraction: Tensor
    helped: Tensor

    @classmethod
    def start(cls, helpers: int, fraction: float) -> "SharedClock":
        return cls(torch.tensor([fraction]).share_memory_(), torch.zeros(helpers, dtype=torch.long).share_memory_())


def help_training(
    model: Emoji, table: LatentTable, recipe: Recipe, place: tuple[int, int], step: int, clock: SharedClock
) -> None:
    """A helper's process: updates the shared parameters in place, without locks, until the run is over."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    worker = Worker(model, table, recipe, CaptionTokens(build_tokenizer()), place)
    # Its momentum starts at nothing, also when the run is a resumed one.
    worker.step = worker.warm_from = step
    batches = worker.batches()
    parent = os.getppid()
    while (fraction := float(clock.fraction)) < 1.0 and os.getppid() == parent:
        batch = next(batches)
        worker.train_step(batch, fraction)
        clock.helped[place[0] - 1] += len(batch.rows)


def start_helpers(trainer: Trainer, workers: int) -> SharedClock:
    """One single-threaded process per further core: on a shared machine two threads wait for the slower one
    at every operation, two processes never wait. Gradients are at most a step old, which training tolerates."""
    clock = SharedClock.start(workers - 1, trainer.budget.fraction)
    trainer.model.share_memory()
    table = trainer.table
    for tensor in (table.latents, table.weights, table.attributes):
        tensor.share_memory_()
    for index in range(1, workers):
        shared = (trainer.model, table, trainer.recipe, (index, workers), trainer.worker.step, clock)
        multiprocessing.get_context("spawn").Process(target=help_training, args=shared, daemon=True).start()
    return clock


def run(trainer: Trainer, clock: SharedClock, loaders: int = 0) -> None:
    """Train until the budget is spent, reporting and saving on the way."""
    budget, flow, attributes = trainer.budget, 0.0, 0.0
    saved = reported = budget.elapsed
    counted, begun = 0, (budget.seen, budget.elapsed)
    batches = trainer.worker.batches(loaders)
    budget.pause()
    while not budget.done:
        losses = trainer.train_step(next(batches))
        helped = int(clock.helped.sum())
        budget.seen, counted = budget.seen + helped - counted, helped
        clock.fraction.fill_(min(budget.fraction, 0.9999))
        keep = min(0.99, trainer.worker.step / (trainer.worker.step + 10))
        flow = keep * flow + (1 - keep) * float(losses.flow)
        attributes = keep * attributes + (1 - keep) * float(losses.attributes)
        if budget.elapsed - reported > REPORT_SECONDS:
            reported = budget.elapsed
            rate = (budget.seen - begun[0]) / (budget.elapsed - begun[1])
            report(trainer, rate, flow, attributes)
        if budget.elapsed - saved > SAVE_SECONDS:
            saved = budget.elapsed
            trainer.save()
    clock.fraction.fill_(1.0)
    trainer.save()


def report(trainer: Trainer, rate: float, flow: float, attributes: float) -> None:
    figures = {
        "seconds": round(trainer.budget.elapsed),
        "samples": trainer.budget.seen,
        "per_second": round(rate),
        "loss": round(flow, 4),
        "attributes": round(attributes, 3),
        "validation": round(trainer.validation_loss(), 4),
    }
    print(json.dumps(figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser, minutes=100)
    parser.add_argument("--init", type=Path, default=None, help="a package folder to start from")
    parser.add_argument(
        "--workers", type=int, default=1, help="single-threaded processes on shared parameters; CPU only"
    )
    parser.add_argument("--teach-text", action="store_true", help="after resuming, train the text encoder alone first")
    parser.add_argument("--loaders", type=int, default=0, help="caption processes; a GPU needs about 8")
    for name, kind in Recipe.__annotations__.items():
        if name != "seed":
            flag = "--" + name.replace("_", "-")
            parser.add_argument(flag, type=kind, default=Recipe._field_defaults[name])
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.workers > 1 else arguments.threads)
    torch.set_flush_denormal(True)
    trainer = prepare(arguments)
    run(trainer, start_helpers(trainer, arguments.workers), arguments.loaders)


if __name__ == "__main__":
    main()

"""Train the emoji autoencoder: `python -m training.autoencoder --minutes 12`."""

import argparse
import math
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from torch import Tensor, nn

from training.runs import (
    Budget,
    MovingAverage,
    add_run_options,
    budget_of,
    load_checkpoint,
    save_checkpoint,
)
from training.scenes import PAIR, SHAPE, SINGLE, Renderer, draw_scene, render_bytes
from training.stills import (
    build_autoencoder,
    clear_unused_taps,
    decode_stills,
    encode_stills,
    initialise,
    stills,
)

BATCH = 16
LEARNING_RATE = 4e-3
WARM_UP_STEPS = 100
LATENT_NOISE = 0.1
EMA_DECAY = 0.998
POOL_SCENES = 12288
CHECK_SCENES = 512
SAVE_SECONDS = 60.0
KIND_WEIGHTS = {SINGLE: 0.5, PAIR: 0.4, SHAPE: 0.1}


def draw_pool(rng: random.Random, renderer: Renderer, count: int, held_out: bool) -> Tensor:
    kinds = rng.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()), k=count)
    return render_bytes(renderer, [draw_scene(rng, kind, held_out) for kind in kinds])


def jitter_colour(pictures: Tensor, rng: random.Random) -> Tensor:
    """One batch in ten in slightly other colours, so that colour stays linear in the latents."""
    if rng.random() > 0.1:
        return pictures
    gain = 1 + 0.1 * torch.randn(len(pictures), 3, 1, 1, device=pictures.device)
    shift = 0.1 * torch.randn(len(pictures), 3, 1, 1, device=pictures.device)
    return (pictures * gain + shift).clamp(-1, 1)


def reconstruction_loss(decoded: Tensor, pictures: Tensor) -> Tensor:
    """L1, squared and gradient error, three times as heavy near the foreground."""
    background = pictures[:, :, :1, :1]
    foreground = ((pictures - background).abs().amax(1, keepdim=True) > 0.04).float()
    weight = 1 + 2 * F.max_pool2d(foreground, 5, 1, 2)
    error = decoded - pictures
    across, down = error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]
    gradient = (across.abs() * weight[..., 1:]).mean() + (down.abs() * weight[..., 1:, :]).mean()
    return (error.abs() * weight).mean() + 2 * (error**2 * weight).mean() + 0.5 * gradient


def step_loss(autoencoder: AutoencoderKLQwenImage, pictures: Tensor) -> Tensor:
    mean, log_variance = encode_stills(autoencoder, pictures)
    decoded = decode_stills(autoencoder, mean + LATENT_NOISE * torch.randn_like(mean))
    regularisation = 1e-4 * (mean**2).mean() + 1e-3 * ((log_variance + 4) ** 2).mean()
    return reconstruction_loss(decoded, pictures) + regularisation


@torch.no_grad()
def reconstruct(autoencoder: AutoencoderKLQwenImage, pictures: Tensor, chunk: int = 64) -> Tensor:
    """Pictures through both halves, in -1..1."""
    with stills(autoencoder):
        parts = [decode_stills(autoencoder, encode_stills(autoencoder, x)[0]) for x in pictures.split(chunk)]
    return torch.cat(parts).clamp(-1, 1)


def psnr(reconstructed: Tensor, pictures: Tensor) -> float:
    """Mean over pictures, dB; the range is 2."""
    error = ((reconstructed - pictures) ** 2).mean((1, 2, 3)) / 4
    return float((-10 * error.clamp(min=1e-10).log10()).mean())


@torch.no_grad()
def measure_latents(autoencoder: AutoencoderKLQwenImage, pool: Tensor) -> tuple[list[float], list[float]]:
    """Per-channel mean and spread over rendered scenes, for the configuration."""
    with stills(autoencoder):
        latents = torch.cat([encode_stills(autoencoder, as_floats(x))[0] for x in pool[:2048].split(128)])
    return latents.mean((0, 2, 3)).tolist(), latents.std((0, 2, 3)).tolist()


def as_floats(pictures: Tensor) -> Tensor:
    return pictures.float() / 127.5 - 1


class Trainer:
    """The run's state: model, average, optimizer, data and clock."""

    def __init__(self, budget: Budget, work: Path, device: str, seed: int, pool_scenes: int = POOL_SCENES) -> None:
        torch.manual_seed(seed)
        self.budget, self.path, self.device, self.step = budget, work / "autoencoder.pt", device, 0
        renderer = Renderer(device)
        data_rng = random.Random(seed)
        self.pool = draw_pool(data_rng, renderer, pool_scenes, held_out=False)
        self.check = as_floats(draw_pool(data_rng, renderer, min(CHECK_SCENES, pool_scenes), held_out=True))
        self.rng = random.Random(seed + 1)
        self.model = build_autoencoder()
        initialise(self.model)
        nn.Module.to(self.model, device)
        self.average = MovingAverage(self.model.parameters(), EMA_DECAY)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4
        )

    def train_step(self) -> float:
        warm = min(1.0, (self.step + 1) / WARM_UP_STEPS)
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warm * (0.5 + 0.5 * math.cos(math.pi * self.budget.fraction)) + 1e-5
        rows = torch.randint(0, len(self.pool), (BATCH,), device=self.device)
        with stills(self.model):
            loss = step_loss(self.model, jitter_colour(as_floats(self.pool[rows]), self.rng))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.average.update(self.step)
        self.step += 1
        self.budget.tick(BATCH)
        return float(loss.detach())

    def check_psnr(self) -> float:
        """Of the averaged model on held-out scenes."""
        self.average.swap()
        quality = psnr(reconstruct(self.model, self.check), self.check)
        self.average.swap()
        self.budget.pause()
        return quality

    def save(self) -> None:
        parts: dict[str, Any] = {
            "model": self.model.state_dict(),
            "average": self.average.average,
            "optimizer": self.optimizer.state_dict(),
        }
        save_checkpoint(self.path, self.budget, self.step, self.rng, parts)
        self.budget.pause()

    def resume(self) -> None:
        state = load_checkpoint(self.path, self.budget, self.rng)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for average, saved in zip(self.average.average, state["average"], strict=True):
            average.copy_(saved)

    def finish(self, folder: Path) -> float:
        """Save the averaged model, with its latents' statistics, as a diffusers folder."""
        self.average.swap()
        quality = psnr(reconstruct(self.model, self.check), self.check)
        mean, std = measure_latents(self.model, self.pool)
        clear_unused_taps(self.model)
        final = build_autoencoder(mean, std)
        final.load_state_dict(self.model.state_dict())
        final.save_pretrained(folder)
        self.average.swap()
        return quality


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_options(parser, minutes=12)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    trainer = Trainer(budget_of(arguments), arguments.work, arguments.device, arguments.seed)
    if trainer.path.exists() and not arguments.fresh:
        trainer.resume()
    trainer.budget.pause()
    budget, saved = trainer.budget, trainer.budget.elapsed
    while not budget.done:
        loss = trainer.train_step()
        if budget.elapsed - saved > SAVE_SECONDS:
            saved = budget.elapsed
            trainer.save()
            rate = budget.seen / budget.elapsed
            print(
                f"{budget.elapsed:.0f} s  samples {budget.seen}  loss {loss:.4f}  "
                f"held-out {trainer.check_psnr():.2f} dB  {rate:.0f}/s",
                flush=True,
            )
    trainer.save()
    print(f"held-out scenes {trainer.finish(arguments.work / 'autoencoder'):.2f} dB")


if __name__ == "__main__":
    main()

"""Both trainers resume: an interrupted run ends exactly where an uninterrupted one does."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage

from training import autoencoder, transformer
from training.muon import orthogonalise
from training.runs import Budget, warm_then_decay
from training.stills import (
    build_autoencoder,
    decode_stills,
    encode_stills,
    initialise,
    pack,
    stills,
    unpack,
)


@pytest.fixture(scope="module")
def untrained() -> AutoencoderKLQwenImage:
    torch.manual_seed(0)
    model = build_autoencoder()
    initialise(model)
    return model.eval()


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_autoencoder_resumes(tmp_path: Path) -> None:
    def trainer(work: Path) -> autoencoder.Trainer:
        return autoencoder.Trainer(Budget(None, 64), work, "cpu", seed=0, pool_scenes=16)

    whole = trainer(tmp_path / "whole")
    for _ in range(2):
        whole.train_step()
    first = trainer(tmp_path / "parts")
    first.train_step()
    first.save()
    second = trainer(tmp_path / "parts")
    second.resume()
    second.train_step()
    assert second.budget.seen == whole.budget.seen
    assert same(whole.model, second.model)


def small_trainer(work: Path, model: AutoencoderKLQwenImage) -> transformer.Trainer:
    recipe = transformer.Recipe(width=64, layers=1, batch=4, pairs=20, text_steps=1)
    return transformer.Trainer(recipe, Budget(None, 64), work, "cpu", model)


def advance(trainer: transformer.Trainer, steps: int) -> None:
    batches = trainer.worker.batches()
    for _ in range(steps):
        trainer.train_step(next(batches))


@pytest.fixture
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of a few scenes of each kind, so that encoding it takes no time."""
    from training import captioned_latents

    singles, shapes = captioned_latents.all_seen_singles()[:20], captioned_latents.all_seen_shapes()[:20]
    monkeypatch.setattr(captioned_latents, "all_seen_singles", lambda: singles)
    monkeypatch.setattr(captioned_latents, "all_seen_shapes", lambda: shapes)


@pytest.mark.usefixtures("few_scenes")
def test_transformer_resumes(tmp_path: Path, untrained: AutoencoderKLQwenImage) -> None:
    whole = small_trainer(tmp_path / "whole", untrained)
    advance(whole, 3)
    first = small_trainer(tmp_path / "parts", untrained)
    advance(first, 1)
    first.save()
    second = small_trainer(tmp_path / "parts", untrained)
    second.resume()
    advance(second, 2)
    assert second.budget.seen == whole.budget.seen == 12
    assert same(whole.model, second.model)
    assert all(map(torch.equal, whole.average.average, second.average.average))


@pytest.mark.slow
def test_helpers_train_with_the_first_process(tmp_path: Path, untrained: AutoencoderKLQwenImage) -> None:
    untrained.save_pretrained(tmp_path / "autoencoder")
    tiny = "--width 64 --layers 1 --batch 4 --pairs 20 --text-steps 1"
    command = f"{sys.executable} -m training.transformer --work {tmp_path} --workers 2 --samples 256 {tiny}"
    subprocess.run(command.split(), check=True, timeout=300)
    state = torch.load(tmp_path / "transformer.pt", weights_only=False)
    assert state["seen"] >= 256
    assert state["step"] * 4 < state["seen"], "the helper has done nothing"


def test_stills_equal_the_stock_decoder(untrained: AutoencoderKLQwenImage) -> None:
    pictures = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        stock_mean = untrained.encode(pictures.unsqueeze(2), return_dict=False)[0].mean
        stock = untrained.decode(stock_mean, return_dict=False)[0][:, :, 0]
        with stills(untrained):
            mean = encode_stills(untrained, pictures)[0]
            flat = decode_stills(untrained, mean).clamp(-1, 1)
    assert torch.allclose(stock_mean[:, :, 0], mean, atol=1e-4)
    assert torch.allclose(stock, flat, atol=1e-4)
    assert all("forward" not in vars(module) for module in untrained.modules())


def test_packing_is_undone() -> None:
    latents = torch.randn(2, 8, 16, 16)
    assert torch.equal(unpack(pack(latents)), latents)


def test_muon_orthogonalises() -> None:
    singular = torch.linalg.svdvals(orthogonalise(torch.randn(3, 16, 32), steps=5))
    assert float(singular.min()) > 0.3
    assert float(singular.max()) < 1.3


def test_learning_rate_schedule() -> None:
    def rate(step: int, fraction: float) -> float:
        return warm_then_decay(step, fraction, warm_up=10, decay_from=0.5, floor=0.1)

    assert rate(0, 0.0) == pytest.approx(0.1)
    assert rate(100, 0.4) == 1
    assert rate(100, 0.75) == pytest.approx(0.5)
    assert rate(100, 1.0) == pytest.approx(0.1)

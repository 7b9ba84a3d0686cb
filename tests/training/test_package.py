"""The shipped model: its size, its papers, and that it draws what is asked."""

import json

import torch
from transformers import Qwen2Tokenizer

from training.captions import known_words
from training.grade import PromptSet, gates_of, generate_set, load_generator, prompt_sets
from training.package import PACKAGE, folder_bytes
from training.reader import Reader, shares
from training.tokenizer import TEMPLATE


def test_size() -> None:
    assert folder_bytes(PACKAGE) <= 12e6


def test_papers() -> None:
    defaults = json.loads((PACKAGE / "triptych.json").read_text(encoding="utf-8"))
    assert (defaults["width"], defaults["height"], defaults["num_inference_steps"]) == (64, 64, 8)
    assert json.loads((PACKAGE / "vocabulary.json").read_text(encoding="utf-8")) == known_words()
    assert "MIT License" in (PACKAGE / "NOTICE").read_text(encoding="utf-8")
    assert (PACKAGE / "README.md").stat().st_size > 1000


def test_shipped_tokenizer() -> None:
    tokenizer = Qwen2Tokenizer.from_pretrained(PACKAGE / "tokenizer")
    assert len(tokenizer(TEMPLATE.split("{}")[0]).input_ids) == 34
    assert [word for word in known_words() if len(tokenizer(" " + word).input_ids) != 1] == []


def test_pictures_show_what_is_asked() -> None:
    """24 prompts: a smoke test a few points under what `training.grade` demands of 256."""
    sets = prompt_sets(16)
    scenes = sets["seen"].scenes[:12] + sets["pairs"].scenes[:8] + sets["shapes"].scenes[:4]
    pictures = generate_set(load_generator(PACKAGE), PromptSet(scenes).prompts)
    figures = shares(scenes, Reader()(pictures))
    assert figures["background"] >= 95
    assert figures["position"] >= 93
    assert figures["noun"] >= 91
    assert figures["pair"] >= 87
    assert figures["shape"] >= 75


def test_a_picture_does_not_depend_on_its_batch() -> None:
    generate = load_generator(PACKAGE, steps=2)
    prompts = ["a big cat on the left on a blue background", "a small red ring at the top on a white background"]
    together = generate(prompts, [1, 2])
    alone = torch.cat([generate([prompt], [seed]) for prompt, seed in zip(prompts, (1, 2), strict=True)])
    assert torch.allclose(together, alone, atol=2e-3)


def test_gates_follow_their_goals() -> None:
    figures = {
        "seen: noun": 97.0,
        "seen: background": 100.0,
        "seen: position": 98.5,
        "held-out: noun": 91.0,
        "pairs: pair": 83.0,
        "shapes: shape": 81.0,
        "free: noun": 94.0,
        "shuffled: noun": 1.0,
    }
    missed = [gate.what for gate in gates_of(figures) if not gate.reaches(gate.target)]
    assert missed == ["held-out combinations, noun, %"]
    assert all(gate.reaches(gate.floor) for gate in gates_of(figures))

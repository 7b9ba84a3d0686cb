"""Grade an embedded model by what its pictures show: `python -m training.grade --model emoji`.

Prints one row per gate, `what | figure | target | met`, and exits with 1 if a target is missed.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImagePipeline
from torch import Tensor

from training.captions import free_caption, plain_caption
from training.flow import GUIDANCE, STEPS
from training.package import PACKAGE
from training.reader import Reader, shares
from training.scenes import PAIR, SHAPE, SINGLE, Scene, draw_scene
from training.vocabulary import PICTURE_SIZE

Generate = Callable[[Sequence[str], Sequence[int]], Tensor]
MODELS = {"emoji": PACKAGE}
PROMPTS = 256
QUICK_PROMPTS = 32
BATCH = 32
SET_SEED = 2024
FIRST_PICTURE_SEED = 1000
SECONDS_PROMPT = "a big cat on the left on a blue background"


@dataclass(frozen=True)
class Gate:
    """A figure with its goal; `floor` is the least at which the model may ship at all."""

    what: str
    figure: float
    target: float
    floor: float
    at_most: bool = False

    def reaches(self, bound: float) -> bool:
        return self.figure <= bound if self.at_most else self.figure >= bound

    def row(self) -> str:
        sign = "≤" if self.at_most else "≥"
        met = "yes" if self.reaches(self.target) else "no"
        return f"{self.what} | {self.figure:.2f} | {sign} {self.target:g} | {met}"


@dataclass
class PromptSet:
    """Scenes and the prompts that ask for them."""

    scenes: list[Scene]
    prompts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompts = self.prompts or [plain_caption(scene) for scene in self.scenes]


def prompt_sets(count: int) -> dict[str, PromptSet]:
    """The fixed sets. Pairs and shapes are one quarter held-out combinations; the free set asks for the
    scenes of the seen set in other words."""
    rng = random.Random(SET_SEED)
    seen = [draw_scene(rng, SINGLE) for _ in range(count)]
    sets = {
        "seen": PromptSet(seen),
        "held-out": PromptSet([draw_scene(rng, SINGLE, held_out=True) for _ in range(count)]),
        "pairs": PromptSet([draw_scene(rng, PAIR, held_out=i % 4 == 3) for i in range(count)]),
        "shapes": PromptSet([draw_scene(rng, SHAPE, held_out=i % 4 == 3) for i in range(count)]),
    }
    sets["free"] = PromptSet(seen, [free_caption(rng, scene, full=True) for scene in seen])
    return sets


def load_generator(folder: Path, steps: int = STEPS, guidance: float = GUIDANCE) -> Generate:
    """Pictures from the stock pipeline, (n, 3, 64, 64) in -1..1, one seed each."""
    pipeline = QwenImagePipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        result: Any = pipeline(
            prompt=list(prompts),
            negative_prompt=[""] * len(prompts),
            true_cfg_scale=guidance,
            num_inference_steps=steps,
            height=PICTURE_SIZE,
            width=PICTURE_SIZE,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
        )
        return result.images * 2 - 1

    return generate


def generate_set(generate: Generate, prompts: Sequence[str]) -> Tensor:
    """In batches of prompts that are about as long, each with the seed of its place in the set."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row].split()))
    pictures: dict[int, Tensor] = {}
    for at in range(0, len(order), BATCH):
        rows = order[at : at + BATCH]
        made = generate([prompts[row] for row in rows], [FIRST_PICTURE_SEED + row for row in rows])
        pictures.update(zip(rows, made, strict=True))
    return torch.stack([pictures[row] for row in range(len(prompts))])


def measure(generate: Generate, count: int) -> dict[str, float]:
    """Percentages per set and attribute, and the shuffled-prompt control."""
    reader, figures = Reader(), {"prompts": float(count)}
    for name, questions in prompt_sets(count).items():
        readings = reader(generate_set(generate, questions.prompts))
        for attribute, share in shares(questions.scenes, readings).items():
            figures[f"{name}: {attribute}"] = share
        figures[f"{name}: explained energy"] = 100 * statistics.fmean(r.explained for r in readings)
        if name == "seen":
            moved = questions.scenes[1:] + questions.scenes[:1]
            figures["shuffled: noun"] = shares(moved, readings)["noun"]
    return figures


def cpu_seconds(generate: Generate, repeats: int = 5) -> float:
    """Of one picture, all threads together: the median."""
    generate([SECONDS_PROMPT], [0])
    taken = []
    for seed in range(repeats):
        start = time.process_time()
        generate([SECONDS_PROMPT], [seed])
        taken.append(time.process_time() - start)
    return sorted(taken)[repeats // 2]


def gates_of(figures: dict[str, float]) -> list[Gate]:
    return [
        Gate("seen scenes, noun, %", figures["seen: noun"], 96, 92),
        Gate("seen scenes, background, %", figures["seen: background"], 99, 98),
        Gate("seen scenes, position, %", figures["seen: position"], 98, 97),
        Gate("held-out combinations, noun, %", figures["held-out: noun"], 92, 86),
        Gate("pairs, both nouns and order, %", figures["pairs: pair"], 82, 68),
        Gate("shapes with colour, %", figures["shapes: shape"], 80, 65),
        Gate(
            "free word order, noun, points under the templates",
            figures["seen: noun"] - figures["free: noun"],
            4,
            4,
            at_most=True,
        ),
        Gate("shuffled prompts, noun, %", figures["shuffled: noun"], 4.6, 4.6, at_most=True),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="emoji")
    parser.add_argument("--folder", type=Path, default=None, help="grade this folder instead of the shipped one")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="prompts per set")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_PROMPTS} prompts per set")
    parser.add_argument("--floor", action="store_true", help="exit by the hard floors instead of the goals")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None, help="also write all figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = arguments.folder or MODELS[arguments.model]
    generate = load_generator(folder, arguments.steps, arguments.guidance)
    figures = measure(generate, QUICK_PROMPTS if arguments.quick else arguments.prompts)
    figures["CPU seconds a picture"] = cpu_seconds(generate)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    gates = [*gates_of(figures), Gate("CPU seconds a picture", figures["CPU seconds a picture"], 0.5, 1.0, True)]
    print("what | figure | target | met")
    for gate in gates:
        print(gate.row())
    missed = [g for g in gates if not g.reaches(g.floor if arguments.floor else g.target)]
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()

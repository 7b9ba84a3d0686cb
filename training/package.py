"""Put a trained model together as a diffusers folder: `python -m training.package`."""

import argparse
import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

from training.captions import known_words
from training.flow import GUIDANCE, SHIFT, STEPS
from training.model_card import NOTICE, model_card
from training.runs import DEFAULT_WORK
from training.tokenizer import CaptionTokens, build_tokenizer
from training.transformer import Emoji, Recipe, load_autoencoder
from training.vocabulary import PICTURE_SIZE

PACKAGE = Path(__file__).parents[1] / "src" / "triptych" / "model" / "embedded" / "emoji"
DEFAULTS = {
    "width": PICTURE_SIZE,
    "height": PICTURE_SIZE,
    "num_inference_steps": STEPS,
    "guidance_scale": GUIDANCE,
    "closed_vocabulary": True,
}


@torch.no_grad()
def trained_model(checkpoint: Path, tokens: CaptionTokens) -> Emoji:
    """The averaged parameters of a checkpoint of ours."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=False)
    model = Emoji(Recipe(**state["recipe"]), tokens)
    model.load_state_dict(state["model"])
    for parameter, average in zip(model.shipped_parameters(), state["average"], strict=True):
        parameter.copy_(average)
    return model.eval()


def build_pipeline(work: Path) -> QwenImagePipeline:
    """Stock classes throughout, in half precision."""
    tokens = CaptionTokens(build_tokenizer())
    model = trained_model(work / "transformer.pt", tokens)
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT, use_dynamic_shifting=False),
        vae=load_autoencoder(work / "autoencoder", "cpu"),
        text_encoder=model.text_encoder,
        tokenizer=tokens.tokenizer,
        transformer=model.transformer,
    )
    return pipeline.to(torch.float16)


def write_papers(folder: Path, grades: dict[str, float] | None, samples: int) -> None:
    """Defaults, known words, licence notice and, with grades, the model card."""
    (folder / "triptych.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n", encoding="utf-8")
    words = json.dumps(known_words(), indent=0)
    (folder / "vocabulary.json").write_text(words + "\n", encoding="utf-8")
    (folder / "NOTICE").write_text(NOTICE, encoding="utf-8")
    (folder / "README.md").write_text(model_card(grades, samples), encoding="utf-8")


def forget_origins(folder: Path) -> None:
    """Drops the paths that diffusers notes of where a component was loaded from: they mean nothing elsewhere."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="folder of checkpoints")
    parser.add_argument("--folder", type=Path, default=PACKAGE, help="where the package goes")
    parser.add_argument("--grades", type=Path, default=None, help="figures written by training.grade --json")
    parser.add_argument("--papers-only", action="store_true", help="rewrite the card, keep the weights")
    arguments = parser.parse_args()
    state = torch.load(arguments.work / "transformer.pt", map_location="cpu", weights_only=False, mmap=True)
    if not arguments.papers_only:
        build_pipeline(arguments.work).save_pretrained(arguments.folder)
        for path in arguments.folder.rglob("*.safetensors"):
            path.chmod(0o644)
        forget_origins(arguments.folder)
    grades = json.loads(arguments.grades.read_text(encoding="utf-8")) if arguments.grades else None
    write_papers(arguments.folder, grades, state["seen"])
    print(f"{arguments.folder.name}: {folder_bytes(arguments.folder) / 1e6:.2f} MB, {state['seen']} samples")


if __name__ == "__main__":
    main()

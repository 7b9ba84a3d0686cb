"""Draw the contact sheet of the shipped model: `python -m training.sheet`."""

import argparse
import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from training.captions import plain_caption
from training.grade import FIRST_PICTURE_SEED, MODELS, generate_set, load_generator
from training.scenes import PAIR, SHAPE, SINGLE, Scene, draw_scene, to_bytes
from training.vocabulary import PICTURE_SIZE

SHEET = Path(__file__).parents[1] / "docs" / "images" / "emoji-contact-sheet.png"
COLUMNS, ROWS = 8, 6
SCALE, MARGIN, CAPTION_HEIGHT = 2, 6, 26
SHEET_SEED = 7


def sheet_scenes() -> list[Scene]:
    """Fixed, not chosen by eye: half single things, then pairs and shapes, a quarter of each held out."""
    rng = random.Random(SHEET_SEED)
    kinds = [SINGLE] * 24 + [PAIR] * 16 + [SHAPE] * 8
    return [draw_scene(rng, kind, held_out=i % 4 == 3) for i, kind in enumerate(kinds)]


def _wrapped(text: str, width: int) -> str:
    """At most two lines of about `width` characters."""
    words, first = text.split(), ""
    while words and len(first) + len(words[0]) < width:
        first += words.pop(0) + " "
    return first.strip() + "\n" + " ".join(words)


def draw_sheet(pictures: Tensor, prompts: list[str]) -> Image.Image:
    """Pictures at twice their size, nearest neighbour, each with its prompt."""
    side = PICTURE_SIZE * SCALE
    cell_width, cell_height = side + MARGIN, side + CAPTION_HEIGHT + MARGIN
    sheet = Image.new("RGB", (COLUMNS * cell_width + MARGIN, ROWS * cell_height + MARGIN), (255, 255, 255))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=8)
    for index, (picture, prompt) in enumerate(zip(to_bytes(pictures), prompts, strict=True)):
        left = MARGIN + index % COLUMNS * cell_width
        top = MARGIN + index // COLUMNS * cell_height
        tile = Image.fromarray(picture.permute(1, 2, 0).cpu().numpy())
        sheet.paste(tile.resize((side, side), Image.Resampling.NEAREST), (left, top))
        draw.multiline_text((left, top + side + 2), _wrapped(prompt, 34), fill=(60, 60, 60), font=font, spacing=1)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="emoji")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--sheet", type=Path, default=SHEET)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    prompts = [plain_caption(scene) for scene in sheet_scenes()]
    pictures = generate_set(load_generator(arguments.folder or MODELS[arguments.model]), prompts)
    arguments.sheet.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(pictures, prompts).save(arguments.sheet, optimize=True)
    print(f"{arguments.sheet.name}: {len(prompts)} pictures, seeds from {FIRST_PICTURE_SEED}")


if __name__ == "__main__":
    main()

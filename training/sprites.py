"""Rasterise the sprites once into a small atlas: `python -m training.sprites --icons PATH/icons.json`.

The icons come from the npm package @iconify-json/fluent-emoji-flat (MIT, Microsoft); the atlas is kept in the
repository, so only somebody who changes the vocabulary needs the package and resvg-py.
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.vocabulary import NOUNS, SIZES

ATLAS_PATH = Path(__file__).with_name("sprites.png")
MASTER_PIXELS = 192
# White masks: the renderer multiplies them by the shape's colour.
SHAPE_BODIES = (
    '<circle cx="16" cy="16" r="14" fill="#fff"/>',
    '<rect x="3" y="3" width="26" height="26" fill="#fff"/>',
    '<path d="M16 2 30 29H2z" fill="#fff"/>',
    '<path d="M16 1 29 16 16 31 3 16z" fill="#fff"/>',
    '<path d="M11 2h10v9h9v10h-9v9H11v-9H2V11h9z" fill="#fff"/>',
    '<circle cx="16" cy="16" r="11" fill="none" stroke="#fff" stroke-width="6"/>',
)


def rasterise(body: str) -> NDArray[np.float32]:
    """An SVG body of a 32 x 32 view box as premultiplied RGBA in 0..255."""
    import resvg_py

    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{MASTER_PIXELS}" height="{MASTER_PIXELS}" '
        f'viewBox="0 0 32 32">{body}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")).astype(np.float32)
    pixels[..., :3] *= pixels[..., 3:] / 255
    return pixels


def shrink(master: NDArray[np.float32], pixels: int) -> NDArray[np.uint8]:
    """Box-filtered copy of a premultiplied master, per channel so that no colour bleeds from clear pixels."""
    channels = [
        np.asarray(Image.fromarray(master[..., channel]).resize((pixels, pixels), Image.Resampling.BOX))
        for channel in range(4)
    ]
    return np.clip(np.round(np.stack(channels, -1)), 0, 255).astype(np.uint8)


def build_atlas(icons: dict[str, dict[str, str]]) -> NDArray[np.uint8]:
    """One row per sprite, the sizes side by side."""
    masters = [rasterise(icons[noun.icon]["body"]) for noun in NOUNS] + [rasterise(b) for b in SHAPE_BODIES]
    height = max(SIZES.values())
    atlas = np.zeros((len(masters) * height, sum(SIZES.values()), 4), np.uint8)
    for row, master in enumerate(masters):
        left = 0
        for pixels in SIZES.values():
            atlas[row * height : row * height + pixels, left : left + pixels] = shrink(master, pixels)
            left += pixels
    return atlas


def load_sprites() -> list[NDArray[np.uint8]]:
    """Premultiplied RGBA per size, each (sprites, pixels, pixels, 4): the nouns, then the shapes."""
    atlas = np.asarray(Image.open(ATLAS_PATH))
    height = max(SIZES.values())
    rows = atlas.reshape(-1, height, atlas.shape[1], 4)
    sprites, left = [], 0
    for pixels in SIZES.values():
        sprites.append(np.ascontiguousarray(rows[:, :pixels, left : left + pixels]))
        left += pixels
    return sprites


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--icons", type=Path, required=True, help="icons.json of @iconify-json/fluent-emoji-flat")
    arguments = parser.parse_args()
    icons = json.loads(arguments.icons.read_text(encoding="utf-8"))["icons"]
    Image.fromarray(build_atlas(icons), "RGBA").save(ATLAS_PATH, optimize=True)
    print(f"{ATLAS_PATH.name}: {ATLAS_PATH.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

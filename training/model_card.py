"""The text that ships with the emoji model: its card and its licence notice."""

from training.flow import GUIDANCE, STEPS
from training.vocabulary import (
    BACKGROUND_NAMES,
    NOUNS,
    POSITION_NAMES,
    SHAPE_COLOUR_NAMES,
    SHAPES,
    SIZE_NAMES,
)

NOTICE = """\
The emoji model was trained on pictures composed from sprites of Fluent Emoji (flat),
https://github.com/microsoft/fluentui-emoji, as packaged in the npm package
@iconify-json/fluent-emoji-flat 1.2.6. The sprites' licence:

MIT License

Copyright (c) Microsoft Corporation.

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""

CARD = """\
# emoji

A tiny text-to-image model, really trained: 64 x 64 pictures of one thing, two things or a coloured shape on a
plain background. Its classes are Qwen-Image's, unmodified (`QwenImageTransformer2DModel`,
`AutoencoderKLQwenImage`, a tiny Qwen2.5-VL, `FlowMatchEulerDiscreteScheduler` with `shift=3.0`), so whatever
serves Qwen-Image serves it, and a picture takes a fraction of a second on a CPU.

```python
from diffusers import QwenImagePipeline

pipeline = QwenImagePipeline.from_pretrained(folder)
picture = pipeline(
    prompt="a cat left of a rocket on a blue background", negative_prompt="",
    height=64, width=64, num_inference_steps={steps}, true_cfg_scale={guidance},
).images[0]
```

Give `height` and `width` (the pipeline's default is larger than the model knows) and `negative_prompt=""`
(without one the pipeline silently switches guidance off).

## What it knows
- **{noun_count} nouns:** {nouns}; many also by a synonym (kitty, spaceship, bunny …).
- **Shapes:** {shapes}, each {colours}.
- **Backgrounds:** {backgrounds}.
- **Places:** {positions}. **Sizes:** {sizes}.
- **Pairs:** "a cat left of a rocket", "a fox above a cake", and their inversions (right of, below).

`vocabulary.json` lists every word. A word outside it is unknown: the tokenizer splits it and the model guesses.

## How it was made
Scenes are composed from 64 sprites of Fluent Emoji (flat), MIT, Microsoft (see `NOTICE`), and plain shapes;
captions vary synonyms, word order and which attributes they name. One in ten (noun, background) and
(shape, colour, background) combinations and one in eight noun pairs never occur in training. The autoencoder
was trained first, then transformer and text encoder together by flow matching on {samples} samples, on two CPU
cores. `training/` in the repository makes it anew.

## Graded
{grades}
## Limits
Only these words, this style and this size; no text, no people, no counting, no more than two things. Two things
have one size and one background. It is a demonstration and a test instrument, not an artist.
"""

GRADE_TABLE = """\
Each picture is compared with the renderer's own templates, without knowledge of the prompt (`training/grade.py`);
{prompts} prompts a set, fixed seeds, {steps} steps, guidance {guidance}. Per cent right:

| what | figure |
|---|---|
{rows}

"Explained energy" is how much of a picture's difference from its background the right templates account for:
crispness. The grader itself reads real renders, and renders blurred by 1.5 pixels, at 99 % and more; shuffled
prompts are the control, near chance.
"""


def model_card(grades: dict[str, float] | None, samples: int) -> str:
    """The card; `grades` are figures by name, as the grader writes them."""
    table = "Not graded yet.\n"
    if grades:
        figures = [(what, figure) for what, figure in grades.items() if what != "prompts"]
        digits = {what: 2 if "seconds" in what else 1 for what, _ in figures}
        rows = "\n".join(f"| {what} | {figure:.{digits[what]}f} |" for what, figure in figures)
        table = GRADE_TABLE.format(prompts=round(grades.get("prompts", 0)), rows=rows, steps=STEPS, guidance=GUIDANCE)
    return CARD.format(
        noun_count=len(NOUNS),
        nouns=", ".join(noun.word for noun in NOUNS),
        shapes=", ".join(SHAPES),
        colours="/".join(SHAPE_COLOUR_NAMES),
        backgrounds=", ".join(BACKGROUND_NAMES),
        positions=", ".join(POSITION_NAMES),
        sizes=", ".join(SIZE_NAMES),
        samples=f"{samples:,}",
        grades=table,
        steps=STEPS,
        guidance=GUIDANCE,
    )

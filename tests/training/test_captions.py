"""Captions name what the scene shows, in words the tokenizer keeps whole."""

import random
import re

import pytest

from training.captions import free_caption, known_words, plain_caption
from training.scenes import KINDS, PAIR, SHAPE, SINGLE, Scene, draw_scene
from training.tokenizer import PREFIX_LENGTH, TEMPLATE, CaptionTokens, build_tokenizer, closed_word_list


@pytest.fixture(scope="module")
def tokens() -> CaptionTokens:
    return CaptionTokens(build_tokenizer())


def random_captions(count: int) -> list[str]:
    rng = random.Random(3)
    return [free_caption(rng, draw_scene(rng, rng.choice(KINDS)), rng.random() < 0.5) for _ in range(count)]


@pytest.mark.parametrize(
    ("scene", "caption"),
    [
        (Scene(SINGLE, 0, -1, -1, 0, 0, 6, -1), "a big cat on the left on a blue background"),
        (Scene(PAIR, 0, 2, 0, 1, -1, 0, -1), "a small cat left of a small rocket on a white background"),
        (Scene(SHAPE, 5, -1, -1, 0, 4, 1, 0), "a big red ring in the center on a black background"),
    ],
)
def test_plain_captions(scene: Scene, caption: str) -> None:
    assert plain_caption(scene) == caption


def test_captions_use_known_words_only() -> None:
    used = {word for caption in random_captions(3000) for word in re.findall("[a-z]+", caption.lower())}
    assert used <= set(known_words())


def test_full_captions_name_the_background() -> None:
    rng = random.Random(4)
    scene = draw_scene(rng, SINGLE)._replace(background=4)
    assert all("yellow" in free_caption(rng, scene, full=True) for _ in range(50))


def test_the_prefix_is_what_the_pipeline_drops(tokens: CaptionTokens) -> None:
    assert len(tokens.tokenizer(TEMPLATE.split("{}")[0]).input_ids) == PREFIX_LENGTH == 34


def test_every_known_word_is_one_token(tokens: CaptionTokens) -> None:
    forms = [form for word in closed_word_list() for form in (word, " " + word)]
    assert [form for form in forms if len(tokens.tokenizer(form).input_ids) != 1] == []
    assert len(tokens.tokenizer(" zebra").input_ids) > 1


def test_pieces_tokenize_as_the_whole(tokens: CaptionTokens) -> None:
    for caption in [*random_captions(200), ""]:
        assert tokens.tokenizer(TEMPLATE.format(caption)).input_ids[PREFIX_LENGTH:] == tokens(caption)

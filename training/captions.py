"""Captions of scenes: free ones for training, plain ones that name every attribute for grading."""

import random
from collections.abc import Sequence

from training.scenes import ABOVE, NONE, PAIR, SHAPE, Scene
from training.vocabulary import (
    BACKGROUND_NAMES,
    BACKGROUND_SYNONYMS,
    NOUNS,
    POSITION_NAMES,
    POSITION_PHRASES,
    RELATION_PHRASES,
    SHAPE_COLOUR_NAMES,
    SHAPES,
    SIZE_NAMES,
    SIZE_PHRASES,
)

BACKGROUND_FORMS = (
    "on a {} background",
    "{} background",
    "on {}",
    "with a {} background",
    "against {}",
)
OPENINGS = ("a picture of ", "an image of ", "show ")
PLAIN_POSITIONS = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "center": "in the center",
}


def with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _free_article(rng: random.Random, words: str) -> str:
    draw = rng.random()
    if draw < 0.5:
        return with_article(words)
    return words if draw < 0.85 else "the " + words


def _noun(rng: random.Random, index: int) -> str:
    noun = NOUNS[index]
    return rng.choice(noun.synonyms) if noun.synonyms and rng.random() < 0.3 else noun.word


def _background(rng: random.Random, index: int) -> str:
    name = BACKGROUND_NAMES[index]
    return rng.choice(BACKGROUND_FORMS).format(rng.choice(BACKGROUND_SYNONYMS.get(name, (name,))))


def _pair_core(rng: random.Random, scene: Scene, size: str, full: bool) -> str:
    """Both things and their relation; sometimes, outside grading, only "a cat and a dog"."""
    first = _free_article(rng, f"{size} {_noun(rng, scene.first)}".strip())
    second_size = size if rng.random() < 0.5 else ""
    second = _free_article(rng, f"{second_size} {_noun(rng, scene.second)}".strip())
    if not full and rng.random() < 0.06:
        return " and ".join(rng.sample((first, second), 2))
    forward, backward = RELATION_PHRASES[scene.relation]
    if rng.random() < 0.6:
        return f"{first} {rng.choice(forward)} {second}"
    return f"{second} {rng.choice(backward)} {first}"


def _single_parts(rng: random.Random, scene: Scene, size: str, full: bool) -> list[str]:
    if scene.kind == SHAPE:
        words = f"{SHAPE_COLOUR_NAMES[scene.colour]} {SHAPES[scene.first]}"
    else:
        words = _noun(rng, scene.first)
    beside = rng.random() < 0.7
    parts = [_free_article(rng, f"{size} {words}".strip())] if beside else [_free_article(rng, words), size]
    if full or rng.random() < 0.8:
        parts.append(rng.choice(POSITION_PHRASES[POSITION_NAMES[scene.position]]))
    return [part for part in parts if part]


def _join(rng: random.Random, parts: list[str]) -> str:
    draw = rng.random()
    if draw < 0.6:
        return " ".join(parts)
    if draw > 0.75:
        rng.shuffle(parts)
    return ", ".join(parts)


def free_caption(rng: random.Random, scene: Scene, full: bool = False) -> str:
    """Synonyms and free word order. Unless `full`, attributes may be left out: the model then chooses."""
    size = rng.choice(SIZE_PHRASES[SIZE_NAMES[scene.size]]) if full or rng.random() < 0.7 else ""
    parts = [_pair_core(rng, scene, size, full)] if scene.kind == PAIR else _single_parts(rng, scene, size, full)
    if full or rng.random() < 0.85:
        parts.append(_background(rng, scene.background))
    text = _join(rng, parts)
    if rng.random() < 0.1:
        text = rng.choice(OPENINGS) + text
    if rng.random() < 0.1:
        text += "."
    return text[0].upper() + text[1:] if rng.random() < 0.15 else text


def plain_caption(scene: Scene) -> str:
    """The template prompt of grading: every attribute, always in the same order."""
    size, background = SIZE_NAMES[scene.size], f"on a {BACKGROUND_NAMES[scene.background]} background"
    if scene.kind == PAIR:
        first = with_article(f"{size} {NOUNS[scene.first].word}")
        second = with_article(f"{size} {NOUNS[scene.second].word}")
        relation = "above" if scene.relation == ABOVE else "left of"
        return f"{first} {relation} {second} {background}"
    assert scene.position != NONE
    if scene.kind == SHAPE:
        words = f"{SHAPE_COLOUR_NAMES[scene.colour]} {SHAPES[scene.first]}"
    else:
        words = NOUNS[scene.first].word
    place = PLAIN_POSITIONS[POSITION_NAMES[scene.position]]
    return f"{with_article(f'{size} {words}')} {place} {background}"


def known_words() -> list[str]:
    """Every word a caption can hold, lower-case: what the model has been trained on."""
    phrases: list[str] = [*BACKGROUND_FORMS, *OPENINGS, "a an the and"]
    for table in (BACKGROUND_SYNONYMS, SIZE_PHRASES, POSITION_PHRASES):
        phrases += [phrase for choices in table.values() for phrase in choices]
    phrases += [phrase for forms in RELATION_PHRASES for side in forms for phrase in side]
    phrases += [*BACKGROUND_NAMES, *SHAPE_COLOUR_NAMES, *SHAPES]
    phrases += [word for noun in NOUNS for word in (noun.word, *noun.synonyms)]
    return sorted({word for phrase in phrases for word in _words(phrase)})


def _words(phrase: str) -> Sequence[str]:
    return phrase.replace("{}", " ").split()

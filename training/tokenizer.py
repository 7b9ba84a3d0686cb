"""The emoji model's own Qwen2 tokenizer: every known word is one token, the template's prefix exactly 34."""

import json
import re
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import Qwen2Tokenizer

from training.captions import known_words

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# QwenImagePipeline's own, of which it drops the first 34 tokens' hidden states.
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
PREFIX_LENGTH = 34
CHAT_TEMPLATE = (
    "{%- for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}{%- endfor %}"
    "{%- if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{%- endif %}"
)


def closed_word_list() -> list[str]:
    """Known words and the template's, with their capitalised forms."""
    template = re.findall("[A-Za-z]+", re.sub(r"<\|\w+\|>", " ", TEMPLATE))
    words = {*known_words(), *template}
    return sorted(words | {word.capitalize() for word in words})


def _train_merges(words: list[str]) -> tuple[dict[str, int], Any]:
    """Byte-pair training over the closed list, so that each listed word ends as one token.

    Hand-made left-to-right merges do not give that: merges of other words fire in the middle of a word.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=20000,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator([form for word in words for form in (word, " " + word)], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    return dict(model["vocab"]), merges


def build_tokenizer() -> Qwen2Tokenizer:
    vocabulary, merges = _train_merges(closed_word_list())
    for token in SPECIAL_TOKENS:
        vocabulary[token] = len(vocabulary)
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, model_max_length=4096)
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


class CaptionTokens:
    """Token ids of captions inside the template, after the shared 34-token prefix.

    Captions repeat a few hundred pieces, so pieces are looked up instead of tokenising each caption anew.
    """

    _PIECE = re.compile(r" ?[A-Za-z]+|[^A-Za-z]")

    def __init__(self, tokenizer: Qwen2Tokenizer) -> None:
        before, after = TEMPLATE.split("{}")
        self.tokenizer = tokenizer
        self.prefix = torch.tensor([tokenizer(before).input_ids])
        assert self.prefix.shape[1] == PREFIX_LENGTH
        self.suffix: list[int] = tokenizer(after).input_ids
        self._piece = cache(lambda piece: tuple(tokenizer(piece).input_ids))

    def __call__(self, caption: str) -> list[int]:
        pieces = self._PIECE.findall(caption)
        return [token for piece in pieces for token in self._piece(piece)] + self.suffix

    def batch(self, rows: list[list[int]]) -> tuple[Tensor, Tensor | None]:
        """Right-padded ids, and a mask where rows differ in length."""
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = True
        return ids, None if bool(mask.all()) else mask

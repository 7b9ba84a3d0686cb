"""Small tokenizers of the kinds that real models have, trained here on a few sentences."""

from __future__ import annotations

import json
import string
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, Qwen2Tokenizer, T5Tokenizer

CORPUS = [
    "a photo of a cat and a dog running on the beach at sunset, high quality, 4k",
    "bad quality, blurry, low resolution, worst quality, distorted",
    "make the sky red and add a boat",
    "Describe the image by detailing the color, shape, size, texture, quantity",
    "the quick brown fox jumps over the lazy dog. Sphinx of black quartz, judge my vow!",
    string.printable,
] * 4

QWEN_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
QWEN_CHAT = (
    "{%- for m in messages %}{{'<|im_start|>' + m['role'] + '\n'}}"
    "{%- if m['content'] is string %}{{ m['content'] }}"
    "{%- else %}{%- for part in m['content'] %}{{ part['text'] }}{%- endfor %}{%- endif %}"
    "{{'<|im_end|>\n'}}{%- endfor %}{%- if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{%- endif %}"
)


def _trained(tokenizer: Tokenizer, trainer: Any, corpus: list[str]) -> dict[str, Any]:
    tokenizer.train_from_iterator(corpus, trainer)
    return json.loads(tokenizer.to_str())["model"]


def _pairs(merges: list[Any]) -> Any:
    return [(merge[0], merge[1]) for merge in (m if isinstance(m, list) else m.split(" ") for m in merges)]


def clip() -> CLIPTokenizer:
    """Byte-level BPE with word ends, 77 tokens; the end token has the greatest id, as CLIP's pooling expects."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, end_of_word_suffix="</w>", special_tokens=[], show_progress=False
    )
    found = _trained(tokenizer, trainer, [text.lower() for text in CORPUS])
    vocabulary: dict[str, int] = {}
    for token in (*alphabet, *(f"{char}</w>" for char in alphabet)):
        vocabulary[token] = len(vocabulary)
    merges = [(a, b) for a, b in _pairs(found["merges"]) if a in vocabulary or a in found["vocab"]]
    kept: Any = []
    for a, b in merges:
        if a in vocabulary and b in vocabulary:
            kept.append((a, b))
            vocabulary.setdefault(a + b, len(vocabulary))
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[token] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=kept, model_max_length=77)


def t5() -> T5Tokenizer:
    """A unigram tokenizer with T5's special tokens. Written down, not trained: training one is not reproducible."""
    words = sorted({word for text in CORPUS for word in text.split()})
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(f"▁{word}", -5.0 - 0.01 * rank) for rank, word in enumerate(words)]
    vocabulary += [(char, -12.0) for char in string.printable.strip()]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)


def qwen() -> Qwen2Tokenizer:
    """Byte-level BPE with Qwen's special tokens and a chat template that takes text and lists of parts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    found = _trained(tokenizer, trainer, CORPUS)
    vocabulary = dict(found["vocab"])
    for token in QWEN_SPECIAL:
        vocabulary.setdefault(token, len(vocabulary))
    made = Qwen2Tokenizer(vocab=vocabulary, merges=_pairs(found["merges"]), model_max_length=4096)
    made.add_tokens(QWEN_SPECIAL, special_tokens=True)
    made.chat_template = QWEN_CHAT
    return made

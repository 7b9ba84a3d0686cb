"""A tiny Qwen2.5-VL as text encoder, and its forward for training."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.cache_utils import DynamicCache

from training.tokenizer import SPECIAL_TOKENS

WIDTH = 128
LAYERS = 2


def build_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """0.45M parameters; the vision tower (6k) is there because the class has one, and is never run."""
    token: dict[str, Any] = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "rope_parameters": {"mrope_section": [4, 6, 6], "rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": token["<|endoftext|>"],
        "eos_token_id": token["<|im_end|>"],
        "pad_token_id": token["<|endoftext|>"],
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 1,
        "out_hidden_size": WIDTH,
        "patch_size": 4,
        "spatial_merge_size": 1,
        "window_size": 112,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=token["<|image_pad|>"],
        video_token_id=token["<|video_pad|>"],
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
    )
    encoder = Qwen2_5_VLForConditionalGeneration(config)
    nn.init.normal_(encoder.model.language_model.embed_tokens.weight, std=0.5)
    return encoder


def encode_captions(encoder: Qwen2_5_VLForConditionalGeneration, prefix: Tensor, ids: Tensor) -> Tensor:
    """Hidden states after the template's prefix, (captions, tokens, width).

    The prefix is causal and the same for all captions: it runs once and its keys and values are shared.
    """
    language = encoder.model.language_model
    batch, length = ids.shape
    cache = DynamicCache(config=language.config)
    language(input_ids=prefix, past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    for layer in layers:
        layer.keys = layer.keys.expand(batch, -1, -1, -1)
        layer.values = layer.values.expand(batch, -1, -1, -1)
    start = prefix.shape[1]
    positions = torch.arange(start, start + length, device=ids.device).view(1, 1, -1).expand(3, batch, -1)
    return language(input_ids=ids, past_key_values=cache, use_cache=True, position_ids=positions).last_hidden_state

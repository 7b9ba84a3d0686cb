"""A Flux-shaped folder with random weights, small enough to be written anew for a test that damages it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

COMPONENTS = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def transformer(**changes: Any) -> FluxTransformer2DModel:
    """One double and one single block of width 32."""
    settings: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 4, 8),
        "guidance_embeds": True,
    }
    return FluxTransformer2DModel(**(settings | changes))


def vae() -> AutoencoderKL:
    """Two levels, four latent channels."""
    levels: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return AutoencoderKL(**levels, latent_channels=4, norm_num_groups=4, sample_size=32, shift_factor=0.1)


def text_encoder() -> CLIPTextModel:
    """Two layers of width 32."""
    config = CLIPTextConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        bos_token_id=58,
        eos_token_id=59,
        pad_token_id=59,
    )
    return CLIPTextModel(config)


def tokenizer() -> CLIPTokenizer:
    """Letters only."""
    letters = "abcdefghijklmnopqrstuvwxyz ,."
    vocab = {text: place for place, text in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    vocab |= {"<|startoftext|>": 58, "<|endoftext|>": 59}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def write(folder: Path, **index: Any) -> Path:
    """Writes the model; `index` adds to or changes model_index.json. Weights are reproducible."""
    torch.manual_seed(0)
    transformer().save_pretrained(folder / "transformer")
    vae().save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    for name in ("text_encoder", "text_encoder_2"):
        text_encoder().save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name.replace("text_encoder", "tokenizer"))
    write_index(folder, **index)
    return folder


def write_index(folder: Path, **index: Any) -> None:
    """Writes model_index.json of all components, changed by `index`."""
    content = {"_class_name": "FluxPipeline", "_diffusers_version": "0.42.1", **COMPONENTS}
    content |= {"image_encoder": [None, None], "feature_extractor": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(content | index))


def edit_json(path: Path, **changes: Any) -> None:
    """Changes a JSON file's entries."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

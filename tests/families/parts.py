"""Tiny text encoders, autoencoders and schedulers that several families share."""

# diffusers annotates tuples of any length as tuples of one, and schedulers as an enumeration.
# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.families import tokenizers
from tests.families.base import randomize, seeded

WIDTH = 32
"""Hidden size of every text encoder here."""


def t5_encoder(
    tokenizer: Any, model: Any = T5EncoderModel, config: Any = T5Config, seed: int = 3, width: int = WIDTH
) -> Any:
    """T5's or UMT5's encoder."""
    return seeded(
        seed,
        lambda: model(
            config(
                vocab_size=len(tokenizer),
                d_model=width,
                d_kv=8,
                d_ff=37,
                num_layers=2,
                num_heads=4,
                relative_attention_num_buckets=8,
                feed_forward_proj="gated-gelu",
                pad_token_id=0,
                eos_token_id=1,
                decoder_start_token_id=0,
            )
        ),
    )


def qwen3(tokenizer: Any, model: Any = Qwen3Model, seed: int = 11) -> Any:
    """Qwen3, with or without its head."""
    config = Qwen3Config(
        hidden_size=WIDTH,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
    )
    return seeded(seed, lambda: model(config))


def clip_encoder(tokenizer: Any, model: Any = CLIPTextModel, seed: int = 2) -> Any:
    """CLIP's text encoder, with or without its projection."""
    end = len(tokenizer) - 1
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
        projection_dim=WIDTH,
        hidden_act="gelu",
    )
    return seeded(seed, lambda: model(config))


def qwen_vl(tokenizer: Any, seed: int = 5, layers: int = 2) -> Any:
    """Qwen2.5-VL with both towers."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizers.QWEN_SPECIAL}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 37,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1000000.0},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return seeded(seed, lambda: Qwen2_5_VLForConditionalGeneration(config))


def kl_vae(channels: int, levels: int = 4, quant: bool = False, seed: int = 4, **more: Any) -> AutoencoderKL:
    """Stable Diffusion's autoencoder; `levels` - 1 halvings."""
    made = AutoencoderKL(
        sample_size=32,
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        **more,
    )
    return randomize(made, seed)


def _statistics(channels: int, seed: int) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(channels, generator=generator).mul(0.3)
    return {"latents_mean": mean.tolist(), "latents_std": (1 + torch.rand(channels, generator=generator)).tolist()}


def qwen_vae(seed: int = 6, base: int = 8, halvings: int = 3) -> AutoencoderKLQwenImage:
    """Qwen-Image's autoencoder, 8 pixels a latent unless told otherwise."""
    made = AutoencoderKLQwenImage(
        base_dim=base,
        z_dim=16,
        dim_mult=[1, 1] + [2] * (halvings - 1),
        num_res_blocks=1,
        temperal_downsample=[False] + [True] * (halvings - 1),
        **_statistics(16, seed),
    )
    return randomize(made, seed)


def wan_vae(channels: int = 16, seed: int = 8, **more: Any) -> AutoencoderKLWan:
    """Wan's autoencoder, 8 pixels and 4 frames a latent."""
    made = AutoencoderKLWan(
        base_dim=8,
        z_dim=channels,
        dim_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        **_statistics(channels, seed),
        **more,
    )
    return randomize(made, seed)


def qwen_transformer(seed: int = 7) -> QwenImageTransformer2DModel:
    """Qwen-Image's transformer, two blocks."""
    made = QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
    )
    return randomize(made, seed)


def wan_transformer(seed: int = 9, **more: Any) -> WanTransformer3DModel:
    """Wan's transformer, two blocks."""
    options: dict[str, Any] = {
        "in_channels": 16,
        "out_channels": 16,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "text_dim": WIDTH,
        "freq_dim": 64,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 64,
    }
    return randomize(WanTransformer3DModel(**{**options, **more}), seed)


def qwen_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Qwen-Image's schedule."""
    return FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        base_shift=0.5,
        max_image_seq_len=8192,
        max_shift=0.9,
        shift_terminal=0.02,
        use_dynamic_shifting=True,
    )


def flux_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX's schedule."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def wan_scheduler() -> UniPCMultistepScheduler:
    """Wan's schedule."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def wan(kind: Any = WanPipeline, **components: Any) -> Any:
    """A pipeline of Wan's; `components` beside or in place of the usual ones."""
    tokenizer = tokenizers.t5()
    usual = {
        "tokenizer": tokenizer,
        "text_encoder": t5_encoder(tokenizer, UMT5EncoderModel, UMT5Config),
        "scheduler": wan_scheduler(),
    }
    usual["vae"] = components.pop("vae", None) or wan_vae()
    usual["transformer"] = components.pop("transformer", None) or wan_transformer()
    return kind(**usual, **components)

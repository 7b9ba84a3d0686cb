"""Tiny models of the families that run from Modular Diffusers' blocks."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanImageToVideoPipeline,
    WanPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen3Config,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.families import parts, tokenizers
from tests.families.base import Family, picture, randomize, seeded

STILL = {"height": 64, "width": 64}
CLIP = {"height": 32, "width": 32, "num_frames": 9}
PROMPT = {"prompt": "a photo of a cat"}
BOTH = {**PROMPT, "negative_prompt": "bad quality"}
TWO_PROMPTS = {"prompt": ["a photo of a cat", "make the sky red"]}
TWO_NEGATIVES = {"negative_prompt": ["bad quality", "blurry"]}


def flux() -> Any:
    """FLUX.1-dev."""
    clip, t5 = tokenizers.clip(), tokenizers.t5()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=parts.WIDTH,
        pooled_projection_dim=parts.WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return FluxPipeline(
        scheduler=parts.flux_scheduler(),
        vae=parts.kl_vae(4, shift_factor=0.0609, scaling_factor=1.5035),
        text_encoder=parts.clip_encoder(clip),
        tokenizer=clip,
        text_encoder_2=parts.t5_encoder(t5),
        tokenizer_2=t5,
        transformer=randomize(transformer, 1),
    )


def qwen_image() -> Any:
    """Qwen-Image."""
    tokenizer = tokenizers.qwen()
    return QwenImagePipeline(
        scheduler=parts.qwen_scheduler(),
        vae=parts.qwen_vae(),
        text_encoder=parts.qwen_vl(tokenizer),
        tokenizer=tokenizer,
        transformer=parts.qwen_transformer(),
    )


def wan_t2v() -> Any:
    """Wan2.1 text to video."""
    tokenizer = tokenizers.t5()
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=parts.t5_encoder(tokenizer, UMT5EncoderModel, UMT5Config),
        vae=parts.wan_vae(),
        scheduler=parts.wan_scheduler(),
        transformer=parts.wan_transformer(),
    )


def _families() -> list[Family]:
    flux_run = {**PROMPT, **STILL, "num_inference_steps": 3, "max_sequence_length": 32}
    qwen_run = {**BOTH, **STILL, "num_inference_steps": 3, "max_sequence_length": 64}
    wan_run = {**BOTH, **CLIP, "num_inference_steps": 3, "max_sequence_length": 32}
    return [
        Family(
            "flux",
            flux,
            flux_run,
            3.5,
            {**flux_run, "guidance_scale": 3.5},
            two={**TWO_PROMPTS, "num_images_per_prompt": 2},
        ),
        Family(
            "qwen-image",
            qwen_image,
            qwen_run,
            4.0,
            {**qwen_run, "true_cfg_scale": 4.0},
            off={"true_cfg_scale": 1.0},
            two={**TWO_PROMPTS, **TWO_NEGATIVES, "num_images_per_prompt": 2},
        ),
        Family(
            "wan-t2v",
            wan_t2v,
            wan_run,
            5.0,
            {**wan_run, "guidance_scale": 5.0},
            off={"guidance_scale": 1.0},
            two={**TWO_PROMPTS, **TWO_NEGATIVES, "num_videos_per_prompt": 2},
        ),
    ]


MODULAR: dict[str, Family] = {family.name: family for family in _families()}

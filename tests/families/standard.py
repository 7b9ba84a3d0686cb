"""Tiny models of families that run from their standard pipeline: split by replay, or in one piece."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import LlamaConfig, LlamaModel

from tests.families import parts, tokenizers
from tests.families.base import (
    BOTH,
    PROMPT,
    STILL,
    TWO_NEGATIVES,
    TWO_PROMPTS,
    Family,
    guided,
    picture,
    randomize,
    seeded,
)


def wan22_ti2v() -> Any:
    """Wan2.2-TI2V-5B: a timestep per token, a VAE of 48 channels and 16 pixels a latent."""
    vae = parts.wan_vae(
        48,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        decoder_base_dim=8,
        scale_factor_spatial=16,
    )
    return parts.wan(vae=vae, transformer=parts.wan_transformer(in_channels=48, out_channels=48), expand_timesteps=True)


def llama(tokenizer: Any, seed: int = 21) -> Any:
    """Llama without its head."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=parts.WIDTH,
        intermediate_size=37,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    return seeded(seed, lambda: LlamaModel(config))


def _levels(name: str) -> dict[str, Any]:
    """A causal video autoencoder's four levels of blocks: 8 pixels and 4 frames a latent."""
    return {
        "down_block_types": (f"{name}DownBlock3D",) * 4,
        "up_block_types": (f"{name}UpBlock3D",) * 4,
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "latent_channels": 4,
    }


def hunyuan_video() -> Any:
    """HunyuanVideo 1.0."""
    tokenizer, clip = tokenizers.qwen(), tokenizers.clip()
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=parts.WIDTH,
        pooled_projection_dim=parts.WIDTH,
        rope_axes_dim=(2, 4, 4),
    )
    vae = AutoencoderKLHunyuanVideo(**_levels("HunyuanVideo"), norm_num_groups=4)
    text: dict[str, Any] = {"text_encoder": llama(tokenizer), "tokenizer": tokenizer}
    return HunyuanVideoPipeline(
        **text,
        transformer=randomize(transformer, 22),
        vae=randomize(vae, 23),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=parts.clip_encoder(clip),
        tokenizer_2=clip,
    )


def _unet() -> Any:
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=parts.WIDTH,
        norm_num_groups=4,
    )
    return randomize(unet, 24)


def _stable_diffusion(kind: Any) -> Any:
    tokenizer = tokenizers.clip()
    return kind(
        vae=parts.kl_vae(4, quant=True),
        text_encoder=parts.clip_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=_unet(),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion() -> Any:
    """Stable Diffusion 1.5, without its safety checker."""
    return _stable_diffusion(StableDiffusionPipeline)


def stable_diffusion_img2img() -> Any:
    """The same from a picture: its VAE's encoder samples."""
    return _stable_diffusion(StableDiffusionImg2ImgPipeline)


def cogvideox() -> Any:
    """CogVideoX."""
    tokenizer = tokenizers.t5()
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=parts.WIDTH,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=16,
    )
    vae = AutoencoderKLCogVideoX(**_levels("CogVideoX"), norm_num_groups=2)
    return CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=parts.t5_encoder(tokenizer),
        vae=randomize(vae, 25),
        transformer=randomize(transformer, 26),
        scheduler=CogVideoXDDIMScheduler(),
    )


def ddpm() -> Any:
    """DDPM: no text, no VAE, so nothing to split."""
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return DDPMPipeline(unet=randomize(unet, 27), scheduler=DDPMScheduler())


def _families() -> list[Family]:
    wan = {**BOTH, **STILL, "num_frames": 9, "num_inference_steps": 3, "max_sequence_length": 32}
    hunyuan = {
        **PROMPT,
        **{"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 3, "max_sequence_length": 16},
        "prompt_template": {"template": "Describe the image: {}", "crop_start": 5},
    }
    stable = {**BOTH, **STILL, "num_inference_steps": 3}
    varied = {**BOTH, "image": picture(0), "strength": 0.7, "num_inference_steps": 4}
    cog = {**BOTH, "height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 3, "max_sequence_length": 16}
    pairs = {**TWO_PROMPTS, **TWO_NEGATIVES}
    clips, stills = {"num_videos_per_prompt": 2}, {"num_images_per_prompt": 2}
    return [
        guided("wan2.2-ti2v", wan22_ti2v, wan, 5.0, two={**pairs, **clips}),
        guided("hunyuan-video", hunyuan_video, hunyuan, 6.0, switchable=False, two={**TWO_PROMPTS, **clips}),
        guided("stable-diffusion", stable_diffusion, stable, 5.0, two={**pairs, **stills}),
        guided("stable-diffusion-img2img", stable_diffusion_img2img, varied, 5.0),
        guided("cogvideox", cogvideox, cog, 5.0),
        Family("ddpm", ddpm, {"num_inference_steps": 3}, None, {"num_inference_steps": 3}),
    ]


STANDARD: dict[str, Family] = {family.name: family for family in _families()}

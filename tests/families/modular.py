"""Tiny models of the families that run from Modular Diffusers' blocks."""

# diffusers annotates tuples of any length as tuples of one, and schedulers as an enumeration.
# pyright: reportArgumentType=false

from __future__ import annotations

import importlib.util
from typing import Any

from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTXVideo,
    ClassifierFreeGuidance,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanImageToVideoPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    ByT5Tokenizer,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3ForCausalLM,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

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

CLIP = {"height": 32, "width": 32, "num_frames": 9}


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


def wan_i2v() -> Any:
    """Wan2.1 image to video."""
    vision = CLIPVisionConfig(
        hidden_size=16,
        projection_dim=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        intermediate_size=16,
        patch_size=8,
    )
    return parts.wan(
        WanImageToVideoPipeline,
        image_processor=CLIPImageProcessorPil(crop_size=32, size=32),
        image_encoder=seeded(10, lambda: CLIPVisionModel(vision)),
        transformer=parts.wan_transformer(in_channels=36, image_dim=16),
    )


def wan22() -> Any:
    """Wan2.2 text to video with two experts."""
    return parts.wan(transformer_2=parts.wan_transformer(19), boundary_ratio=0.875)


def z_image() -> Any:
    """Z-Image."""
    tokenizer = tokenizers.qwen()
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=parts.WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[512, 64, 64],
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.kl_vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=parts.qwen3(tokenizer),
        tokenizer=tokenizer,
        transformer=randomize(transformer, 12),
    )


def flux2_klein() -> Any:
    """FLUX.2 klein, distilled."""
    tokenizer = tokenizers.qwen()
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * parts.WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return Flux2KleinPipeline(
        scheduler=parts.flux_scheduler(),
        vae=randomize(vae, 21),
        text_encoder=parts.qwen3(tokenizer, Qwen3ForCausalLM),
        tokenizer=tokenizer,
        transformer=randomize(transformer, 22),
        is_distilled=True,
    )


def sd3() -> Any:
    """Stable Diffusion 3."""
    clip, t5 = tokenizers.clip(), tokenizers.t5()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * parts.WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * parts.WIDTH,
        out_channels=4,
        pos_embed_max_size=16,
    )
    return StableDiffusion3Pipeline(
        transformer=randomize(transformer, 23),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.kl_vae(4, shift_factor=0.0609, scaling_factor=1.5305),
        text_encoder=parts.clip_encoder(clip, CLIPTextModelWithProjection),
        tokenizer=clip,
        text_encoder_2=parts.clip_encoder(clip, CLIPTextModelWithProjection, seed=14),
        tokenizer_2=clip,
        text_encoder_3=parts.t5_encoder(t5, width=2 * parts.WIDTH),
        tokenizer_3=t5,
    )


def sdxl() -> Any:
    """Stable Diffusion XL."""
    clip = tokenizers.clip()
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=32,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + parts.WIDTH,
        cross_attention_dim=2 * parts.WIDTH,
        norm_num_groups=4,
    )
    return StableDiffusionXLPipeline(
        unet=randomize(unet, 13),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            steps_offset=1,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
        ),
        vae=parts.kl_vae(4, quant=True, scaling_factor=0.13025),
        text_encoder=parts.clip_encoder(clip),
        tokenizer=clip,
        text_encoder_2=parts.clip_encoder(clip, CLIPTextModelWithProjection, seed=14),
        tokenizer_2=clip,
        add_watermarker=False,
    )


def ltx() -> Any:
    """LTX-Video."""
    tokenizer = tokenizers.t5()
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=parts.WIDTH,
    )
    return LTXPipeline(
        scheduler=parts.flux_scheduler(),
        vae=randomize(vae, 24),
        text_encoder=parts.t5_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=randomize(transformer, 25),
    )


def hunyuan_video15() -> Any:
    """HunyuanVideo 1.5."""
    tokenizer = tokenizers.qwen()
    glyphs = ByT5Tokenizer()
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1, scaling_factor=1.03682
    )
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=parts.WIDTH,
        text_embed_2_dim=parts.WIDTH,
        image_embed_dim=16,
        rope_axes_dim=(4, 6, 6),
        target_size=64,
        task_type="t2v",
    )
    return HunyuanVideo15Pipeline(
        text_encoder=parts.qwen_vl(tokenizer, layers=3).model.language_model,
        tokenizer=tokenizer,
        transformer=randomize(transformer, 26),
        vae=randomize(vae, 27),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=parts.t5_encoder(glyphs),
        tokenizer_2=glyphs,
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )


def _processor(tokenizer: Any) -> Any:
    """Qwen2-VL's processor, without its video half where torchvision, which that needs, is not installed."""
    images = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
    if importlib.util.find_spec("torchvision") is not None:
        videos = Qwen2VLVideoProcessor()
        return Qwen2VLProcessor(images, tokenizer, videos, chat_template=tokenizers.QWEN_CHAT)

    class StillProcessor(Qwen2VLProcessor):
        # transformers reads a processor's parts off this signature.
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs) -> None:
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **kwargs)

    StillProcessor.__name__, StillProcessor.__module__ = Qwen2VLProcessor.__name__, Qwen2VLProcessor.__module__
    return StillProcessor(images, tokenizer, chat_template=tokenizers.QWEN_CHAT)


def qwen_image_edit_plus() -> Any:
    """Qwen-Image-Edit-Plus. Its pipeline scales every picture to a megapixel for the VAE, so this VAE halves once
    more than the real one, which quarters what the transformer has to attend to."""
    tokenizer = tokenizers.qwen()
    return QwenImageEditPlusPipeline(
        scheduler=parts.qwen_scheduler(),
        vae=parts.qwen_vae(base=2, halvings=4),
        text_encoder=parts.qwen_vl(tokenizer),
        tokenizer=tokenizer,
        processor=_processor(tokenizer),
        transformer=parts.qwen_transformer(),
    )


def _stills() -> list[Family]:
    run = {**PROMPT, **STILL, "num_inference_steps": 3, "max_sequence_length": 32}
    long = {**BOTH, **STILL, "num_inference_steps": 3, "max_sequence_length": 64}
    klein = {**run, "max_sequence_length": 64, "text_encoder_out_layers": [1, 2, 3]}
    edit = {**BOTH, "image": [picture(0), picture(1)], "num_inference_steps": 2, **STILL}
    plain = {**BOTH, **STILL, "num_inference_steps": 3}
    two = {**TWO_PROMPTS, "num_images_per_prompt": 2}
    both = {**two, **TWO_NEGATIVES}
    return [
        guided("flux", flux, run, 3.5, switchable=False, two=two),
        Family("flux2-klein", flux2_klein, klein, None, klein, two=two),
        guided("qwen-image", qwen_image, long, 4.0, "true_cfg_scale", two=both),
        guided("qwen-image-edit-plus", qwen_image_edit_plus, edit, 4.0, "true_cfg_scale"),
        guided("z-image", z_image, long, 4.0, unguided=0.0, two=both),
        guided("sd3", sd3, {**plain, "max_sequence_length": 32}, 5.0, two=both),
        guided("sdxl", sdxl, plain, 5.0, two=both),
    ]


def _clips() -> list[Family]:
    wan = {**BOTH, **CLIP, "num_inference_steps": 3, "max_sequence_length": 32}
    experts = {**wan, "num_inference_steps": 5, "guidance_scale_2": 3.0}
    hunyuan = {**BOTH, **STILL, "num_frames": 5, "num_inference_steps": 2, "prompt": 'a sign that says "cat"'}
    two = {**TWO_PROMPTS, **TWO_NEGATIVES, "num_videos_per_prompt": 2}
    four = {
        "prompt": [prompt for prompt in TWO_PROMPTS["prompt"] for _ in range(2)],
        "negative_prompt": [prompt for prompt in TWO_NEGATIVES["negative_prompt"] for _ in range(2)],
    }
    return [
        guided("wan-t2v", parts.wan, wan, 5.0, two=two),
        guided("wan-i2v", wan_i2v, {**wan, "image": picture(0, 32, 32)}, 5.0),
        guided("wan2.2", wan22, experts, 5.0, switchable=False, two=two),
        guided("ltx", ltx, {**wan, **STILL}, 3.0, two=two),
        # The standard pipeline fails on several clips of one prompt.
        Family("hunyuan-video-1.5", hunyuan_video15, hunyuan, 6.0, hunyuan, two=two, two_standard=four),
    ]


MODULAR: dict[str, Family] = {family.name: family for family in (*_stills(), *_clips())}

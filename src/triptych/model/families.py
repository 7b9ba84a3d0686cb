"""What the blocks of a family do not say themselves, as data: class names, guidance formulas, exceptions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from triptych.model.topology import StageName

__all__ = ["FAMILIES", "WORKFLOW_NAMES", "Family", "our_workflow", "resolve_family", "wrong_in_modular"]


@dataclass(frozen=True)
class Family:
    """One family of pipelines that Modular Diffusers has blocks for.

    `pipelines` are the standard class names (the `_class_name` of a model_index.json) that mean it, `modular` the
    ModularPipeline class that runs it. A folder belongs to the first family of `FAMILIES` that lists its class and
    whose `when` (entries of model_index.json that must be set) holds.
    """

    name: str
    pipelines: tuple[str, ...]
    modular: str
    when: tuple[str, ...] = ()
    workflow: str = ""
    """The only workflow of blocks that name none."""
    patch: int = 1
    """Latents per transformer token, along width and height."""
    guider: Mapping[str, Any] = field(default_factory=dict)
    """Guider options that give the standard pipeline's formula where the blocks' default differs."""
    nullable: tuple[str, ...] = ()
    """Components that may be [null, null] in model_index.json without costing a workflow."""
    uses: tuple[tuple[StageName, str], ...] = ()
    """Components that a stage runs although the general rule takes them for read only."""
    reads: tuple[tuple[StageName, str], ...] = ()
    """Components whose config a stage needs although its blocks do not list them."""
    negative_per_prompt: bool = False
    """The blocks do not repeat a missing or single negative prompt over several prompts."""
    empty_negative: str = ""
    """What stands for a missing negative prompt."""
    modules: tuple[tuple[str, str], ...] = ()
    """Workflows whose blocks import what diffusers does not require: workflow, module."""
    swaps: tuple[tuple[str, str], ...] = ()
    """Block classes (of `diffusers.modular_pipelines`) to run instead of others: from, to."""
    outputs_as_prompts: bool = False
    """The blocks make one output per prompt rightly and several wrongly; each prompt is repeated instead."""
    sliced_vae: bool = False
    """The VAE fails on more than one clip at a time; diffusers' slicing gives it one after the other."""
    unguided: float = 1.0
    """The greatest guidance scale at which the standard pipeline runs without guidance."""
    unguided_fails: bool = False
    """Without guidance the text block fails for want of negative embeddings, and the loop asks for them as well."""
    multimodal_rope: bool = False
    """The text encoder takes pictures, and diffusers does not forward `mm_token_type_ids`, without which
    transformers 5 computes one-dimensional positions (diffusers issue 14194)."""
    picture_channels: int | None = None
    """The VAE's latent channels that the blocks take for granted where they encode pictures."""
    fps: float | None = None


# The block for inpainting gives 8-bit pictures only, for the sake of padding_mask_crop, which we do not take (it would
# have pictures cross).
_PLAIN_OUTPUT = (
    (
        "qwenimage.decoders.QwenImageInpaintProcessImagesOutputStep",
        "qwenimage.decoders.QwenImageProcessImagesOutputStep",
    ),
)

FAMILIES: tuple[Family, ...] = (
    Family(
        "flux",
        ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
        "FluxModularPipeline",
        patch=2,
    ),
    Family("flux-kontext", ("FluxKontextPipeline",), "FluxKontextModularPipeline", patch=2),
    Family("flux2", ("Flux2Pipeline",), "Flux2ModularPipeline", patch=2),
    Family("flux2-klein", ("Flux2KleinPipeline",), "Flux2KleinModularPipeline", when=("is_distilled",), patch=2),
    Family("flux2-klein-base", ("Flux2KleinPipeline",), "Flux2KleinBaseModularPipeline", patch=2),
    Family(
        "qwen-image",
        ("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
        "QwenImageModularPipeline",
        picture_channels=16,
        patch=2,
        swaps=_PLAIN_OUTPUT,
        negative_per_prompt=True,
    ),
    Family(
        "qwen-image-edit",
        ("QwenImageEditPipeline", "QwenImageEditInpaintPipeline"),
        "QwenImageEditModularPipeline",
        patch=2,
        swaps=_PLAIN_OUTPUT,
        negative_per_prompt=True,
        empty_negative=" ",
        multimodal_rope=True,
    ),
    Family(
        "qwen-image-edit-plus",
        ("QwenImageEditPlusPipeline",),
        "QwenImageEditPlusModularPipeline",
        workflow="edit",
        patch=2,
        negative_per_prompt=True,
        empty_negative=" ",
        multimodal_rope=True,
    ),
    Family(
        "qwen-image-layered",
        ("QwenImageLayeredPipeline",),
        "QwenImageLayeredModularPipeline",
        workflow="layers",
        patch=2,
        negative_per_prompt=True,
        empty_negative=" ",
        multimodal_rope=True,
    ),
    Family(
        "qwen-image-2.1-turbo",
        ("QwenImage21Pipeline",),
        "QwenImage21TurboModularPipeline",
        when=("sample_sigmas",),
    ),
    Family("qwen-image-2.1", ("QwenImage21Pipeline",), "QwenImage21ModularPipeline"),
    Family(
        "wan2.2",
        ("WanPipeline",),
        "Wan22ModularPipeline",
        when=("boundary_ratio", "transformer_2"),
        workflow="text2video",
        patch=2,
        unguided_fails=True,
        fps=16.0,
    ),
    Family(
        "wan",
        ("WanPipeline",),
        "WanModularPipeline",
        workflow="text2video",
        patch=2,
        unguided_fails=True,
        fps=16.0,
    ),
    Family(
        "wan2.2-i2v",
        ("WanImageToVideoPipeline",),
        "Wan22Image2VideoModularPipeline",
        when=("boundary_ratio", "transformer_2"),
        workflow="image2video",
        patch=2,
        unguided_fails=True,
        fps=16.0,
    ),
    Family(
        "wan-i2v",
        ("WanImageToVideoPipeline",),
        "WanImage2VideoModularPipeline",
        patch=2,
        modules=(("frames2video", "torchvision"),),
        unguided_fails=True,
        fps=16.0,
    ),
    Family(
        "wan2.2-vace",
        ("WanVACEPipeline",),
        "Wan22VaceModularPipeline",
        when=("boundary_ratio", "transformer_2"),
        workflow="video2video",
        patch=2,
        unguided_fails=True,
        fps=16.0,
    ),
    Family(
        "z-image",
        ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
        "ZImageModularPipeline",
        patch=2,
        guider={"use_original_formulation": True},
        unguided=0.0,
    ),
    Family(
        "sd3",
        ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
        "StableDiffusion3ModularPipeline",
        patch=2,
        nullable=("text_encoder_3", "tokenizer_3"),
        reads=(("encode", "transformer"),),
    ),
    Family(
        "sdxl",
        ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
        "StableDiffusionXLModularPipeline",
        reads=(("encode", "unet"),),
        outputs_as_prompts=True,
    ),
    Family(
        "ltx",
        ("LTXPipeline", "LTXImageToVideoPipeline"),
        "LTXModularPipeline",
        unguided_fails=True,
        fps=25.0,
    ),
    Family(
        "ltx2",
        ("LTX2Pipeline", "LTX2ImageToVideoPipeline", "LTX2ConditionPipeline"),
        "LTX2ModularPipeline",
        fps=24.0,
    ),
    Family(
        "hunyuan-video-1.5",
        ("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"),
        "HunyuanVideo15ModularPipeline",
        reads=(("encode", "transformer"),),
        outputs_as_prompts=True,
        sliced_vae=True,
        fps=24.0,
    ),
    Family("ernie-image", ("ErnieImagePipeline",), "ErnieImageModularPipeline", patch=2),
    Family("krea2-turbo", ("Krea2Pipeline",), "Krea2TurboModularPipeline", when=("is_distilled",), patch=2),
    Family("krea2", ("Krea2Pipeline",), "Krea2ModularPipeline", patch=2),
    Family("anima", ("AnimaPipeline",), "AnimaModularPipeline", patch=2),
    Family("ideogram4", ("Ideogram4Pipeline",), "Ideogram4ModularPipeline", patch=2),
    Family(
        "cosmos3-omni",
        ("Cosmos3OmniPipeline",),
        "Cosmos3OmniModularPipeline",
        uses=(("denoise", "vae"),),
        fps=24.0,
    ),
    Family("helios", ("HeliosPipeline",), "HeliosModularPipeline", fps=24.0),
    Family(
        "wan-animate-2",
        ("WanAnimate2Pipeline",),
        "WanAnimate2ModularPipeline",
        workflow="animate",
        uses=(("denoise", "vae"),),
        fps=16.0,
    ),
)

_WRONG: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("WanPipeline", "WanImageToVideoPipeline"),
        "expand_timesteps",
        "Modular Diffusers ignores expand_timesteps and takes this VAE's scale for 8, so the standard pipeline is run",
    ),
)
"""Pipelines that Modular Diffusers gets wrong: classes, the entry that must be set for it, the reason."""

WORKFLOW_NAMES: Mapping[str, str] = {
    "inpainting": "inpaint",
    "image_conditioned": "edit",
    "image_conditioned_inpainting": "edit_inpaint",
    "img2img": "image2image",
    "flf2v": "frames2video",
    "controlnet_inpainting": "controlnet_inpaint",
    "controlnet_union_inpainting": "controlnet_union_inpaint",
    "t2va": "text2video",
    "fl2va": "image2video",
    "ref2va": "reference2video",
}
"""Diffusers' workflow names that are not ours."""


def our_workflow(name: str) -> str:
    """Our name of one of diffusers' workflows."""
    return WORKFLOW_NAMES.get(name, name)


def _is_set(value: Any) -> bool:
    return bool(value) and value != [None, None]


def wrong_in_modular(index: Mapping[str, Any]) -> str | None:
    """Why modular blocks must not run the pipeline of this model_index.json; None where they may."""
    for classes, key, reason in _WRONG:
        if index.get("_class_name") in classes and _is_set(index.get(key)):
            return reason
    return None


def resolve_family(index: Mapping[str, Any]) -> Family | None:
    """The family of a model_index.json (or modular_model_index.json), None where no modular blocks exist for it."""
    given = index.get("_class_name")
    for family in FAMILIES:
        if given == family.modular:
            return family
        if given in family.pipelines and all(_is_set(index.get(key)) for key in family.when):
            return family
    return None

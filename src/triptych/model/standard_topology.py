"""The topology of a standard pipeline, derived from its class' code and its components' configurations."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline

from triptych.errors import LoadError, Unsupported
from triptych.model.anatomy import Anatomy, anatomy
from triptych.model.checkpoint import read_json
from triptych.model.declared import DENOISERS, FRAME_RATES, folder_defaults, hint_name, plain_default
from triptych.model.index import read_index
from triptych.model.load import component_class, meta_component
from triptych.model.pipeline import guidance_field, pipeline_class
from triptych.model.topology import (
    ComponentInfo,
    Defaults,
    InputInfo,
    Port,
    Source,
    StageName,
    StageTopology,
    Topology,
)
from triptych.model.trust import NO_TRUST, Trust

__all__ = ["LATENTS", "MEDIA", "SKELETON", "VAE_ENCODE", "is_media", "standard_topology"]

VAE_ENCODE = "vae_encode"
MEDIA = "media"
LATENTS = "latents"
SKELETON = "skeleton"

ENCODERS = ("text_encoder", "image_encoder")
AFTER = ("safety_checker", "vocoder")
"""Components with weights that work on what decode made."""

_RUN_TIME = (
    *("generator", "output_type", "return_dict", "latents", "callback", "callback_steps", "eta"),
    *("timesteps", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "clip_skip"),
    *("ip_adapter_image", "negative_ip_adapter_image"),
)


@dataclass(frozen=True)
class _Model:
    """What every part of the description looks at."""

    source: Source
    infos: Mapping[str, ComponentInfo]
    kind: type[DiffusionPipeline]
    code: Anatomy
    call: Mapping[str, inspect.Parameter]
    vae: Any
    denoiser: Mapping[str, Any]
    trust: Trust

    @property
    def weighted(self) -> tuple[str, ...]:
        """The components that are models."""
        return tuple(name for name, info in self.infos.items() if _is_model(self.source, info, self.trust))


def standard_topology(
    source: Source, infos: Mapping[str, ComponentInfo], workflow: str | None = None, trust: Trust = NO_TRUST
) -> Topology:
    """The topology of a standard pipeline: adapter `standard` with three stages where its code lets itself be split,
    otherwise `fused` with one stage and the reason in `notes`.

    Raises Unsupported for a pipeline class that is not installed, one that makes neither pictures nor clips, or a
    workflow that it does not have (listing those it has).
    """
    kind = pipeline_class(read_index(source).class_name)
    call = inspect.signature(kind.__call__).parameters
    if any(name.startswith("audio") for name in call) and "num_frames" not in call:
        raise Unsupported(f"{kind.__name__} makes sounds, not pictures", field="model")
    vae = meta_component(source, infos["vae"], trust) if "vae" in infos else None
    model = _Model(source, infos, kind, anatomy(kind), call, vae, _denoiser_config(source, infos), trust)
    only = _workflow(model)
    if workflow not in (None, only):
        raise Unsupported(f"given {workflow!r}; allowed: {only}", field="workflow")
    reason = _unsplittable(model)
    channels, scale = _latent_channels(model), _latent_scale(model)
    return Topology(
        source=source,
        workflow=only,
        workflows=(only,),
        family=kind.__module__.split(".")[2].replace("_", "-"),
        pipeline_class=kind.__name__,
        adapter="fused" if reason else "standard",
        stages=(_whole(model),) if reason else _stages(model),
        components=dict(infos),
        defaults=_defaults(model, scale),
        spatial_multiple=scale * _patch(model, channels),
        latent_scale=scale,
        latent_channels=channels,
        temporal_scale=_temporal_scale(model.vae) if _makes(call) == "video" else None,
        makes=_makes(call),
        guidance=_guidance(model),
        notes=(f"runs in one piece: {reason}",) if reason else (),
    )


def _is_model(source: Source, info: ComponentInfo, trust: Trust) -> bool:
    if info.files:
        return True
    try:
        return issubclass(component_class(source, info, trust), torch.nn.Module)
    except LoadError:  # said better when it is loaded
        return False


def _denoiser_config(source: Source, infos: Mapping[str, ComponentInfo]) -> Mapping[str, Any]:
    found = next((infos[name] for name in infos if name.startswith(DENOISERS)), None)
    path = Path(source.folder) / found.subfolder / "config.json" if found else None
    return read_json(path) if path and path.is_file() else {}


def _makes(call: Iterable[str]) -> Literal["image", "video"]:
    return "video" if {"num_frames", "video_length", "video"} & set(call) else "image"


def is_media(name: str) -> bool:
    """Whether a pipeline's argument of this name holds pictures."""
    return name.endswith(("image", "images", "video", "mask"))


def _workflow(model: _Model) -> str:
    makes = _makes(model.call)
    if "mask_image" in model.call:
        return "inpaint"
    given = next((name for name in ("video", "image") if name in model.call), None)
    if given:
        return f"{given}2{makes}"
    return f"text2{makes}" if "prompt" in model.call else "unconditional"


def _unsplittable(model: _Model) -> str | None:
    """Why this pipeline's code cannot be run stage by stage; None if it can."""
    name, code = model.kind.__name__, model.code
    if not any(component.startswith(DENOISERS) for component in model.infos):
        return f"{name} has no component called transformer or unet"
    if model.vae is None or not code.mentions("vae", "decode"):
        return f"{name} has no VAE whose decode ends its call"
    if not code.recorded and not any(component.startswith(ENCODERS) for component in model.infos):
        return f"{name} has no encode_prompt and no encoder"
    if "decode_chunk_size" in model.call:
        return f"{name} decodes in several chunks, and the first would be taken for all"
    if "output_type" not in model.call:
        return f"{name} has no output_type"
    return None


def _stages(model: _Model) -> tuple[StageTopology, ...]:
    homes: dict[str, StageName] = {name: _home(model, name) for name in model.weighted if name != "vae"}
    crossing = _crossing(model, homes)
    overlays = [port for port in crossing if port.name == MEDIA and model.code.mentions("apply_overlay")]
    latents = Port(LATENTS, type_hint="torch.Tensor", required=True)
    skeleton = Port(SKELETON, type_hint="dict", required=True)
    made = Port("videos" if _makes(model.call) == "video" else "images", type_hint="torch.Tensor", required=True)
    uses: dict[StageName, set[str]] = {
        "encode": {"vae"} if model.code.mentions("vae", "encode") else set(),
        "denoise": set(),
        "decode": {"vae"},
    }
    for name, home in homes.items():
        uses[home].add(name)
    return (
        _stage(model, "encode", uses["encode"], (), tuple(crossing)),
        _stage(model, "denoise", uses["denoise"], tuple(crossing), (latents, skeleton, *overlays)),
        _stage(model, "decode", uses["decode"], (latents, skeleton, *overlays), (made,)),
    )


def _home(model: _Model, name: str) -> StageName:
    """The stage that runs a model: encoders, and what only the recorded methods use, before the denoiser."""
    if name.startswith(AFTER):
        return "decode"
    encodes = model.code.encodes(name) and not model.code.mentions(name)
    return "encode" if encodes or name.startswith(ENCODERS) else "denoise"


def _crossing(model: _Model, homes: Mapping[str, StageName]) -> list[Port]:
    """What encode gives: the recorded methods' values, those of encoders that are called outside of them, the VAE
    encoder's, and the request's pictures, which the pipeline looks at again in denoise."""
    methods = [
        name for name in model.code.recorded if model.code.encoding[name] & set(model.weighted) or "prompt" in name
    ]
    ports = [Port(name, type_hint="list", required=name == "encode_prompt") for name in methods]
    loose = [name for name, home in homes.items() if home == "encode" and model.code.mentions(name)]
    ports += [Port(name, type_hint="list") for name in loose]
    if model.code.mentions("vae", "encode"):
        ports.append(Port(VAE_ENCODE, type_hint="list"))
    if any(is_media(item.name) for item in _request_inputs(model.call)):
        ports.append(Port(MEDIA, type_hint="dict"))
    return ports


def _stage(
    model: _Model, name: StageName, runs: set[str], inputs: tuple[Port, ...], outputs: tuple[Port, ...]
) -> StageTopology:
    """One stage. Tokenizers and the like, which have no weights, are loaded wherever the code looks at them."""
    weighted = set(model.weighted)
    plain = [
        part
        for part in model.infos
        if part not in weighted and (name == "encode" or model.code.mentions(part) or part == "scheduler")
    ]
    requested = _request_inputs(model.call)
    if name != "encode":
        requested = tuple(item for item in requested if not is_media(item.name))
    return StageTopology(
        name=name,
        blocks=(model.kind.__name__,),
        loads=tuple(part for part in model.infos if part in runs or part in plain),
        reads=tuple(part for part in model.infos if part in weighted and part not in runs),
        request_inputs=requested,
        inputs=inputs,
        outputs=outputs,
    )


def _whole(model: _Model) -> StageTopology:
    made = Port("videos" if _makes(model.call) == "video" else "images", type_hint="torch.Tensor", required=True)
    return StageTopology(
        name="denoise",
        blocks=(model.kind.__name__,),
        loads=tuple(model.infos),
        reads=(),
        request_inputs=_request_inputs(model.call),
        inputs=(),
        outputs=(made,),
    )


def _request_inputs(call: Mapping[str, inspect.Parameter]) -> tuple[InputInfo, ...]:
    """The arguments that a person may give: no run-time objects, and no tensors but pictures."""
    return tuple(
        InputInfo(
            name,
            plain_default(parameter.default),
            parameter.default is parameter.empty,
            hint_name(_annotation(parameter)),
        )
        for name, parameter in call.items()
        if name != "self"
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and name not in _RUN_TIME
        and not name.endswith(("_kwargs", "_embeds", "_attention_mask"))
        and (is_media(name) or "Tensor" not in hint_name(_annotation(parameter)))
    )


def _annotation(parameter: inspect.Parameter) -> Any:
    return None if parameter.annotation is parameter.empty else parameter.annotation


def _latent_scale(model: _Model) -> int:
    vae = model.vae
    if vae is None:
        return 1
    found = vae.config.get("scale_factor_spatial") or vae.config.get("spatial_compression_ratio")
    found = found or getattr(vae, "spatial_compression_ratio", None)
    if found:
        return int(found)
    return 2 ** (len(vae.config.get("block_out_channels") or [0] * 4) - 1)


def _temporal_scale(vae: Any) -> int:
    config = getattr(vae, "config", {})
    found = config.get("scale_factor_temporal") or config.get("temporal_compression_ratio")
    return int(found or getattr(vae, "temporal_compression_ratio", None) or 1)


def _latent_channels(model: _Model) -> int:
    config = model.vae.config if model.vae is not None else {}
    return int(config.get("latent_channels") or config.get("z_dim") or model.denoiser.get("in_channels") or 0)


def _patch(model: _Model, channels: int) -> int:
    """Latents per token along a side: the transformer's patches, or 2 where the pipeline packs 2 × 2 into channels."""
    if channels and model.denoiser.get("in_channels") == 4 * channels:
        return 2
    patch = model.denoiser.get("patch_size") or model.denoiser.get("all_patch_size") or 1
    return int(patch[-1] if isinstance(patch, list | tuple) else patch)


def _guidance(model: _Model) -> Literal["classifier_free", "embedded", "none"]:
    if model.denoiser.get("guidance_embeds") and "guidance_scale" in model.call:
        return "embedded"
    if "negative_prompt" in model.call and guidance_field("classifier_free", model.call):
        return "classifier_free"
    return "none"


def _defaults(model: _Model, scale: int) -> Defaults:
    """From the call's own defaults, then the sizes that the denoiser was trained at, under the folder's own file."""
    trained = model.denoiser
    guidance = _guidance(model)
    field = guidance_field(guidance, model.call)
    found = {
        "width": _default(model, "width") or _times(trained, ("sample_width", "sample_size"), scale),
        "height": _default(model, "height") or _times(trained, ("sample_height", "sample_size"), scale),
        "num_frames": _default(model, "num_frames", "video_length") or trained.get("sample_frames"),
        "fps": _default(model, *FRAME_RATES),
        "num_inference_steps": _default(model, "num_inference_steps"),
        "guidance_scale": _default(model, field) if field else None,
    }
    if _makes(model.call) == "image":
        found["num_frames"] = found["fps"] = None
    found |= folder_defaults(model.source)
    if guidance == "none":
        found["guidance_scale"] = None
    return Defaults(**found)


def _default(model: _Model, *names: str) -> Any:
    parameter = next((model.call[name] for name in names if name in model.call), None)
    return plain_default(parameter.default) if parameter is not None else None


def _times(config: Mapping[str, Any], names: Iterable[str], scale: int) -> int | None:
    side = next((config[name] for name in names if isinstance(config.get(name), int)), None)
    return side * scale if side else None

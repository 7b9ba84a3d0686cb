"""At the door: a request against a topology. Fills in the model's defaults and refuses what it cannot serve."""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triptych.errors import InvalidRequest, LoadError, NotEnoughMemory
from triptych.model.checkpoint import read_json
from triptych.model.declared import FRAME_RATES, OUTPUT_COUNTS
from triptych.model.topology import InputInfo, Topology
from triptych.request import MAX_SIDE, Request

RENAMED = {"images": "image", "mask": "mask_image"}
OWN = ("generator", "output_type", "latents", "callback_on_step_end", "return_dict", "prompt_embeds")
PLAIN = (
    "negative_prompt",
    "width",
    "height",
    "num_frames",
    "num_inference_steps",
    "sigmas",
    "strength",
    "max_sequence_length",
)


@dataclass(frozen=True)
class Resolved:
    """A request that this topology can serve: with every known default filled in, and the pipeline's own fields."""

    request: Request
    workflow: str
    fields: dict[str, Any]
    guidance_scale: float | None
    warnings: tuple[str, ...]

    @property
    def seed(self) -> int:
        """The seed, drawn if the person gave none."""
        assert self.request.seed is not None
        return self.request.seed


def inputs_of(topology: Topology) -> dict[str, InputInfo]:
    """Every field that the pipeline's code declares, of all stages; the first stage's declaration wins."""
    found: dict[str, InputInfo] = {}
    for stage in topology.stages:
        for item in stage.request_inputs:
            found.setdefault(item.name, item)
    return found


def extras_of(topology: Topology) -> list[str]:
    """The names that `Request.extra` may hold for this model."""
    named = {*PLAIN, *RENAMED.values(), *OUTPUT_COUNTS, *FRAME_RATES, *OWN, "prompt", "guidance_scale"}
    return sorted(name for name in inputs_of(topology) if name not in named and not name.endswith("_embeds"))


def resolve(topology: Topology, request: Request, memory: int | None = None) -> Resolved:
    """What the stages are to be given. `memory`: bytes that the work may take, None for no check.

    Raises InvalidRequest naming the field, or NotEnoughMemory.
    """
    declared = inputs_of(topology)
    request = _with_defaults(topology, request, declared)
    _check_images(topology, request, declared)
    _check_size(topology, request)
    _check_guidance(topology, request)
    _check_steps(topology, request)
    fields = _fields(topology, request, declared)
    if memory is not None:
        _check_memory(topology, request, memory)
    words = unknown_words(topology, request)
    warnings = tuple(f"this model does not know the word {word!r}: the picture will not show it" for word in words)
    return Resolved(request, _workflow(topology, request), fields, request.guidance_scale, warnings)


def _workflow(topology: Topology, request: Request) -> str:
    """Which of the model's workflows this request is, by what it brings."""
    if request.mask is not None and "inpaint" in topology.workflows:
        return "inpaint"
    if request.images:
        texts = _text_only(topology)
        return next((name for name in topology.workflows if name not in texts), topology.workflow)
    return topology.workflow


def _with_defaults(topology: Topology, request: Request, declared: dict[str, InputInfo]) -> Request:
    """The request with the defaults of what this topology takes, of nothing else."""
    default = topology.defaults
    filled: dict[str, Any] = {"seed": secrets.randbelow(2**31) if request.seed is None else request.seed}
    fillable = {name for name in ("width", "height", "num_frames", "num_inference_steps") if name in declared}
    if topology.guidance != "none":
        fillable.add("guidance_scale")
    if request.images:
        fillable -= {"width", "height"}
    if request.aspect_ratio:
        if not {"width", "height"} <= declared.keys():
            allowed = f"nothing (this model's {topology.workflow} has one size)"
            raise InvalidRequest.of("aspect_ratio", request.aspect_ratio, allowed)
        filled["width"], filled["height"] = _from_ratio(topology, request)
        filled["aspect_ratio"] = None
    if request.sigmas is not None and request.num_inference_steps is None:
        filled["num_inference_steps"] = len(request.sigmas)
    for name in fillable - filled.keys():
        if getattr(request, name) is None:
            filled[name] = getattr(default, name)
    if topology.makes == "video":
        filled["fps"] = float(request.fps or default.fps or 16)
    return request.model_copy(update=filled)


def _from_ratio(topology: Topology, request: Request) -> tuple[int, int]:
    """The size of that ratio nearest to the default's area, in whole multiples. Raises InvalidRequest if a side would
    be longer than any request may ask for."""
    wide, high = request.ratio()
    area = (topology.defaults.width or 1024) * (topology.defaults.height or 1024)
    multiple = topology.spatial_multiple
    height = (area * high / wide) ** 0.5
    sides = (height * wide / high, height)
    width, height = (max(multiple, round(side / multiple) * multiple) for side in sides)
    if max(width, height) > MAX_SIDE:
        allowed = f"ratios whose longer side is at most {MAX_SIDE} pixels (this one makes {width}×{height})"
        raise InvalidRequest.of("aspect_ratio", request.aspect_ratio, allowed)
    return width, height


def _check_images(topology: Topology, request: Request, declared: dict[str, InputInfo]) -> None:
    image = declared.get("image")
    takes = image is not None
    if request.images and not takes:
        raise InvalidRequest.of("images", f"{len(request.images)} images", f"none ({topology.workflow} takes no image)")
    if len(request.images) > 1 and image is not None and _takes_one(image.type_hint):
        raise InvalidRequest.of("images", f"{len(request.images)} images", f"1 ({topology.workflow} works on one)")
    if request.strength is not None and not request.images:
        raise InvalidRequest.of("strength", request.strength, "nothing without images")
    if not request.images and topology.workflow not in _text_only(topology) and takes:
        raise InvalidRequest.of("images", "none", f"at least one ({topology.workflow} works on an image)")
    if request.mask is not None and "mask_image" not in declared:
        raise InvalidRequest.of("mask", "a mask", f"none ({topology.workflow} takes no mask)")
    if topology.workflow == "inpaint" and request.mask is None:
        raise InvalidRequest.of("mask", "none", "a mask (inpaint works inside one)")


def _takes_one(hint: str) -> bool:
    """Whether the hint of an input for pictures says one picture, and nothing that may hold several."""
    words = set(re.findall(r"\w+", hint))
    return "Image" in words and words <= {"PIL", "Image", "None", "Optional", "typing", "Union"}


def _text_only(topology: Topology) -> tuple[str, ...]:
    """The workflows of this model that need no image."""
    return tuple(name for name in topology.workflows if name.startswith("text2"))


def _check_size(topology: Topology, request: Request) -> None:
    multiple = topology.spatial_multiple
    for name in ("width", "height"):
        value = getattr(request, name)
        if value is not None and value % multiple:
            near = max(multiple, round(value / multiple) * multiple)
            raise InvalidRequest.of(name, value, f"multiples of {multiple}, such as {near}")
    frames, scale = request.num_frames, topology.temporal_scale
    if frames is not None and topology.makes != "video":
        raise InvalidRequest.of("num_frames", frames, "nothing (this model makes pictures)")
    if frames is not None and scale and (frames - 1) % scale:
        near = max(0, round((frames - 1) / scale)) * scale + 1
        raise InvalidRequest.of("num_frames", frames, f"{scale} × k + 1, such as {near}")
    if request.fps is not None and topology.makes != "video":
        raise InvalidRequest.of("fps", request.fps, "nothing (this model makes pictures)")
    wanted = ("mp4",) if topology.makes == "video" else ("png", "webp", "jpeg")
    if request.output_format is not None and request.output_format not in wanted:
        raise InvalidRequest.of("output_format", request.output_format, wanted)


def _check_guidance(topology: Topology, request: Request) -> None:
    if request.negative_prompt is not None and topology.guidance != "classifier_free":
        raise InvalidRequest.of(
            "negative_prompt", request.negative_prompt, "nothing (this model has no classifier-free guidance)"
        )
    if request.guidance_scale is not None and topology.guidance == "none" and request.guidance_scale not in (0, 1):
        raise InvalidRequest.of("guidance_scale", request.guidance_scale, "nothing (this model takes no guidance)")


def _check_steps(topology: Topology, request: Request) -> None:
    """A schedule that is stretched to end at a given noise level cannot consist of its beginning alone: diffusers
    divides zero by zero."""
    if request.num_inference_steps != 1 or (request.sigmas is not None and request.sigmas[0] < 1):
        return
    scheduler = topology.components.get("scheduler")
    path = Path(topology.source.folder) / scheduler.subfolder / "scheduler_config.json" if scheduler else None
    if path is not None and path.is_file() and read_json(path).get("shift_terminal"):
        allowed = "2 or more (this model's schedule ends at a noise level of its own)"
        raise InvalidRequest.of("num_inference_steps", 1, allowed)


def _fields(topology: Topology, request: Request, declared: dict[str, InputInfo]) -> dict[str, Any]:
    """The request in the pipeline's own names. Raises InvalidRequest for a field that it does not declare."""
    fields: dict[str, Any] = {}
    if "prompt" in declared:
        fields["prompt"] = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
    elif any(request.prompts):
        raise InvalidRequest.of("prompt", request.prompt, "the empty one (this model takes no text)")
    for name in PLAIN:
        value = getattr(request, name)
        if value is None:
            continue
        if name not in declared:
            raise InvalidRequest.of(name, value, f"nothing (this model's {topology.workflow} has no such input)")
        fields[name] = list(value) if isinstance(value, tuple) else value
    if request.images:
        fields["image"] = request.images[0] if len(request.images) == 1 else list(request.images)
    if request.mask is not None:
        fields["mask_image"] = request.mask
    if request.guidance_scale is not None and "guidance_scale" in declared:
        fields["guidance_scale"] = request.guidance_scale
    rate = next((name for name in FRAME_RATES if name in declared), None)
    if rate is not None and request.fps is not None:
        fields[rate] = int(request.fps) if request.fps == int(request.fps) else request.fps
    fields.update(_count(request, declared))
    fields.update(_extras(topology, request, declared))
    return fields


def _count(request: Request, declared: dict[str, InputInfo]) -> dict[str, int]:
    if request.num_outputs == 1:
        return {}
    name = next((name for name in OUTPUT_COUNTS if name in declared), None)
    if name is None:
        raise InvalidRequest.of("num_outputs", request.num_outputs, "1 (this model makes one at a time)")
    return {name: request.num_outputs}


def _extras(topology: Topology, request: Request, declared: dict[str, InputInfo]) -> dict[str, Any]:
    allowed = extras_of(topology)
    for name, value in request.extra.items():
        if name not in allowed:
            raise InvalidRequest.of("extra", name, allowed or "nothing (this model declares no further inputs)")
        _check_type(name, value, declared[name].type_hint)
    return dict(request.extra)


_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def _check_type(name: str, value: Any, hint: str) -> None:
    """Compares a plain value with the declared hint, as far as the hint names plain types; where there is none, with
    what the name means in every pipeline."""
    if not hint and name.endswith("_kwargs"):
        hint = "dict"
    elif not hint and re.fullmatch(r"(negative_)?prompt_\d", name):
        hint = "str | list"
    words = set(re.findall(r"\w+", hint)) - {"None", "Optional", "Union", "typing", "class"}
    if not words or value is None or not words <= {*_TYPES, "list", "List", "dict", "Dict", "tuple", "Any"}:
        return
    kinds: tuple[type, ...] = tuple(kind for word in words for kind in _TYPES.get(word, ()))
    if words & {"list", "List", "tuple"}:
        kinds += (list, tuple)
    if words & {"dict", "Dict", "Any"}:
        kinds += (dict, object) if "Any" in words else (dict,)
    if isinstance(value, bool) and bool not in kinds and object not in kinds:
        raise InvalidRequest.of(f"extra.{name}", value, hint)
    if not isinstance(value, kinds):
        raise InvalidRequest.of(f"extra.{name}", value, hint)


def activation_bytes(topology: Topology, request: Request) -> int:
    """A rough lower bound of what decoding takes beyond the weights: the finest layer of a VAE holds about 96
    channels per pixel, in and out, in the smallest common dtype (2 bytes), for the frames that one latent makes."""
    width, height = made_size(topology, request)
    return decoding_bytes(topology, width, height, request.num_frames or 1, request.num_outputs * len(request.prompts))


def decoding_bytes(topology: Topology, width: int, height: int, frames: int, outputs: int) -> int:
    """The same for so many pictures, or clips of so many frames, of that size."""
    at_once = min(frames, topology.temporal_scale or 1)
    return width * height * outputs * (at_once * 96 * 2 * 2 + frames * 3 * 4)


def made_size(topology: Topology, request: Request) -> tuple[int, int]:
    """Width and height of what will be made: asked for, else the default of an input that the model takes, else the
    picture's own, else what the model was made for. 0 if nothing tells."""
    declared, default = inputs_of(topology), topology.defaults
    own = request.images[0].size if request.images else (None, None)

    def side(name: str, pixels: int | None) -> int:
        known = getattr(default, name)
        return getattr(request, name) or (known if name in declared else None) or pixels or known or 0

    return side("width", own[0]), side("height", own[1])


def _check_memory(topology: Topology, request: Request, memory: int) -> None:
    # A tiny VAE has far fewer channels than the bound assumes: below a gigabyte nobody's memory is at stake.
    needed = activation_bytes(topology, request)
    if needed > max(memory, 2**30):
        width, height = made_size(topology, request)
        size = f"{width}×{height}" + (f"×{request.num_frames}" if request.num_frames else "")
        raise NotEnoughMemory(
            f"{size} × {request.num_outputs * len(request.prompts)} takes about {needed / 2**30:.1f} GiB to decode, "
            f"{memory / 2**30:.1f} GiB are free",
            field="width, height",
        )


def unknown_words(topology: Topology, request: Request) -> list[str]:
    """The words of the prompts that a model of closed vocabulary was never taught, in order of appearance."""
    path = Path(topology.source.folder) / "vocabulary.json"
    if not path.is_file():
        return []
    known = _vocabulary(path)
    texts = list(request.prompts)
    if request.negative_prompt is not None:
        texts += [request.negative_prompt] if isinstance(request.negative_prompt, str) else request.negative_prompt
    words = (word for text in texts for word in re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower()))
    return list(dict.fromkeys(word for word in words if word not in known))


def _vocabulary(path: Path) -> set[str]:
    """The words of a vocabulary.json: a list, or an object whose `words` is one. Raises LoadError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path} is not valid JSON ({error})", field="model") from None
    words = content.get("words") if isinstance(content, dict) else content
    if not isinstance(words, list | dict) or not all(isinstance(word, str) for word in words):
        raise LoadError(f"{path} holds no list of words", field="model")
    return set(words)

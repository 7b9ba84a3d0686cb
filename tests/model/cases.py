"""What the split tests run: every family as it is, without guidance, with several outputs, with pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.families import FAMILIES, folder, picture
from triptych.model import Components, Placement, Topology, describe, open_model
from triptych.model.modular import with_token_types
from triptych.model.pipeline import assemble, pipeline_class

CPU = Placement(torch.device("cpu"))
SEED = 7


@dataclass(frozen=True)
class Case:
    """One run of one family. `standard` are the standard pipeline's arguments, `pipeline` its class where another
    than the folder's own does the work; `standard` None: no standard pipeline does the same."""

    family: str
    label: str
    fields: Mapping[str, Any]
    guidance_scale: float | None
    standard: Mapping[str, Any] | None
    pipeline: str | None = None
    workflow: str | None = None

    @property
    def name(self) -> str:
        """Its name in the test report."""
        return f"{self.family}, {self.label}"


@dataclass(frozen=True)
class Pictured:
    """A family run on pictures: its workflow, what is added to its fields, the standard pipeline that does it."""

    family: str
    workflow: str
    fields: dict[str, Any]
    pipeline: str | None
    without: tuple[str, ...] = ()
    """Fields that the standard pipeline does not take."""
    comparable: bool = True
    """False where the standard pipeline does something else."""


def _mask() -> Image.Image:
    return Image.fromarray(np.pad(np.full((32, 32), 255, np.uint8), 16))


def _pictured() -> list[Pictured]:
    image = {"image": picture(3)}
    noised = {**image, "strength": 0.7, "num_inference_steps": 4}
    masked = {**noised, "mask_image": _mask()}
    size = ("height", "width")
    return [
        Pictured("flux", "image2image", noised, "FluxImg2ImgPipeline"),
        Pictured("flux2-klein", "edit", image, None),
        # Blocks take the mode of the VAE's distribution, the standard pipelines draw from it.
        Pictured("qwen-image", "image2image", noised, None, comparable=False),
        Pictured("qwen-image", "inpaint", masked, None, comparable=False),
        Pictured("z-image", "image2image", noised, "ZImageImg2ImgPipeline"),
        Pictured("sd3", "image2image", noised, "StableDiffusion3Img2ImgPipeline"),
        Pictured("sdxl", "image2image", noised, "StableDiffusionXLImg2ImgPipeline", size),
        # Blocks draw for the masked picture before they draw the noise, the standard pipeline after.
        Pictured("sdxl", "inpaint", masked, None, comparable=False),
        Pictured("ltx", "image2video", image, "LTXImageToVideoPipeline"),
    ]


def _of_family(name: str) -> Iterator[Case]:
    family = FAMILIES[name]
    fields, scale, standard = family.fields, family.guidance_scale, family.standard
    yield Case(name, "as it is", fields, scale, standard)
    if family.off:
        yield Case(name, "no guidance", fields, family.unguided, {**standard, **family.off})
    if family.two:
        two = {**standard, **(family.two_standard or family.two)}
        yield Case(name, "2 prompts × 2", {**fields, **family.two}, scale, two)
    for item in _pictured():
        if item.family == name:
            given = {**standard, **item.fields}
            given = {key: value for key, value in given.items() if key not in item.without}
            reference = given if item.comparable else None
            own = {**fields, **item.fields}
            yield Case(name, item.workflow, own, scale, reference, item.pipeline, item.workflow)


CASES = [case for name in FAMILIES for case in _of_family(name)]


def topology_of(case: Case) -> Topology:
    """The case's topology."""
    return describe(open_model(str(folder(case.family))), case.workflow)


def standard_result(case: Case, topology: Topology) -> torch.Tensor:
    """What the standard pipeline makes of the case, with what diffusers gets wrong put right from outside: positions
    of pictures in Qwen2.5-VL, and HunyuanVideo 1.5's decoder, which fails on more than one clip at a time."""
    components = Components(topology.source)
    held = {name: components.get(info, CPU) for name, info in topology.components.items()}
    if topology.family.startswith("qwen-image-edit"):
        held["text_encoder"] = with_token_types(held["text_encoder"])
    if topology.family == "hunyuan-video-1.5":
        held["vae"].enable_slicing()
    with open(f"{topology.source.folder}/model_index.json", encoding="utf-8") as file:
        index = json.load(file)
    pipe = assemble(index, pipeline_class(case.pipeline or index["_class_name"]), held)
    arguments = deepcopy(dict(case.standard or {}))
    made = pipe(generator=torch.Generator().manual_seed(SEED), output_type="pt", **arguments)[0]
    return torch.stack(list(made)) if isinstance(made, list) else torch.as_tensor(made)

"""One request, three ways: Triptych's engine, diffusers' unsplit modular pipeline, its standard pipeline.

Each `open_*` loads a folder in fp32 on the CPU and returns a function from a request's fields to its
pictures: uint8 of shape (pictures or frames, height, width, 3). Imports are inside, so that a process pays
only for its own way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych import Result

__all__ = ["CONTENDERS", "Run", "open_modular", "pictures_in"]

Run = Callable[[dict[str, Any]], Any]


def open_triptych(folder: str) -> Run:
    """Through `Engine`, in this process."""
    from triptych import Engine, Request

    engine = Engine.open(folder, device="cpu")

    def run(fields: dict[str, Any]) -> Any:
        return pictures_in(engine.generate(Request.parse(**fields)))

    return run


def pictures_in(result: Result) -> Any:
    """An engine's pictures, or the frames of its clip."""
    import numpy as np

    return result.clips[0].frames if result.clips else np.stack([np.asarray(image) for image in result.images])


def open_modular(folder: str) -> Run:
    """Through all blocks of the modular pipeline in one call."""
    import torch
    from diffusers import ClassifierFreeGuidance, ModularPipeline

    pipe: Any = ModularPipeline.from_pretrained(folder)
    pipe.load_components(torch_dtype=torch.float32)
    _silence(pipe._blocks)  # `blocks` is a copy
    guider: Any = None

    def run(fields: dict[str, Any]) -> Any:
        nonlocal guider
        given, generator = _split_seed(fields)
        if "guider" in pipe.component_names:
            scale = given.pop("guidance_scale")
            if guider is None or guider.guidance_scale != scale:
                guider = ClassifierFreeGuidance(guidance_scale=scale)
                pipe.update_components(guider=guider)
        state = pipe(**given, generator=generator)
        return _pictures(state.values.get("images", state.values.get("videos")))

    return run


def _silence(block: Any) -> None:
    """No progress bar in a block or in any block inside it: the pipeline's own switch does not reach them."""
    if hasattr(block, "set_progress_bar_config"):
        block.set_progress_bar_config(disable=True)
    for inner in getattr(block, "sub_blocks", {}).values():
        _silence(inner)


def open_standard(folder: str) -> Run:
    """Through `DiffusionPipeline`."""
    import torch
    from diffusers import DiffusionPipeline

    pipe: Any = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    accepted = inspect.signature(pipe.__call__).parameters

    def run(fields: dict[str, Any]) -> Any:
        given, generator = _split_seed(fields)
        if "true_cfg_scale" in accepted and "negative_prompt" in given:
            given["true_cfg_scale"] = given.pop("guidance_scale")
        return _pictures(pipe(**given, generator=generator)[0])

    return run


def _split_seed(fields: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The fields without the seed, and a generator seeded as Triptych seeds its own."""
    import torch

    given = dict(fields)
    return given, torch.Generator("cpu").manual_seed(given.pop("seed"))


def _pictures(made: Any) -> Any:
    """What a pipeline returned (PIL pictures, or clips as float arrays or PIL pictures) as uint8."""
    import numpy as np

    if isinstance(made, np.ndarray):
        return (made[0] * 255).round().clip(0, 255).astype("uint8")
    pictures = made[0] if isinstance(made[0], list) else made
    if isinstance(pictures, np.ndarray):
        return (pictures * 255).round().clip(0, 255).astype("uint8")
    return np.stack([np.asarray(picture) for picture in pictures])


CONTENDERS: dict[str, Callable[[str], Run]] = {
    "triptych": open_triptych,
    "modular": open_modular,
    "standard": open_standard,
}

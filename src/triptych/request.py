"""What a person asks for and what comes back: one vocabulary for the command line, HTTP and the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from triptych.errors import InvalidRequest

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Clip", "Progress", "Request", "Result", "StageName", "StageTime", "VaeTask"]

StageName = Literal["encode", "denoise", "decode"]
VaeTask = Literal["vae.decode", "vae.encode"]
"""A task without a request: a call of the model's VAE by itself."""
ImageFormat = Literal["png", "webp", "jpeg"]
VideoFormat = Literal["mp4"]

MAX_SIDE = 16384
MAX_STEPS = 1000
MAX_OUTPUTS = 64

DISAGREE = "fields_disagree"
"""The type of our own errors among pydantic's."""


class Request(BaseModel):
    """One request. Fields left out (None) take the model's own defaults; unknown fields are errors.

    Sizes are in pixels, `fps` in frames per second, `seed` any 63-bit integer (None: drawn at random and told in the
    result). `images` are decoded pictures: reading a file or a URL is the caller's business, never the engine's.
    Construct with `Request.parse(...)` to get `InvalidRequest` (which names the field) instead of pydantic's error.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    prompt: str | tuple[str, ...]
    negative_prompt: str | tuple[str, ...] | None = None
    images: tuple[Image.Image, ...] = ()
    mask: Image.Image | None = None
    width: int | None = Field(None, ge=1, le=MAX_SIDE)
    height: int | None = Field(None, ge=1, le=MAX_SIDE)
    aspect_ratio: str | None = Field(None, pattern=r"^\d{1,4}:\d{1,4}$")
    num_frames: int | None = Field(None, ge=1, le=10_000)
    fps: float | None = Field(None, gt=0, le=240)
    num_inference_steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    guidance_scale: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    shift: float | None = Field(None, gt=0, le=100, allow_inf_nan=False)
    sigmas: tuple[FiniteFloat, ...] | None = Field(None, min_length=1, max_length=MAX_STEPS)
    seed: int | None = Field(None, ge=0, lt=2**63)
    num_outputs: int = Field(1, ge=1, le=MAX_OUTPUTS)
    strength: float | None = Field(None, gt=0, le=1)
    max_sequence_length: int | None = Field(None, ge=1, le=8192)
    output_format: ImageFormat | VideoFormat | None = None
    extra: dict[str, Any] = Field(default_factory=dict)
    """Inputs that only this model declares (`triptych inspect` lists them), checked against that declaration."""

    @classmethod
    def parse(cls, **fields: Any) -> Request:
        """Builds a request. Raises InvalidRequest naming the first wrong field, what was given and what is allowed."""
        try:
            return cls(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            if first["type"] == DISAGREE:
                context = first.get("ctx", {})
                raise InvalidRequest.of(context["field"], context["given"], context["allowed"]) from None
            name = str(first["loc"][0]) if first["loc"] else "request"
            if first["type"] == "extra_forbidden":
                raise InvalidRequest.of("request", name, sorted(cls.model_fields)) from None
            raise InvalidRequest.of(name, first.get("input"), first["msg"].removeprefix("Input should be ")) from None

    @field_validator("prompt", "negative_prompt", "images", "sigmas", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("prompt")
    @classmethod
    def _some_prompt(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(value, tuple) and not 1 <= len(value) <= MAX_OUTPUTS:
            raise _disagreement("prompt", f"{len(value)} prompts", f"1 to {MAX_OUTPUTS} prompts")
        return value

    @model_validator(mode="after")
    def _agree(self) -> Request:
        if self.aspect_ratio and (self.width or self.height):
            raise _disagreement("aspect_ratio", self.aspect_ratio, "nothing beside width or height")
        if self.aspect_ratio and 0 in self.ratio():
            raise _disagreement("aspect_ratio", self.aspect_ratio, "two sides above 0")
        negative, prompts = self.negative_prompt, len(self.prompts)
        if isinstance(negative, tuple) and len(negative) != prompts:
            raise _disagreement("negative_prompt", f"{len(negative)} entries", f"one, or {prompts} as for prompt")
        if self.mask is not None and not self.images:
            raise _disagreement("mask", "a mask", "none without images")
        sigmas, steps = self.sigmas, self.num_inference_steps
        if sigmas is not None and steps is not None and len(sigmas) != steps:
            raise _disagreement("sigmas", f"{len(sigmas)} sigmas", f"{steps}, as many as num_inference_steps")
        return self

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts as a tuple."""
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt

    def ratio(self) -> tuple[int, int]:
        """The aspect ratio's two sides; (1, 1) when none was given."""
        wide, high = (self.aspect_ratio or "1:1").split(":")
        return int(wide), int(high)


def _disagreement(field: str, given: str, allowed: str) -> PydanticCustomError:
    """What a check of several fields raises inside pydantic, which knows of no field there."""
    return PydanticCustomError(
        DISAGREE, "{field}: given {given}; allowed: {allowed}", {"field": field, "given": given, "allowed": allowed}
    )


@dataclass(frozen=True)
class Progress:
    """One unit of work done. `step` of `steps`, counted within the stage; `seconds` since the stage began this job.
    `preview` is a small picture of what the latents hold now, only when asked for."""

    job: str
    stage: StageName
    step: int
    steps: int
    seconds: float
    preview: Image.Image | None = None


@dataclass(frozen=True)
class StageTime:
    """What a stage spent on a job: `seconds` of wall time from its assignment to its output, of which `ran` from its
    start in the stage to what it made (beside others' steps, if there were any), `steps` done, `peak_bytes` of device
    memory (of the process' resident memory on a CPU)."""

    stage: StageName
    seconds: float
    steps: int
    peak_bytes: int
    ran: float = 0.0


@dataclass(frozen=True)
class Clip:
    """A video: `frames` is uint8 of shape (frames, height, width, 3)."""

    frames: np.ndarray
    fps: float


@dataclass(frozen=True)
class Result:
    """What a request made. `outputs` holds prompts × num_outputs pictures (or clips), prompt by prompt. `request` has
    every default filled in (seed too), so that running it again gives the same outputs."""

    job: str
    model: str
    workflow: str
    request: Request
    outputs: tuple[Image.Image | Clip, ...]
    times: tuple[StageTime, ...]
    warnings: tuple[str, ...] = field(default=())

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The outputs that are pictures."""
        return tuple(output for output in self.outputs if isinstance(output, Image.Image))

    @property
    def clips(self) -> tuple[Clip, ...]:
        """The outputs that are clips."""
        return tuple(output for output in self.outputs if isinstance(output, Clip))

"""What a model consists of and what crosses between its stages: plain data, no torch, no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

StageName = Literal["encode", "denoise", "decode"]
STAGES: tuple[StageName, ...] = ("encode", "denoise", "decode")

Adapter = Literal["modular", "standard", "fused"]
"""How a pipeline's code is run: Modular Diffusers blocks per stage; a standard pipeline replayed per stage
with the other stages' components answering from what crossed; or unsplit, everything in `denoise`."""


@dataclass(frozen=True)
class Source:
    """Where a model's files are. `folder` is a local directory holding model_index.json (for a hub id: the
    snapshot with its small files only, until weights are asked for)."""

    name: str
    folder: str
    kind: Literal["embedded", "folder", "hub"]
    revision: str | None = None
    offline: bool = False


@dataclass(frozen=True)
class ComponentInfo:
    """One entry of a pipeline: its class, where its weights lie, and how large they are on disk."""

    name: str
    library: str
    class_name: str
    subfolder: str
    parameters: int = 0
    bytes: int = 0
    dtype: str | None = None
    files: tuple[str, ...] = ()
    causal: bool | None = None
    """For text encoders: True if a changed suffix leaves the prefix's states unchanged. None for the rest."""


@dataclass(frozen=True)
class Port:
    """A named value that crosses a boundary. `tag` is Modular Diffusers' kwargs_type, kept with the value."""

    name: str
    tag: str | None = None
    type_hint: str = ""
    required: bool = False


@dataclass(frozen=True)
class InputInfo:
    """A request field that a stage's pipeline code declares, with its default."""

    name: str
    default: Any = None
    required: bool = False
    type_hint: str = ""
    description: str = ""


@dataclass(frozen=True)
class StageTopology:
    """One stage of one (model, workflow): the blocks it runs, what it loads, what it only reads the config of,
    the request fields it takes, and the values it takes from and gives to other stages."""

    name: StageName
    blocks: tuple[str, ...]
    loads: tuple[str, ...]
    reads: tuple[str, ...]
    request_inputs: tuple[InputInfo, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


@dataclass(frozen=True)
class Defaults:
    """A model's own defaults for the fields a request leaves out. None: the pipeline decides."""

    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None


@dataclass(frozen=True)
class Topology:
    """A model opened for one workflow. `stages` has one entry under adapter `fused` (its name is `denoise`)."""

    source: Source
    workflow: str
    workflows: tuple[str, ...]
    family: str
    pipeline_class: str
    adapter: Adapter
    stages: tuple[StageTopology, ...]
    components: dict[str, ComponentInfo]
    defaults: Defaults
    spatial_multiple: int
    """Width and height must be multiples of this many pixels."""
    latent_scale: int
    """Pixels per latent, along width and height."""
    latent_channels: int
    temporal_scale: int | None
    """Frames per latent frame; num_frames - 1 must be a multiple of it. None for pictures."""
    makes: Literal["image", "video"]
    guidance: Literal["classifier_free", "embedded", "none"]
    """`classifier_free`: guidance_scale mixes two branches and negative_prompt works; `embedded`: guidance_scale is
    an input of the transformer and a negative prompt has no use; `none`: neither."""
    notes: tuple[str, ...] = ()
    """What is unsupported and why, one sentence each."""

    def stage(self, name: StageName) -> StageTopology:
        """The stage of that name. Raises KeyError if this topology has none."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)

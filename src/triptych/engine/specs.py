"""From a request that the topology can serve to what the cluster is to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from triptych.cluster import JobSpec, StageSpec
from triptych.messages import Encoding
from triptych.model import Resolved, Topology
from triptych.request import Request
from triptych.transfer import Payload

__all__ = ["Options", "pictures_of", "spec_of"]

PICTURES = ("image", "mask_image")
"""The pipelines' own names of the fields that hold pictures."""


@dataclass(frozen=True)
class Options:
    """How a job is to be run, beside what its request asks for: whose it is, how urgent, and how it is watched.
    `deadline`: seconds after which nobody wants it any more."""

    preview: bool = False
    client: str = ""
    priority: int = 0
    deadline: float | None = None
    exact: bool = False
    files: bool = False
    """outputs as files in the request's format, instead of pixels"""


def spec_of(topology: Topology, job: str, resolved: Resolved, options: Options, pictures: str | None) -> JobSpec:
    """The job's stages, each with the fields that its pipeline code declares and nothing else."""
    request = resolved.request
    stages = []
    for part in topology.stages:
        declared = {item.name for item in part.request_inputs}
        given = {name: value for name, value in resolved.fields.items() if name in declared}
        plain = {name: value for name, value in given.items() if name not in PICTURES}
        stages.append(StageSpec(stage=part.name, fields=plain, pictures=plain.keys() != given.keys()))
    return JobSpec(
        id=job,
        stages=tuple(stages),
        seed=resolved.seed,
        guidance_scale=resolved.guidance_scale,
        shift=request.shift,
        pictures=pictures,
        preview=options.preview,
        exact=options.exact,
        encoding=_encoding(topology, request) if options.files else None,
        work=_work(topology, request),
        client=options.client,
        priority=options.priority,
        deadline=options.deadline,
        request=request.model_dump(mode="json", exclude={"images", "mask"}, exclude_none=True),
        workflow=resolved.workflow,
        warnings=resolved.warnings,
    )


def _encoding(topology: Topology, request: Request) -> Encoding:
    video = topology.makes == "video"
    return Encoding(format=request.output_format or ("mp4" if video else "png"), fps=request.fps)


def _work(topology: Topology, request: Request) -> float:
    """Pixels × frames × outputs, which a job's units are measured by."""
    width = request.width or topology.defaults.width or 1024
    height = request.height or topology.defaults.height or 1024
    outputs = len(request.prompts) * request.num_outputs
    return float(width * height * (request.num_frames or 1) * outputs)


def pictures_of(fields: Mapping[str, Any]) -> Payload | None:
    """The pictures among a request's fields as uint8 tensors (height, width[, channels]); None if there are none."""
    found = {name: _tensors(fields[name]) for name in PICTURES if fields.get(name) is not None}
    return Payload(found) if found else None


def _tensors(value: Any) -> Any:
    if isinstance(value, Sequence):
        return [_tensors(item) for item in value]
    assert isinstance(value, Image.Image)
    return torch.from_numpy(np.array(value))

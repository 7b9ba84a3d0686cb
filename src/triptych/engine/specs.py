"""From a request that the topology can serve to what the cluster is to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from msgspec import structs
from PIL import Image

from triptych.cluster import JobSpec, StageSpec
from triptych.errors import InvalidRequest
from triptych.messages import Encoding
from triptych.model import Resolved, Topology
from triptych.request import Request, Result

if TYPE_CHECKING:
    from triptych.transfer import Payload

__all__ = ["Options", "Signing", "pictures_of", "spec_of"]

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
    trace: str = ""
    """the W3C `traceparent` that the job belongs to"""
    id: str | None = None
    """the job's; None: a new one"""
    digest: str = ""
    """of what was asked, kept with the job"""


@dataclass(frozen=True)
class Signing:
    """Files say how they were made: by which version of Triptych, in which dtype if one was asked for."""

    version: str
    dtype: str | None


def spec_of(
    topology: Topology, job: str, resolved: Resolved, options: Options, pictures: str | None,
    signing: Signing | None = None,
) -> JobSpec:  # fmt: skip
    """The job's stages, each with the fields that its pipeline code declares and nothing else."""
    request, warnings = resolved.request, resolved.warnings
    encoding = _encoding(topology, request) if options.files else None
    if encoding is not None and signing is not None:
        try:
            encoding = structs.replace(encoding, metadata=_settings(topology, resolved, signing))
        except InvalidRequest as error:  # what is made is worth more than what it says of itself
            warnings = (*warnings, f"its files are without their settings: {error.message}")
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
        encoding=encoding,
        work=_work(topology, request),
        rows=len(request.prompts) * request.num_outputs,
        trace=options.trace,
        client=options.client,
        digest=options.digest,
        priority=options.priority,
        deadline=options.deadline,
        request=request.model_dump(mode="json", exclude={"images", "mask"}, exclude_none=True),
        workflow=resolved.workflow,
        warnings=warnings,
    )


def _encoding(topology: Topology, request: Request) -> Encoding:
    video = topology.makes == "video"
    return Encoding(format=request.output_format or ("mp4" if video else "png"), fps=request.fps)


def _settings(topology: Topology, resolved: Resolved, signing: Signing) -> dict[str, Any]:
    """What is written into every file of a request, each under its own number. Raises InvalidRequest if it is too long,
    or not JSON."""
    from triptych.decode import encode_settings, settings_of

    source, request = topology.source, resolved.request
    settings = settings_of(
        Result("", source.name, resolved.workflow, request, (), ()),
        version=signing.version,
        source=source.kind,
        revision=source.revision,
        dtype=signing.dtype,
        output=len(request.prompts) * request.num_outputs - 1,
    )
    encode_settings(settings)
    return settings.model_dump(mode="json", exclude_none=True)


def _work(topology: Topology, request: Request) -> float:
    """Pixels × frames × outputs, which a job's units are measured by."""
    width = request.width or topology.defaults.width or 1024
    height = request.height or topology.defaults.height or 1024
    outputs = len(request.prompts) * request.num_outputs
    return float(width * height * (request.num_frames or 1) * outputs)


def pictures_of(fields: Mapping[str, Any]) -> Payload | None:
    """The pictures among a request's fields as uint8 tensors (height, width[, channels]); None if there are none."""
    found = {name: _tensors(fields[name]) for name in PICTURES if fields.get(name) is not None}
    if not found:
        return None
    from triptych.transfer import Payload

    return Payload(found)


def _tensors(value: Any) -> Any:
    if isinstance(value, Sequence):
        return [_tensors(item) for item in value]
    assert isinstance(value, Image.Image)
    import numpy as np
    import torch

    return torch.from_numpy(np.array(value))

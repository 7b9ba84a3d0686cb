"""cache-dit's API: one call that waits for its pictures, and what its users look at beside it."""

from __future__ import annotations

import base64
import contextlib
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from msgspec import structs
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from triptych.errors import InvalidRequest, NoWorker, StorageFailed, Unsupported
from triptych.model import Topology
from triptych.request import Request
from triptych.server.admission import Wanted, begin, finish
from triptych.server.door import JobView, ResultFile
from triptych.server.files import SUFFIXES, bytes_of, files_of
from triptych.server.front import Admin, Front, FrontOf, Who
from triptych.server.intake.bodies import checked, read_body
from triptych.server.intake.pictures import developed, picture_sources
from triptych.server.locks.keys import Caller
from triptych.server.routes.detail_words import body_of, detail_wrong, example, in_words, without_effect

__all__ = ["router"]

router = APIRouter(tags=["cache-dit"])

FLUSH_SECONDS = 30.0
"""What a worker may take to come to the end of its unit and flush."""

_WORDS = {"num_outputs": "num_images", "images": "image_urls"}


class GenerateBody(BaseModel):
    """What `POST /generate` takes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: str
    negative_prompt: str | None = ""
    width: int = Field(1024, ge=64, le=4096)
    height: int = Field(1024, ge=64, le=4096)
    num_inference_steps: int = Field(50, ge=1, le=200)
    guidance_scale: float = Field(7.5, ge=0, le=20)
    sigmas: list[float] | None = Field(None, min_length=1, max_length=200, description="instead of the model's own")
    seed: int | None = Field(None, ge=0, lt=2**63)
    num_images: int = Field(1, ge=1, le=4)
    image_urls: list[str] | None = Field(
        None, description="data:image/…;base64,…, base64, ids of uploads, or URLs where the deployment allows them"
    )
    num_frames: int | None = Field(None, ge=1, le=200)
    fps: int | None = Field(16, ge=1, le=60)
    include_stats: bool = False
    output_format: Literal["base64", "path"] = Field(
        "base64", description="path: files below the folder that the deployment names for it, if it does"
    )
    output_dir: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")] | None = Field(
        None, description="with output_format path: the name of a folder in that folder"
    )


class GenerateReply(BaseModel):
    """What was made. What does not apply is left out."""

    images: list[str] | None = Field(None, description="base64 of PNG files, or paths")
    video: str | None = Field(None, description="base64 of an MP4 file, or its path")
    stats: dict[str, Any] | None = Field(None, description="what each stage took")
    time_cost: float | None = Field(None, description="seconds")
    inference_start_time: str | None = None
    inference_end_time: str | None = None
    warnings: list[str] | None = Field(None, description="what was asked for and has no effect")


class ModelInfo(BaseModel):
    """The deployment's model."""

    model_config = ConfigDict(protected_namespaces=())

    model_path: str
    device: str = Field(description="of the workers that denoise; empty while there is none")
    torch_dtype: str
    enable_cache: bool = Field(description="whether steps are taken from a cache; here every step is computed")
    is_loaded: bool


class WorkerFreed(BaseModel):
    """What one worker let go of, in bytes by cache."""

    worker: str
    stages: dict[str, dict[str, int]]
    process: dict[str, int] = Field(description="caches that the worker's stages share")
    failed: dict[str, str] = Field(description="caches that could not be flushed, and why")


class Flushed(BaseModel):
    """What a flush has freed."""

    message: str
    freed_bytes: int
    workers: list[WorkerFreed]
    coordinator: dict[str, int] = Field(description="bytes by cache of the server's own process")
    unanswered: list[str] = Field(description="workers that are busy for long, and flush when they get to it")


_BODY = {"prompt": "a red apple on the left, blue background", "width": 64, "height": 64, "num_inference_steps": 4}
_REPLY = {
    "images": ["iVBORw0KGgo…"], "time_cost": 0.312, "inference_start_time": "2026-01-01T00:00:00.000Z",
    "inference_end_time": "2026-01-01T00:00:00.312Z",
}  # fmt: skip
_INFO = {
    "model_path": "emoji", "device": "cpu", "torch_dtype": "torch.float32", "enable_cache": False, "is_loaded": True,
}  # fmt: skip
_FREED = {
    "message": "Cache flushed successfully",
    "freed_bytes": 67109068,
    "workers": [
        {
            "worker": "denoise",
            "stages": {"denoise": {"previews": 204}},
            "process": {"transfer": 67108864, "allocator": 0},
            "failed": {},
        }
    ],
    "coordinator": {"transfer": 0},
    "unanswered": [],
}


@router.get("/get_model_info", response_model=ModelInfo, responses={**example(_INFO), **detail_wrong(401)})
def model_info(front: FrontOf, caller: Who) -> ModelInfo:
    """Which model is served, and on what."""
    workers = [worker for worker in front.door.status().workers if "denoise" in worker.stages]
    return ModelInfo(
        model_path=front.door.topology.source.name,
        device=", ".join(sorted({worker.device for worker in workers})),
        torch_dtype=", ".join(sorted({worker.dtype for worker in workers if worker.dtype})),
        enable_cache=False,
        is_loaded=not front.door.missing_stages(),
    )


@router.post(
    "/generate",
    response_model=GenerateReply,
    response_model_exclude_none=True,
    responses={**example(_REPLY), **detail_wrong(400, 401, 409, 410, 413, 415, 422, 429, 500, 503, 504)},
    openapi_extra=body_of(GenerateBody, _BODY, {**_BODY, "seed": 7, "num_images": 2, "include_stats": True}),
)
async def generate(front: FrontOf, caller: Who, request: HttpRequest) -> GenerateReply:
    """Makes pictures or a clip, and answers when they are there. Hanging up cancels the work."""
    body = checked(GenerateBody, await read_body(request, front.settings.max_body))
    with in_words(_WORDS):
        job, place, warnings = await _begun(front, caller, body)
        body = body.model_copy(update={"image_urls": None})  # they are large, and not needed while it is waited
        view = await finish(front, caller, job, request)
    outputs = await front.slowly(_outputs, front, view, place)
    return _reply(front.door.topology, view, body, outputs, warnings)


@router.post("/flush_cache", response_model=Flushed, responses={**example(_FREED), **detail_wrong(401, 403, 429, 503)})
async def flush_cache(front: FrontOf, admin: Admin) -> Flushed:
    """Lets go of what is kept only to be faster, in every worker, between two units of its work."""
    report = await front.slowly(front.door.flush, FLUSH_SECONDS)
    if not report.workers and not report.unanswered:
        raise NoWorker("no worker is ready, so there is nothing to flush")
    wrong = [f"{one.worker}: {cache}" for one in report.workers for cache in one.failed]
    less = [f"not yet answered: {name}" for name in report.unanswered] + [f"failed: {what}" for what in wrong]
    return Flushed(
        message="Cache flushed successfully" if not less else f"Cache flushed in part; {'; '.join(less)}",
        freed_bytes=report.freed_bytes,
        workers=[WorkerFreed(**structs.asdict(one)) for one in report.workers],
        coordinator=report.coordinator,
        unanswered=list(report.unanswered),
    )


async def _begun(front: Front, caller: Caller, body: GenerateBody) -> tuple[str, Path | None, list[str]]:
    """The job of a body, the folder for its files, and what of the body the model has no use for."""
    given, warnings = _given(front.door.topology, body)
    sources = picture_sources(front, caller, body.image_urls or (), "image_urls")
    async with developed(front, caller, sources, field="image_urls") as brought:
        wanted = Wanted(Request.parse(prompt=body.prompt, num_outputs=body.num_images, **given, **brought))
        place = await run_in_threadpool(_place, front, body)
        return await begin(front, caller, wanted), place, warnings


def _given(topology: Topology, body: GenerateBody) -> tuple[dict[str, Any], list[str]]:
    """The settings of a body, and what of it the model has no use for."""
    given: dict[str, Any] = {
        name: getattr(body, name)
        for name in ("width", "height", "num_inference_steps", "guidance_scale", "sigmas", "seed", "num_frames", "fps")
    }
    given["negative_prompt"] = body.negative_prompt or None
    if body.sigmas is not None and "num_inference_steps" not in body.model_fields_set:
        del given["num_inference_steps"]
    if topology.makes == "video" and body.num_images > 1:
        raise InvalidRequest.of("num_images", body.num_images, "1 (this model makes clips, and a reply holds one)")
    warnings = []
    for name, why in _useless(topology, body):
        if name in body.model_fields_set and given.get(name) is not None:
            warnings.append(without_effect(name, why))
        given.pop(name, None)
    if body.output_dir is not None and body.output_format != "path":
        warnings.append(without_effect("output_dir", "output_format is base64"))
    return given, warnings


def _useless(topology: Topology, body: GenerateBody) -> Iterator[tuple[str, str]]:
    """Fields with defaults of their own that this model does not take, with the reason."""
    declared = {item.name for stage in topology.stages for item in stage.request_inputs}
    for name in ("width", "height", "num_inference_steps"):
        if name not in declared:
            yield name, "this model does not take it"
    if topology.guidance != "classifier_free":
        yield "negative_prompt", "this model has no classifier-free guidance"
    if topology.guidance == "none":
        yield "guidance_scale", "this model takes no guidance"
    if topology.makes == "image":
        yield "fps", "this model makes pictures"
        if body.num_frames == 1:
            yield "num_frames", "this model makes pictures"


def _place(front: Front, body: GenerateBody) -> Path | None:
    """The folder for the reply's files, made if it is not there; None for a reply that holds them. Raises Unsupported
    where the operator has named none."""
    if body.output_format == "base64":
        return None
    root = front.settings.output_folder
    if root is None:
        raise Unsupported("given 'path'; allowed: base64 (this deployment writes no files)", field="output_format")
    place = root if body.output_dir is None else root / body.output_dir
    with _storing():
        place.mkdir(parents=True, exist_ok=True)
    if place.resolve() != root.resolve() / (body.output_dir or ""):
        raise Unsupported("given the name of a link; allowed: a folder's", field="output_dir")
    return place


def _outputs(front: Front, view: JobView, place: Path | None) -> list[str]:
    """Each output as base64, or as the path of a file with a name of our own."""
    files = files_of(front.door, view)
    if place is None:
        return [base64.b64encode(bytes_of(file)).decode() for file in files]
    kind = "video" if front.door.topology.makes == "video" else "image"
    return [_written(file, place, f"{kind}_{view.record.spec.id}_{index}") for index, file in enumerate(files)]


def _written(file: ResultFile, place: Path, name: str) -> str:
    """Copies an output; whoever looks sees all of it or nothing."""
    target = place.absolute() / f"{name}{SUFFIXES.get(file.media_type, '')}"
    part = target.with_name(f".{target.name}.part")
    data = bytes_of(file)
    with _storing():
        try:
            part.write_bytes(data)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    return str(target)


@contextlib.contextmanager
def _storing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageFailed(f"the output folder cannot be written ({error.strerror})") from None


def _reply(
    topology: Topology, view: JobView, body: GenerateBody, outputs: list[str], warnings: list[str]
) -> GenerateReply:
    record = view.record
    began, ended = record.started or record.submitted, record.ended or record.submitted
    video = topology.makes == "video"
    return GenerateReply(
        images=None if video else outputs,
        video=outputs[0] if video else None,
        stats=_stats(view) if body.include_stats else None,
        time_cost=round(max(0.0, ended - began), 3),
        inference_start_time=_when(began),
        inference_end_time=_when(ended),
        warnings=[*warnings, *record.spec.warnings] or None,
    )


def _stats(view: JobView) -> dict[str, Any]:
    names = ("stage", "seconds", "waited", "fetched", "steps", "peak_bytes")
    stages = [{name: getattr(stage, name) for name in names} for stage in view.record.finished]
    return {"cache_stats": [], "stages": stages}


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

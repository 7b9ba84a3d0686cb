"""diffusers' remote VAE: tensors in, pictures or tensors out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from triptych.errors import InvalidRequest
from triptych.messages import Encoding
from triptych.model import VaeCall, VaeOptions, extent_of, picture_call, vae_stage
from triptych.server.admission import begin_by, finish
from triptych.server.door import ResultFile
from triptych.server.errors import BodyTooLarge, WrongMediaType
from triptych.server.files import bytes_of, files_of, opened
from triptych.server.front import Front, FrontOf, Who
from triptych.server.intake.bodies import bounded
from triptych.server.intake.pictures import developed
from triptych.server.locks.bounds import check_extent
from triptych.server.locks.keys import Caller
from triptych.server.views import A_FILE, wrong

__all__ = ["router"]

router = APIRouter(prefix="/v1/vae", tags=["diffusers"])

BINARY = "tensor/binary"
CHUNK = 1 << 20
"""Bytes of a tensor that are read at once on their way out."""
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "U8": "uint8"}
"""safetensors' names of what leaves, as the client knows them."""

_TENSOR = Encoding(format="safetensors")

Size = Annotated[int, Field(ge=1, le=1 << 24)]
Side = Annotated[int | None, Field(ge=1, le=1 << 24, description="pixels, with packed latents")]
Factor = Annotated[float | None, Field(allow_inf_nan=False)]


class _Scaling(BaseModel):
    """What both calls have in common."""

    model_config = ConfigDict(extra="forbid")

    scaling_factor: Factor = Field(
        default=None, description="latents are divided by it before they are decoded, and multiplied after encoding"
    )
    shift_factor: Factor = Field(
        default=None, description="is added to latents before they are decoded, and taken from them after encoding"
    )
    do_scaling: bool = Field(default=False, description="scale and shift as the model's own VAE says")


class DecodeParameters(_Scaling):
    """As diffusers' `remote_decode` sends them."""

    shape: list[Size] = Field(
        min_length=3,
        max_length=5,
        description="of the latents: batch, channels, [frames,] height, width; packed: batch, patches, channels",
    )
    dtype: Literal["float32", "float16", "bfloat16"] = Field(description="of the latents' numbers")
    output_type: Literal["pil", "pt", "mp4"] = Field(
        default="pil", description="a picture, or with `Accept: tensor/binary` pixels in 0…1; the tensor; a clip"
    )
    image_format: Literal["jpg", "png"] = Field(default="jpg", description="of a picture")
    partial_postprocess: bool = Field(default=False, description="with pt: pixels as uint8, channels last")
    height: Side = None
    width: Side = None
    fps: Annotated[float | None, Field(gt=0, le=240, allow_inf_nan=False, description="with mp4")] = None


class EncodeParameters(_Scaling):
    """As diffusers' `remote_encode` sends them; without `shape` the body is a picture's file."""

    shape: list[Size] | None = Field(
        default=None,
        min_length=4,
        max_length=5,
        description="of pixels in −1…1: batch, 3, [frames,] height, width; of uint8: batch, height, width, 3",
    )
    dtype: Literal["float32", "float16", "bfloat16", "uint8"] | None = Field(
        default=None, description="of the pixels' numbers"
    )


def _body(*kinds: str) -> dict[str, Any]:
    schema = {"type": "string", "format": "binary"}
    content = {kind: {"schema": schema, "example": A_FILE} for kind in kinds}
    return {"requestBody": {"required": True, "content": content}}


def _answers(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """What may come back; a tensor says in headers what it is."""
    described: dict[str, Any] = {
        "shape": {"description": "of a tensor, as JSON", "schema": {"type": "string"}, "example": "[1, 3, 64, 64]"},
        "dtype": {"description": "of a tensor", "schema": {"enum": list(DTYPES.values())}, "example": "float32"},
    }
    content = {kind: {"schema": {"type": "string", "format": "binary"}, "example": A_FILE} for kind in kinds}
    return {
        200: {"description": "What was made", "content": content, "headers": described},
        **wrong(400, 401, 409, 413, 415, 422, 429, 503),
    }


@router.post(
    "/decode",
    response_class=Response,
    responses=_answers("image/jpeg", "image/png", "video/mp4", BINARY),
    openapi_extra=_body(BINARY, "application/octet-stream"),
)
async def decode(front: FrontOf, caller: Who, http: Request, asked: Annotated[DecodeParameters, Query()]) -> Response:
    """Pictures, a clip or a tensor of the latents in the body: their numbers row by row, little end first."""
    _check_kind(http, (BINARY, "application/octet-stream"))
    output, encoding = _wanted_of(front, asked, BINARY in http.headers.get("accept", ""))
    options = VaeOptions(
        asked.scaling_factor, asked.shift_factor, asked.do_scaling, asked.height, asked.width, output
    )  # fmt: skip
    call = VaeCall("vae.decode", tuple(asked.shape), asked.dtype, options)
    job = await _begun(front, caller, call, await _tensor(front, http, call), encoding)
    return await _made(front, caller, http, job)


@router.post(
    "/encode",
    response_class=Response,
    responses=_answers(BINARY),
    openapi_extra=_body(BINARY, "application/octet-stream", "image/png", "image/jpeg", "image/webp"),
)
async def encode(front: FrontOf, caller: Who, http: Request, asked: Annotated[EncodeParameters, Query()]) -> Response:
    """The latents of the picture, or the pixels, in the body: the middle of their distribution. A picture's sides are
    cut down to multiples of the VAE's, as diffusers' image processor does."""
    # diffusers' client names no kind.
    _check_kind(http, ("", BINARY, "application/octet-stream", "image/png", "image/jpeg", "image/webp"))
    options = VaeOptions(asked.scaling_factor, asked.shift_factor, asked.do_scaling)
    if (asked.shape is None) != (asked.dtype is None):
        missing = "shape" if asked.shape is None else "dtype"
        raise InvalidRequest.of(missing, None, "shape and dtype of a tensor, or neither with a picture's file")
    if asked.shape is not None and asked.dtype is not None:
        call = VaeCall("vae.encode", tuple(asked.shape), asked.dtype, options)
        job = await _begun(front, caller, call, await _tensor(front, http, call), _TENSOR)
    else:
        job = await _begun_with_picture(front, caller, http, options)
    return await _made(front, caller, http, job)


async def _begun_with_picture(front: Front, caller: Caller, http: Request, options: VaeOptions) -> str:
    vae_stage(front.door.topology, "vae.encode")
    file = b"".join([part async for part in bounded(http, front.settings.max_body)])
    async with developed(front, caller, [file], field="image") as brought:
        call, data = await run_in_threadpool(picture_call, front.door.topology, brought["images"][0], options)
        _check(front, call)
        return await _begun(front, caller, call, data, _TENSOR)


def _check_kind(http: Request, allowed: tuple[str, ...]) -> None:
    """Raises WrongMediaType for what a form on some web page could send as well."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in allowed:
        raise WrongMediaType(f"given {kind[:80]!r}; allowed: {', '.join(filter(None, allowed))}", field="content-type")


def _wanted_of(
    front: Front, asked: DecodeParameters, as_tensor: bool
) -> tuple[Literal["raw", "unit", "images", "videos"], Encoding]:
    """What is to be made of the pixels, and the file that they leave as."""
    if asked.partial_postprocess and asked.output_type != "pt":
        raise InvalidRequest.of("partial_postprocess", True, "false, or output_type=pt")
    if asked.fps is not None and asked.output_type != "mp4":
        raise InvalidRequest.of("fps", asked.fps, "nothing without output_type=mp4")
    if asked.output_type == "pt":
        return "images" if asked.partial_postprocess else "raw", Encoding(format="safetensors")
    if asked.output_type == "mp4":
        topology = front.door.topology
        if topology.makes != "video" or len(asked.shape) != 5 or asked.shape[0] != 1:
            raise InvalidRequest.of("output_type", "mp4", "pil or pt, but for the latents of one clip")
        return "videos", Encoding(format="mp4", fps=asked.fps or topology.defaults.fps or 16.0)
    if as_tensor:
        return "unit", Encoding(format="safetensors")
    if asked.shape[0] != 1 or (len(asked.shape) == 5 and asked.shape[2] != 1):
        raise InvalidRequest.of("shape", asked.shape, "one picture with output_type=pil; pt, or mp4, for more")
    return "images", Encoding(format="png" if asked.image_format == "png" else "jpeg")


def _check(front: Front, call: VaeCall) -> None:
    """Raises InvalidRequest, Unsupported or BodyTooLarge for what the model or the deployment does not take."""
    topology, settings = front.door.topology, front.settings
    vae_stage(topology, call.task)
    bounds = settings.bounds
    most = bounds.outputs if call.task == "vae.decode" else bounds.images
    check_extent(bounds, extent_of(topology, call), most)
    if call.bytes > settings.max_body:
        raise BodyTooLarge(f"given {call.bytes} bytes; allowed: at most {settings.max_body} bytes", field="body")


async def _tensor(front: Front, http: Request, call: VaeCall) -> bytearray:
    """The body, once what is announced has been found right."""
    _check(front, call)
    announced = http.headers.get("content-length")
    if announced is not None and announced.isdecimal() and int(announced[:20]) != call.bytes:
        raise InvalidRequest.of("body", f"{announced[:20]} bytes", f"{call.bytes}, for the shape and dtype")
    data = bytearray()
    async for part in bounded(http, call.bytes):
        data += part
    return data


async def _begun(front: Front, caller: Caller, call: VaeCall, data: bytearray, encoding: Encoding) -> str:
    door, stage = front.door, vae_stage(front.door.topology, call.task)

    def submit() -> str:
        return door.submit_vae(call, data, encoding=encoding, client=caller.name, trace=caller.visit.trace)

    return await run_in_threadpool(begin_by, front, caller, submit, (stage,))


async def _made(front: Front, caller: Caller, http: Request, job: str) -> Response:
    """Answers with what a job made, and forgets it. A client that hangs up cancels it."""
    try:
        view = await finish(front, caller, job, http)
        return await front.slowly(lambda: _response(files_of(front.door, view)[0]))
    finally:
        front.forget(job)  # the answer's file is open, and nobody knows the job to ask for it again


def _response(file: ResultFile) -> Response:
    if not file.media_type.endswith("safetensors"):
        return Response(bytes_of(file), media_type=file.media_type)
    found = opened(file)
    try:
        tensor = _Header.read(found)
    except BaseException:
        found.close()
        raise
    headers = {"shape": json.dumps(tensor.shape), "dtype": tensor.dtype, "Content-Length": str(tensor.bytes)}
    return StreamingResponse(_chunks(found, tensor.bytes), headers=headers, media_type=BINARY)


@dataclass(frozen=True)
class _Header:
    """What a safetensors file of one tensor says of it."""

    shape: list[int]
    dtype: str
    bytes: int

    @classmethod
    def read(cls, file: BinaryIO) -> _Header:
        """Leaves the file where the numbers begin."""
        size = int.from_bytes(file.read(8), "little")
        found = json.loads(file.read(size))["tensor"]
        begin, end = found["data_offsets"]
        assert begin == 0 and end - begin >= math.prod(found["shape"])
        return cls(found["shape"], DTYPES[found["dtype"]], end - begin)


def _chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    with file:
        while size > 0 and (part := file.read(min(CHUNK, size))):
            size -= len(part)
            yield part

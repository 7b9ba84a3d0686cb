"""From a call of the model's VAE by itself to what the cluster is to do, and what comes of it."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from PIL import Image

from triptych.cluster import JobSpec, StageSpec
from triptych.engine.specs import Options
from triptych.errors import InvalidRequest
from triptych.messages import Encoding
from triptych.model import Extent, Topology, VaeCall, VaeOptions, picture_call, vae_stage
from triptych.request import VaeTask

if TYPE_CHECKING:
    import torch

    from triptych.transfer import Payload

__all__ = ["call_of", "tensor_payload", "vae_spec"]


def vae_spec(
    topology: Topology, job: str, call: VaeCall, extent: Extent, options: Options, kept: str, encoding: Encoding | None
) -> JobSpec:
    """A job of one task, which `kept` is the keeper's name of the tensor for. Raises Unsupported if no stage has a
    VAE."""
    chosen = {name: value for name, value in asdict(call.options).items() if value not in (None, False)}
    return JobSpec(
        id=job,
        stages=(StageSpec(stage=vae_stage(topology, call.task), fields=asdict(call.options), pictures=True),),
        seed=0,
        pictures=kept,
        encoding=encoding,
        work=float(extent.pixels),
        client=options.client,
        priority=options.priority,
        deadline=options.deadline,
        request={"shape": list(call.shape), "dtype": call.dtype, **chosen},
        workflow=call.task,
        trace=options.trace,
        bare=call.task,
    )


def tensor_payload(call: VaeCall, data: bytearray | torch.Tensor) -> Payload:
    """A call's tensor, which `data` may be itself, or its bytes, row by row; they are not copied. Raises InvalidRequest
    for other bytes than the call announces, and for NaN and infinity."""
    import torch

    from triptych.transfer import Payload

    if not isinstance(data, torch.Tensor):
        if len(data) != call.bytes:
            raise InvalidRequest.of("body", f"{len(data)} bytes", f"{call.bytes}, for the shape and dtype")
        data = torch.frombuffer(data, dtype=getattr(torch, call.dtype)).view(call.shape)
    if data.is_floating_point() and not bool(torch.isfinite(data).all()):
        raise InvalidRequest("given NaN or infinity; allowed: finite numbers", field="body")
    return Payload({"tensor": data})


def call_of(
    topology: Topology, task: VaeTask, given: torch.Tensor | Image.Image, options: dict[str, Any]
) -> tuple[VaeCall, bytearray | torch.Tensor]:
    """A call on a tensor or a picture, and what goes with it. Raises InvalidRequest for options that there are not."""
    known = [item.name for item in fields(VaeOptions)]
    for name in options:
        if name not in known or (name == "output" and options[name] not in ("raw", "unit")):
            raise InvalidRequest.of(name, options[name], known if name not in known else ("raw", "unit"))
    chosen = VaeOptions(**options)
    if isinstance(given, Image.Image):
        return picture_call(topology, given, chosen)
    return VaeCall(task, tuple(given.shape), str(given.dtype).removeprefix("torch."), chosen), given

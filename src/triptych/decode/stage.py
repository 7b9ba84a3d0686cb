"""Runs a pipeline's decode blocks and turns what they make into pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from triptych.decode.media import to_uint8
from triptych.errors import WrongPayload
from triptych.stage import GatherStage, Live
from triptych.transfer import Payload

if TYPE_CHECKING:
    from triptych.model import TaskOutputs


class DecodeStage(GatherStage):
    """The last panel. Its payload is `images`, uint8 (batch, height, width, 3), or `videos`, uint8 (batch, frames,
    height, width, 3); for a `raw` task the pipeline's own float tensors."""

    def _payload(self, live: Live, outputs: TaskOutputs) -> Payload:
        return pictures(super()._payload(live, outputs), live.task.raw)


class FusedStage(DecodeStage):
    """A pipeline that no topology can split, whole in one stage: denoising steps, then pictures as payload."""


def pictures(payload: Payload, raw: bool = False) -> Payload:
    """The payload reduced to its pictures. Raises WrongPayload if there are none."""
    for name in ("images", "videos"):
        made = payload.values.get(name)
        if isinstance(made, list | tuple) and made and isinstance(made[0], torch.Tensor):
            made = torch.stack(list(made))
        if isinstance(made, torch.Tensor):
            payload.values = {name: made if raw else to_uint8(made)}
            payload.tags = {}
            return payload
    raise WrongPayload(f"decode made neither images nor videos but {sorted(payload.values)}")

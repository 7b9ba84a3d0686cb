"""Runs a pipeline's denoising loop; one unit is one call of the transformer for one task."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from triptych.stage import Freed, GatherStage, Live, Order, UsePreview

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from triptych.model import Step

logger = logging.getLogger(__name__)


class DenoiseStage(GatherStage):
    """The middle panel. Makes previews for tasks that ask, once it was told how (`UsePreview`)."""

    _previewer: Callable[[dict[str, Any], torch.Tensor], torch.Tensor] | None = None

    def control(self, order: Order) -> Freed | None:
        """Takes `UsePreview`, and what every stage takes."""
        if not isinstance(order, UsePreview):
            return super().control(order)
        self._previewer = order.preview
        return None

    def _preview(self, live: Live, step: Step) -> torch.Tensor | None:
        if not live.task.preview or self._previewer is None:
            return None
        foreseen = step.denoised()
        latents = step.latents if foreseen is None else foreseen
        if latents is None:
            return None
        try:
            return self._previewer(live.task.fields, self.program.boundary_latents(live.inputs, latents))
        except Exception as error:  # a preview is a courtesy: the job goes on without
            logger.warning("no previews from now on: %s", error)
            self._previewer = None
            return None

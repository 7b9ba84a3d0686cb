"""How a worker's denoise stage comes to its previews, wherever the VAE is."""

from __future__ import annotations

import logging
from typing import Any

import torch

from triptych.decode import LatentPreview, learn_preview
from triptych.request import StageName
from triptych.stage import GatherStage, Stage, Used, UsePreview
from triptych.worker.opening import Opened

logger = logging.getLogger(__name__)


class Previews:
    """Made when a task first asks for them: from the decode stage beside, from a tiny VAE, or from the map that a
    decode worker elsewhere has fitted."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._map = b""
        self._started = False
        self._made: LatentPreview | None = None
        self._hits = self._misses = 0
        self._unused = True
        denoise = self._stage("denoise")
        if denoise is not None:
            denoise.caches.register("previews", self._flush, lambda: Used(self._hits, self._misses))

    def offered(self) -> bytes:
        """The map for denoise workers elsewhere; empty if this worker has both stages, or none can be fitted."""
        decode = self._stage("decode")
        if decode is None or self._stage("denoise") is not None or len(self._opened.topology.stages) < 2:
            return b""
        try:
            return learn_preview(decode.program, self._opened.trust).to_bytes()
        except Exception as error:  # a preview is a courtesy
            logger.info("no previews: %s", error)
            return b""

    def use(self, preview: bytes) -> None:
        """Takes the map that a decode worker gave."""
        if preview != self._map:
            self._map, self._started = preview, False

    def start(self) -> None:
        """Gives the denoise stage its previews, if there is anything to make them with."""
        denoise = self._stage("denoise")
        if self._started or denoise is None:
            return
        self._started = True
        try:
            if self._make() is not None:
                denoise.control(UsePreview(self._show))
        except Exception as error:
            logger.warning("no previews: %s", error)

    def _show(self, fields: dict[str, Any], latents: torch.Tensor) -> torch.Tensor:
        made = self._made or self._make()  # flushed since
        assert made is not None, "what it is made with does not go away"
        if self._unused:
            self._misses, self._unused = self._misses + 1, False
        else:
            self._hits += 1
        return made(fields, latents)

    def _make(self) -> LatentPreview | None:
        self._made, self._unused = self._preview(), True
        return self._made

    def _flush(self) -> int:
        made, self._made = self._made, None
        return 0 if made is None else made.nbytes

    def _preview(self) -> LatentPreview | None:
        opened, decode = self._opened, self._stage("decode")
        if decode is not None:
            return LatentPreview(decode.program, opened.preview_vae)
        if opened.preview_vae is not None:
            return LatentPreview.with_tiny(opened.preview_vae, opened.topology, opened.placement, opened.trust)
        if self._map:
            return LatentPreview.from_bytes(self._map, opened.topology, opened.placement, opened.trust)
        self._started = False  # the map may still come
        return None

    def _stage(self, name: StageName) -> GatherStage | None:
        stage: Stage | None = self._opened.stages.get(name)
        return stage if isinstance(stage, GatherStage) else None

"""Runs a pipeline's text, image and VAE encoding blocks."""

from __future__ import annotations

from triptych.stage import GatherStage


class EncodeStage(GatherStage):
    """The first panel. One unit is one encoder call of one task; the text-encoder engine will take its place."""

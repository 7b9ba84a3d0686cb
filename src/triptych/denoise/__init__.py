"""The denoise stage: the diffusion transformer's loop."""

from triptych.denoise.stage import DenoiseStage

__all__ = ["DenoiseStage"]

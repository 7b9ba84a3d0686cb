"""The encode stage: text and image encoders."""

from triptych.encode.stage import EncodeStage

__all__ = ["EncodeStage"]

"""What holds stages: in this process for the engine, or a process of its own."""

from triptych.worker.process import StageProcess
from triptych.worker.stages import build_stage
from triptych.worker.wire import StageSpec

__all__ = ["StageProcess", "StageSpec", "build_stage"]

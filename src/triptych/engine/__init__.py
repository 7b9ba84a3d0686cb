"""The engine: a model open in some layout, behind one face."""

from triptych.engine.engine import Engine
from triptych.engine.jobs import Job, JobView, ResultFile

__all__ = ["Engine", "Job", "JobView", "ResultFile"]

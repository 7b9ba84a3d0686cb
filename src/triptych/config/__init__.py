"""How a deployment is laid out: one typed tree, read from a file and then from flags. No torch.

A layout says which stages run where and how many of each; its sections say how payloads travel, what is bounded, and
where others may join. Sizes are in bytes and may be written as text (`256MiB`), times are in seconds.
"""

from triptych.config.layout import Layout, Slot
from triptych.config.sections import LimitsSection, ListenSection, TransferSection, WorkerPlan
from triptych.config.serve import BoundsSection, ImageUrlsSection, RatesSection, ServeSection
from triptych.config.words import is_loopback, parse_cpus, parse_size, parse_stages

__all__ = [
    "BoundsSection",
    "ImageUrlsSection",
    "Layout",
    "LimitsSection",
    "ListenSection",
    "RatesSection",
    "ServeSection",
    "Slot",
    "TransferSection",
    "WorkerPlan",
    "is_loopback",
    "parse_cpus",
    "parse_size",
    "parse_stages",
]

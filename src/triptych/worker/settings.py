"""What a worker is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from triptych.errors import InvalidRequest
from triptych.model import Trust
from triptych.request import StageName
from triptych.transfer import TransferSettings


@dataclass(frozen=True)
class WorkerSettings:
    """One worker: which stages of which model it holds, and where. The model's fields are those of `Engine.open`."""

    model: str
    stages: tuple[StageName, ...] = ()
    """none: all that the model has"""
    workflow: str | None = None
    device: str = "auto"
    dtype: str | None = None
    revision: str | None = None
    offline: bool = False
    trust: Trust = field(default_factory=Trust)
    preview_vae: str | None = None
    """folder of a tiny VAE that makes the previews"""
    threads: int | None = None
    """torch's; None: its own choice"""
    cpus: tuple[int, ...] = ()
    """processors that it keeps to; none: all"""
    capacity: int = 4
    """tasks that a stage runs at once; one more waits with its input at hand"""
    name: str = ""
    """for people; "": made of the host's name and the process' number"""
    slot: str | None = None
    """its place in the layout, when a launcher started it"""
    transfer: TransferSettings = field(default_factory=TransferSettings)
    max_input_bytes: int = 1 << 36
    """a larger input is refused before memory is taken for it"""
    drain_seconds: float = 60.0
    """how long a drained worker waits until nobody needs what it keeps"""

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise InvalidRequest.of("capacity", self.capacity, "at least 1")
        if self.threads is not None and self.threads < 1:
            raise InvalidRequest.of("threads", self.threads, "at least 1")

"""The parts of a layout file, as typed data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError, field_validator

from triptych.config.words import one_or_many, parse_size, stage_words
from triptych.config.wrong import problem
from triptych.messages import Route
from triptych.request import StageName

__all__ = [
    "LOCAL",
    "MIB",
    "NAME",
    "LimitsSection",
    "ListenSection",
    "Seconds",
    "Section",
    "Size",
    "Switch",
    "TransferSection",
    "Whole",
    "WorkerPlan",
]

LOCAL = "local"
"""The host of workers that are started here; those of any other are expected to join."""

MIB = 2**20
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"

Whole = Annotated[int, Strict()]
Processor = Annotated[int, Strict(), Field(ge=0)]
Switch = Annotated[bool, Strict()]
Size = Annotated[int, BeforeValidator(parse_size), Strict()]
Seconds = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)]
AnySeconds = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]
StageWord = Literal[StageName, "all", "each"]


class Section(BaseModel):
    """Base of everything in the tree: unknown keys are errors, nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def given(self) -> dict[str, Any]:
        """What was said, by field; the rest is for whoever is configured by it to choose."""
        return self.model_dump(exclude_unset=True)


class WorkerPlan(Section):
    """One entry of `workers`: `replicas` processes alike."""

    name: str | None = Field(default=None, pattern=NAME)
    """what its processes are called, numbered if there are several; null: after its stages"""
    stages: Annotated[tuple[StageWord, ...], BeforeValidator(stage_words)] = Field(min_length=1)
    """the stages that each process holds; `all` the model's, or `each` in a process of its own"""
    replicas: Whole = Field(default=1, ge=1, le=1024)
    """processes alike"""
    devices: Annotated[tuple[str, ...], BeforeValidator(one_or_many)] = Field(default=("auto",), min_length=1)
    """the device of each process, as `triptych doctor` names them; several replicas may share one"""
    threads: Whole | None = Field(default=None, ge=1, le=1024)
    """CPU threads of one process; null: torch decides"""
    cpus: Annotated[tuple[Processor, ...], BeforeValidator(one_or_many)] | None = Field(default=None, min_length=1)
    """processor numbers that a process keeps to; null: any"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """null: as on disk, float32 on a CPU"""
    capacity: Whole | None = Field(default=None, ge=1, le=1024)
    """tasks that a stage takes at once; null: 4"""
    host: str = Field(default=LOCAL, min_length=1, max_length=253)
    """`local`: started here; another host's name: expected to join from there by `triptych worker`"""

    @field_validator("stages")
    @classmethod
    def _alone(cls, value: tuple[StageWord, ...]) -> tuple[StageWord, ...]:
        if len(set(value)) != len(value) or (len(value) > 1 and {"all", "each"} & set(value)):
            raise ValueError("each stage once; `all` or `each` alone")
        return value

    @field_validator("cpus")
    @classmethod
    def _once(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and len(set(value)) != len(value):
            raise ValueError("each processor once")
        return value


class TransferSection(Section):
    """How payloads travel. The fields and defaults of the transfer layer's own settings."""

    pool_bytes: Size = Field(default=64 * MIB, ge=1)
    """what each of a process's two pools, of kept payloads and of arriving ones, begins with"""
    budget_bytes: Size = Field(default=2048 * MIB, ge=1)
    """what each of the two may grow to; at most the machine's memory"""
    routes: tuple[Route, ...] | None = Field(default=None, min_length=1)
    """the only routes that are taken, the preferred one first; null: the best that both ends have"""
    host: str = Field(default="127.0.0.1", max_length=253)
    """the address on which a worker serves payloads to other hosts"""
    port: Whole = Field(default=0, ge=0, le=65535)
    """of the TCP route; 0: any free one"""
    advertise: str | None = Field(default=None, min_length=1, max_length=253)
    """the address that others are told; null: `host`"""
    tls: Switch = False
    """encrypts the TCP route"""
    mooncake: Switch = False
    """serves and takes the Mooncake route; needs the extra `mooncake`"""
    mooncake_protocol: Literal["tcp", "rdma"] = "tcp"
    """what Mooncake is asked to run on"""
    mooncake_public: Switch = False
    """allows Mooncake's ports, which ask nobody for anything, on a public address"""
    connect_seconds: Seconds = 5.0
    """how long a connection may take to come about"""
    stall_seconds: Seconds = 10.0
    """a transfer in which nothing moves for so long has failed"""
    reserve_seconds: Seconds = 10.0
    """how long a full pool is waited for"""
    credits: Whole = Field(default=4, ge=1)
    """transfers from one peer at a time"""
    credit_bytes: Size = Field(default=1024 * MIB, ge=1)
    """bytes in flight from one peer; a larger payload travels alone"""
    max_connections: Whole = Field(default=64, ge=1)
    """data connections that a process serves at a time"""
    corrupt_every: Whole | None = Field(default=None, ge=1)
    """an aid for tests: damages one byte of every so many-th payload that arrives as bytes; null: none"""

    @classmethod
    def of(cls, given: dict[str, Any]) -> TransferSection:
        """The section from its keys. Raises InvalidRequest naming the first thing that is wrong."""
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise problem(cls, error.errors()[0], below="transfer") from None

    def arguments(self) -> list[str]:
        """What was said, as options of `triptych worker`."""
        given = self.model_dump(mode="json", exclude_unset=True)
        return [word for name, value in given.items() for word in ("--transfer", f"{name}={json.dumps(value)}")]


class LimitsSection(Section):
    """What is bounded. The fields and defaults of the cluster's own limits."""

    heartbeat_seconds: Seconds = 1.0
    """between two signs of life of a worker"""
    lease_seconds: Seconds = 5.0
    """a worker silent for so long is dead"""
    loading_seconds: Seconds = 1800.0
    """the same for a worker that said that it loads or compiles"""
    hung_factor: Annotated[float, Strict()] = Field(default=10.0, ge=1, allow_inf_nan=False)
    """a unit of work that takes this many times what was measured is hung"""
    hung_floor_seconds: Seconds = 5.0
    """but nothing shorter than this is"""
    first_unit_seconds: Seconds = 600.0
    """what a unit may take where none was measured yet"""
    stalled_seconds: Seconds = 180.0
    """a worker that holds tasks, and neither computes nor says anything of them for so long, is hung"""
    prove_seconds: Seconds = 60.0
    """within which a worker where something failed shows that it still works"""
    max_queue: Whole = Field(default=256, ge=1)
    """jobs that may wait to begin; more are refused"""
    max_queue_per_client: Whole | None = Field(default=None, ge=1)
    """the same for one client; null: no limit of its own"""
    ahead: Whole = Field(default=8, ge=0)
    """outputs of a stage that may wait for the next stage"""
    time_limit_seconds: Seconds = 3600.0
    """a job ends so long after it began, done or not"""
    checkpoint_seconds: AnySeconds | None = 1.0
    """work of a denoising job between two checkpoints; 0: after every step; null: none"""
    missing_worker: Literal["fail", "wait"] = "wait"
    """while a stage has no worker, new jobs are refused, or wait"""
    deaths_alone: Whole = Field(default=2, ge=1)
    """a job that has killed so many workers while alone on them is put away as failed"""
    own_errors: Whole = Field(default=2, ge=1)
    """a stage that failed so often by the job's own error fails the job"""
    damages: Whole = Field(default=5, ge=1)
    """damaged transfers of one stage's input before the job fails"""
    losses: Whole = Field(default=8, ge=1)
    """times that a stage's input may be lost although its producer lives"""
    failures_kept: Whole = Field(default=20, ge=1)
    """reasons collected per job"""
    retention_seconds: AnySeconds = 86400.0
    """ended jobs and their results are forgotten after so long"""
    retention_bytes: Size | None = Field(default=None, ge=0)
    """ended jobs keep at most so much, the oldest go first; null: no limit"""


class ListenSection(Section):
    """Where workers of other hosts join."""

    endpoint: str = Field(pattern=r"^tcp://\S+:(\d{1,5}|\*)$")
    """such as `tcp://0.0.0.0:7400`"""
    keys: Path
    """folder with the server's keys and the allowed clients', made by `triptych keys`"""

    @property
    def host(self) -> str:
        """The endpoint's address."""
        return self.endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")

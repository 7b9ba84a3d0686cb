"""An engine without a model: jobs are what the test makes of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

from triptych.cluster import Estimate, Status, Totals
from triptych.cluster.flushing import FlushReport
from triptych.cluster.jobs import ENDED, Failure, JobRecord, JobSpec, JobState, Outcome, StageSpec
from triptych.errors import InvalidRequest
from triptych.messages import CacheUse, Encoding, Stepped
from triptych.model import VaeCall
from triptych.model.topology import STAGES, Defaults, Source, StageTopology, Topology
from triptych.request import Request

TOPOLOGY = Topology(
    source=Source("toy", "/nowhere", "embedded"),
    workflow="text2image",
    workflows=("text2image",),
    family="toy",
    pipeline_class="Toy",
    adapter="modular",
    stages=tuple(StageTopology(name, (), (), (), (), (), ()) for name in STAGES),
    components={},
    defaults=Defaults(),
    spatial_multiple=8,
    latent_scale=8,
    latent_channels=4,
    temporal_scale=None,
    makes="image",
    guidance="none",
)


@dataclass(frozen=True)
class View:
    record: JobRecord
    position: int | None = None
    step: int = 0
    steps: int = 0


@dataclass(frozen=True)
class File:
    path: Path | None = None
    data: bytes | None = None
    media_type: str = "image/png"


@dataclass(frozen=True)
class Taken:
    id: str


@dataclass(frozen=True)
class Hand:
    """What a status says of a worker."""

    stages: tuple[str, ...] = STAGES
    device: str = "cpu"
    dtype: str = "torch.float32"
    name: str = "hand"
    state: str = "idle"
    tasks: int = 0
    memory_bytes: int = 1000
    free_bytes: int = 500
    kept_bytes: int = 0
    weights: dict[str, int] = field(default_factory=dict)
    caches: tuple[CacheUse, ...] = (CacheUse(cache="transfer", hits=3, misses=1),)


def _shape(request: Request) -> dict[str, Any]:
    """What a request says of the size of what is made, where it says all of it."""
    sides = {"width": request.width, "height": request.height}
    length = {"num_frames": request.num_frames, "fps": request.fps or 16.0} if request.num_frames else {}
    return {**sides, **length} if all(sides.values()) else {}


@dataclass
class FakeEngine:
    """The server's Door. `refuse`: raised at the next submission."""

    refuse: Exception | None = None
    missing: tuple[str, ...] = ()
    topology: Topology = TOPOLOGY
    views: dict[str, View] = field(default_factory=dict)
    files: dict[str, list[File]] = field(default_factory=dict)
    submitted: list[tuple[Request, dict[str, Any]]] = field(default_factory=list)
    drained: threading.Event = field(default_factory=threading.Event)
    """set by a test that lets `drain` return"""
    closed: bool = False
    estimates: dict[str, Estimate] = field(default_factory=dict)
    vae_calls: list[tuple[VaeCall, bytes, dict[str, Any]]] = field(default_factory=list)
    vae_made: File | Failure | None = None
    """what a call of the VAE ends with at once; None: it does not end by itself"""

    workers: tuple[Hand, ...] = ()
    flushed: FlushReport = field(default_factory=FlushReport)
    """what a flush reports"""

    watchers: dict[str, list[Callable[[Any], None]]] = field(default_factory=dict)

    def submit(self, request: Request, **options: Any) -> Taken:
        if self.refuse is not None:
            raise self.refuse
        if (check := options.pop("check", None)) is not None:
            check(request)
        named, digest = options.pop("id", None), options.pop("digest", "")
        if named in self.views:
            raise InvalidRequest.of("id", named, "an id that no other job has")
        self.submitted.append((request, options))
        job = named or f"job{len(self.submitted)}"
        stages = tuple(StageSpec(stage=name, fields={}) for name in STAGES)
        spec = JobSpec(
            id=job, stages=stages, seed=7, workflow="text2image", priority=options.get("priority", 0),
            client=options.get("client", ""), preview=options.get("preview", False), digest=digest,
            request={"prompt": request.prompt, "seed": 7, **_shape(request)}, warnings=("a word it was never taught",),
            encoding=Encoding(format="mp4" if self.topology.makes == "video" else request.output_format or "png"),
        )  # fmt: skip
        self.views[job] = View(
            JobRecord(spec=spec, submitted=time.time(), attempts=[0, 0, 0]), position=len(self.views)
        )
        return Taken(job)

    def submit_vae(self, call: VaeCall, data: bytearray, **options: Any) -> str:
        if self.refuse is not None:
            raise self.refuse
        self.vae_calls.append((call, bytes(data), options))
        job = f"vae{len(self.vae_calls)}"
        spec = JobSpec(
            id=job, stages=(StageSpec(stage="decode", fields={}),), seed=0, workflow=call.task, bare=call.task,
            client=options.get("client", ""), encoding=options["encoding"],
        )  # fmt: skip
        self.views[job] = View(JobRecord(spec=spec, submitted=time.time(), attempts=[0]), position=len(self.views))
        if isinstance(self.vae_made, File):
            self.files[job] = [self.vae_made]
            self.put(job, "done", ended=time.time())
        elif self.vae_made is not None:
            self.put(job, "failed", ended=time.time(), failures=[self.vae_made])
        return job

    def id_of(self, client: str, name: str) -> str:
        return sha256(f"{client} {name}".encode()).hexdigest()[:32]

    def estimate(self, job: str) -> Estimate:
        return self.estimates.get(job, Estimate())

    def put(self, job: str, state: JobState, **changes: Any) -> None:
        """A job gets to another state; whoever watches it hears of its end."""
        record = msgspec.structs.replace(self.views[job].record, state=state, **changes)
        self.views[job] = replace(self.views[job], record=record, position=None)
        if state in ENDED:
            self.tell(job, Outcome(state=state, failures=tuple(record.failures)))
            self.watchers.pop(job, None)

    def tell(self, job: str, event: Stepped | Outcome) -> None:
        """Something happens to a job."""
        for watcher in tuple(self.watchers.get(job, ())):
            watcher(event)

    def watch(self, job: str, watcher: Callable[[Any], None]) -> Callable[[], None]:
        if job not in self.views:
            raise InvalidRequest.of("job", job, "a job that was submitted and has not expired")
        record = self.views[job].record
        if record.state in ENDED:
            watcher(Outcome(state=record.state, failures=tuple(record.failures)))
            return lambda: None
        self.watchers.setdefault(job, []).append(watcher)
        return lambda: self.watchers.get(job, [watcher]).remove(watcher)

    def jobs(
        self, *, client: str | None = None, states: Iterable[JobState] | None = None, before: str | None = None,
        limit: int = 50,
    ) -> list[JobRecord]:  # fmt: skip
        wanted = None if states is None else set(states)
        names = list(self.views)[::-1]
        names = names[names.index(before) + 1 :] if before in names else names if before is None else []
        records = [self.views[name].record for name in names]
        mine = [one for one in records if client is None or one.spec.client == client]
        return [one for one in mine if wanted is None or one.state in wanted][:limit]

    def under_way(self, client: str) -> int:
        return sum(one.state not in ENDED for one in self.jobs(client=client, limit=1000))

    def forget(self, job: str) -> bool:
        if job not in self.views:
            return False
        self.cancel(job)
        self.files.pop(job, None)
        return self.views.pop(job) is not None

    def view(self, job: str) -> View | None:
        return self.views.get(job)

    def cancel(self, job: str) -> bool:
        if self.views[job].record.state not in ("queued", "running"):
            return False
        self.put(job, "cancelled", ended=time.time())
        return True

    def result_files(self, job: str) -> list[File]:
        return self.files.get(job, [])

    def status(self) -> Status:
        jobs = {"queued": len(self.views)}
        totals = Totals(**dict.fromkeys(Totals.__struct_fields__, 0))
        workers: Any = self.workers
        return Status(
            coordinator="toy", uptime=1.0, stages=(), workers=workers, jobs=jobs, totals=totals, missing=(),
            fetching=0, draining=False, max_queue=256,
        )  # fmt: skip

    def flush(self, timeout: float = 30.0) -> FlushReport:
        if self.refuse is not None:
            raise self.refuse
        return self.flushed

    def missing_stages(self) -> tuple[str, ...]:
        return self.missing

    def drain(self, timeout: float) -> bool:
        return self.drained.wait(timeout)

    def close(self) -> None:
        self.closed = True

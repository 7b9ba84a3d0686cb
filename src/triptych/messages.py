"""What a coordinator and its workers say to each other, declared once: msgpack on a wire, the objects themselves in
one process. Nothing here holds a tensor; payloads go worker to worker and are named by descriptors."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Any, Literal

import msgspec

from triptych.request import StageName, VaeTask

__all__ = [
    "MEDIA_TYPES",
    "PROTOCOL",
    "Address",
    "Busy",
    "CacheUse",
    "Cancel",
    "Checkpointed",
    "Descriptor",
    "Drain",
    "Draining",
    "Encoding",
    "Expect",
    "Failed",
    "Flush",
    "Flushed",
    "FromWorker",
    "Goodbye",
    "Heartbeat",
    "Hello",
    "Loading",
    "PeerGone",
    "Picture",
    "Prove",
    "Proved",
    "Ready",
    "Refused",
    "Release",
    "Route",
    "Run",
    "SetPreview",
    "Stepped",
    "Stop",
    "Task",
    "TaskDone",
    "Ticket",
    "ToWorker",
    "Welcome",
    "decode_from_worker",
    "decode_to_worker",
    "encode",
    "protocol_of",
    "ticket_for",
    "ticket_is_good",
]

PROTOCOL = 4
"""Changes with every change of what is said here; unequal ones refuse each other."""

Route = Literal["reference", "memfd", "tcp", "mooncake"]


class Message(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Base of everything that is sent on its own."""


class Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Base of what is sent inside a message."""


class Address(Part, frozen=True):
    """One way to reach a payload: `at` is a process's token, a socket's path with its host's id, or host:port."""

    route: Route
    at: str


class Descriptor(Part, frozen=True):
    """A committed payload: which one, in which generation of its buffer, how large, and where it can be had. Whoever
    fetches needs a ticket for it."""

    payload: str
    generation: int
    head: int
    """bytes of its header"""
    body: int
    """bytes of its body"""
    owner: str
    """the exchange that keeps it"""
    addresses: tuple[Address, ...]


class Ticket(Part, frozen=True):
    """The right to fetch a payload once: made by the coordinator with the owner's secret."""

    descriptor: Descriptor
    token: bytes = b""


MEDIA_TYPES = {
    "png": "image/png",
    "webp": "image/webp",
    "jpeg": "image/jpeg",
    "mp4": "video/mp4",
    "safetensors": "application/x-safetensors",
}
"""What the files of each of an Encoding's formats are."""


class Encoding(Part, frozen=True):
    """Pictures or clips are to leave decode as files of this kind: png, webp, jpeg or mp4; what a VAE's call makes also
    as safetensors."""

    format: str
    fps: float | None = None
    metadata: dict[str, Any] | None = None
    """written into the file; None writes none"""


class Task(Part, frozen=True):
    """One stage's share of a job. `attempt` counts the times that this stage of this job was handed out, from a number
    of the job's own; answers to another one are ignored."""

    job: str
    stage: StageName
    attempt: int
    fields: dict[str, Any]
    """JSON values in the pipeline's own names, without pictures"""
    seed: int
    guidance_scale: float | None = None
    shift: float | None = None
    pictures: Ticket | None = None
    """the request's pictures, by field: uint8 (height, width, channels), or (bytes,) of a picture file"""
    payload: Ticket | None = None
    checkpoint: Ticket | None = None
    """where the same stage had got to; None: from the start"""
    preview: bool = False
    exact: bool = False
    """alone in its batch, nothing reused from other jobs"""
    raw: bool = False
    """from decode: float tensors in 0…1 as the pipeline made them"""
    encoding: Encoding | None = None
    """from decode: files instead of pixels"""
    checkpoint_seconds: float | None = None
    """seconds of work between two checkpoints; None: none"""
    bare: VaeTask | None = None
    """no pipeline's code: a call of the stage's VAE with the fields as options, on the tensor among the pictures"""


# From a worker to the coordinator.


class Hello(Message, frozen=True):
    """A process offers itself. Answered by Welcome or Refused. `incarnation` is new with every process and with every
    reconnection after it was declared dead."""

    protocol: int
    name: str
    incarnation: str
    stages: tuple[StageName, ...]
    model_digest: str
    """of the model's files and the workflow; the coordinator's own must be equal"""
    versions: dict[str, str]
    device: str
    pid: int
    host: str
    slot: str | None = None
    """the layout's place for it, when a launcher started it"""
    addresses: tuple[Address, ...] = ()
    owner: str = ""
    """its exchange's id"""
    secret: bytes = b""
    """tickets for its payloads are made with it"""
    dtype: str = ""
    """what most of its weights are held in, as torch names it"""


class Loading(Message, frozen=True):
    """Loading or compiling: neither silence nor a long unit counts against it."""

    what: str
    done: int = 0
    total: int = 0


class Ready(Message, frozen=True):
    """All stages are loaded. `topology` is the model's as msgpack (see `model.topology`)."""

    topology: bytes
    capacity: dict[StageName, int]
    """tasks that a stage takes at once"""
    credits: dict[StageName, int]
    """tasks that may be sent ahead, the running ones counted"""
    weights: dict[StageName, int]
    """bytes"""
    preview: bytes = b""
    """from a worker with decode but without denoise: the map from latents to colours, for SetPreview"""
    kept: tuple[str, ...] = ()
    """payloads from before this Welcome that it still keeps; those that no job needs are released"""


class Busy(Part, frozen=True):
    """What a worker is at: the unit that runs now, and for how many seconds it has."""

    job: str
    stage: StageName
    seconds: float


class CacheUse(Part, frozen=True):
    """How a cache has served since its worker started: how often it had what was asked for, and how often it had not.
    `stage`: None for one of the process, that its stages share."""

    cache: str
    hits: int
    misses: int
    stage: StageName | None = None


class Heartbeat(Message, frozen=True):
    """Sent each second by a thread of its own; renews the lease of all the worker's tasks."""

    busy: Busy | None = None
    moving: bool = False
    """inputs are being fetched, or outputs made into files and published, which may take longer than any unit"""
    memory_bytes: int = 0
    """resident, or allocated on the device"""
    free_bytes: int = 0
    kept: int = 0
    """payloads that it keeps for others"""
    kept_bytes: int = 0
    caches: tuple[CacheUse, ...] = ()


class Picture(Part, frozen=True):
    """A small preview: uint8 RGB rows."""

    width: int
    height: int
    pixels: bytes


class Stepped(Message, frozen=True):
    """A unit of a task is done: a denoising step, or the whole of a stage that has none."""

    job: str
    stage: StageName
    attempt: int
    step: int
    steps: int
    seconds: float
    """since the task began here"""
    preview: Picture | None = None


class Checkpointed(Message, frozen=True):
    """From this payload the task can go on after `step` steps."""

    job: str
    stage: StageName
    attempt: int
    step: int
    descriptor: Descriptor


class TaskDone(Message, frozen=True):
    """A task has ended well; its payload is kept until it is released."""

    job: str
    stage: StageName
    attempt: int
    descriptor: Descriptor
    seconds: float
    steps: int
    peak_bytes: int
    fetched_seconds: float = 0.0
    fetched_bytes: int = 0
    fetched_by: Route | None = None
    resumed_at: int = 0
    """steps taken over from a checkpoint"""
    last: Stepped | None = None
    """its last unit, if that was not told before"""


class Failed(Message, frozen=True):
    """A task has ended badly. `lost`: not by its own fault; what it should have fetched cannot be had."""

    job: str
    stage: StageName
    attempt: int
    code: str
    """of the error, as in `errors`"""
    message: str
    field: str | None = None
    original: str = ""
    """the type of the error beneath"""
    lost: Literal["pictures", "payload", "checkpoint"] | None = None
    damaged: bool = False
    """`lost` because a digest did not match"""


class Proved(Message, frozen=True):
    """The answer to Prove."""

    healthy: bool
    reason: str = ""


class Flushed(Message, frozen=True):
    """The answer to Flush: the bytes let go of, by cache; `process`: of caches that a worker's stages share."""

    number: int
    stages: dict[StageName, dict[str, int]]
    process: dict[str, int] = {}
    failed: dict[str, str] = {}
    """by `stage/cache` or `process/cache`: why it could not be flushed"""


class Draining(Message, frozen=True):
    """It finishes what it holds and then leaves: send it nothing more."""


class Goodbye(Message, frozen=True):
    """It leaves of its own will; what it keeps goes with it, and unfinished tasks are handed back."""

    reason: str = ""
    failed: bool = False
    """it ends by an error, of which a task that it holds may be the cause"""


# From the coordinator to a worker.


class Welcome(Message, frozen=True):
    """It is in."""

    coordinator: str
    heartbeat_seconds: float
    lease_seconds: float


class Refused(Message, frozen=True):
    """It is not, or no longer, in. `again`: it may come back with a new incarnation."""

    reason: str
    again: bool = False


class Run(Message, frozen=True):
    """Do this."""

    task: Task
    released: tuple[str, ...] = ()
    """payloads that nobody needs any more"""


class Expect(Message, frozen=True):
    """This task will probably come, as soon as its input is made: what needs none of that may be done now. Followed
    by its Run, or by Cancel."""

    task: Task


class Cancel(Message, frozen=True):
    """Drop this job's task before its next unit, if it is still there, and what was to be expected of it."""

    job: str


class Release(Message, frozen=True):
    """Nobody needs these payloads any more."""

    payloads: tuple[str, ...]


class PeerGone(Message, frozen=True):
    """Another worker's process is no more, and nothing that it was writing can arrive any more: its memory may be
    unmapped, its connections closed, and buffers that waited for it used again."""

    owner: str
    """its exchange"""


class Prove(Message, frozen=True):
    """A task failed there: answer Proved when everything else it holds is done or dropped and it still works."""


class Flush(Message, frozen=True):
    """Between two units, let go of what is kept only to be faster, and answer Flushed with the same number."""

    number: int


class SetPreview(Message, frozen=True):
    """Make previews with this map, as a decode worker gave it in Ready."""

    preview: bytes


class Drain(Message, frozen=True):
    """Finish what you hold and say Goodbye; no more tasks come. What you keep must stay until it is released."""


class Stop(Message, frozen=True):
    """End now, handing back what you hold."""


FromWorker = (
    Hello
    | Loading
    | Ready
    | Heartbeat
    | Stepped
    | Checkpointed
    | TaskDone
    | Failed
    | Proved
    | Flushed
    | Draining
    | Goodbye
)
ToWorker = Welcome | Refused | Run | Expect | Cancel | Release | PeerGone | Prove | Flush | SetPreview | Drain | Stop


class _AnyHello(msgspec.Struct, frozen=True, tag="Hello"):
    """As much of a Hello as every protocol has."""

    protocol: int


_ENCODER = msgspec.msgpack.Encoder()
_HELLO = msgspec.msgpack.Decoder(_AnyHello)
_FROM_WORKER = msgspec.msgpack.Decoder(FromWorker)
_TO_WORKER = msgspec.msgpack.Decoder(ToWorker)


def encode(message: FromWorker | ToWorker) -> bytes:
    """A message as msgpack."""
    return _ENCODER.encode(message)


def decode_from_worker(data: bytes | memoryview) -> FromWorker:
    """What a worker said. Raises msgspec.DecodeError (or its ValidationError) for anything else."""
    return _FROM_WORKER.decode(data)


def protocol_of(data: bytes | memoryview) -> int | None:
    """The protocol of a Hello, also of one that `decode_from_worker` cannot read because it speaks another; None for
    anything else."""
    try:
        return _HELLO.decode(data).protocol
    except msgspec.DecodeError:
        return None


def decode_to_worker(data: bytes | memoryview) -> ToWorker:
    """What the coordinator said. Raises like `decode_from_worker`."""
    return _TO_WORKER.decode(data)


def ticket_for(descriptor: Descriptor, secret: bytes) -> Ticket:
    """A ticket for one fetch, made with the owner's secret (at least 16 random bytes)."""
    nonce = secrets.token_bytes(16)
    return Ticket(
        descriptor=descriptor, token=nonce + _sealed(nonce, descriptor.payload, descriptor.generation, secret)
    )


def ticket_is_good(payload: str, generation: int, token: bytes, secret: bytes) -> bool:
    """Whether a token was made with this secret for this payload, compared in constant time. That it was not used
    before is the owner's to know (by its first 16 bytes)."""
    nonce, seal = token[:16], token[16:]
    return len(token) == 48 and hmac.compare_digest(seal, _sealed(nonce, payload, generation, secret))


def _sealed(nonce: bytes, payload: str, generation: int, secret: bytes) -> bytes:
    # Keyed BLAKE2b (RFC 7693): once per task, OpenSSL's HMAC takes far longer to wake up than to compute.
    data = nonce + generation.to_bytes(8, "big") + payload.encode()
    return hashlib.blake2b(data, key=secret[:64], digest_size=32).digest()

"""One tree of exceptions. Each has a code, a message for the person, and, where one is at fault, the field."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "Cancelled",
    "Damaged",
    "DeviceError",
    "InvalidRequest",
    "LoadError",
    "MediaError",
    "ModelNotFound",
    "NoWorker",
    "NotEnoughMemory",
    "PayloadLost",
    "QueueFull",
    "StageFailed",
    "TriptychError",
    "Unreachable",
    "Unsupported",
    "WrongPayload",
    "error_class",
]


class TriptychError(Exception):
    """Base of every error that Triptych raises on purpose."""

    code = "error"

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


class InvalidRequest(TriptychError):
    """A request's field holds what the model or the deployment cannot serve (HTTP 400 or 422)."""

    code = "invalid_request"

    @classmethod
    def of(cls, field: str, given: object, allowed: str | Iterable[str]) -> InvalidRequest:
        """The message every wrong field gets: its name, what was given, what is allowed."""
        text = allowed if isinstance(allowed, str) else ", ".join(allowed)
        shown = repr(given)
        return cls(f"given {shown if len(shown) <= 80 else shown[:77] + '...'}; allowed: {text}", field=field)


class MediaError(InvalidRequest):
    """A picture or clip that cannot be read, is too large, or is not what its name says."""

    code = "invalid_media"


class ModelNotFound(TriptychError):
    """No embedded model, folder or hub repository of that name."""

    code = "model_not_found"


class LoadError(TriptychError):
    """A component's files are missing, damaged, of a refused format, or do not fit its class."""

    code = "load_failed"


class Unsupported(TriptychError):
    """The model or this installation cannot do what was asked, and the message says why."""

    code = "unsupported"


class DeviceError(TriptychError):
    """The device is not there or cannot do what was asked."""

    code = "device"


class NotEnoughMemory(TriptychError):
    """The request's estimated bytes exceed what the device has."""

    code = "not_enough_memory"


class WrongPayload(TriptychError):
    """What arrived at a stage is not what its topology declares, or was damaged on the way."""

    code = "wrong_payload"


class Damaged(WrongPayload):
    """A payload's digest does not match: it was damaged on the way, and may arrive whole the next time."""

    code = "payload_damaged"


class PayloadLost(TriptychError):
    """A payload cannot be had: its keeper is gone or cut off, has let go of it, or refused the ticket."""

    code = "payload_lost"


class StorageFailed(TriptychError):
    """Something cannot be kept, or read where it is kept: a disk is full, or a store does not answer."""

    code = "storage_failed"


class QueueFull(TriptychError):
    """No more jobs are taken for now; in about `retry_after` seconds there may be room."""

    code = "queue_full"

    def __init__(self, message: str, *, retry_after: float = 1.0, field: str | None = None) -> None:
        super().__init__(message, field=field)
        self.retry_after = retry_after


class NoWorker(TriptychError):
    """A stage that the job needs has no worker, or nothing is taken any more."""

    code = "no_worker"


class Unreachable(TriptychError):
    """A server does not answer, or not to the end."""

    code = "unreachable"


class Cancelled(TriptychError):
    """The job was cancelled; nothing is wrong with it."""

    code = "cancelled"


class StageFailed(TriptychError):
    """A stage failed on one job: says which, and the original error's type, never its traceback."""

    code = "stage_failed"

    def __init__(self, message: str, *, stage: str, job: str, original: str = "", field: str | None = None) -> None:
        super().__init__(message, field=field)
        self.stage = stage
        self.job = job
        self.original = original


def error_class(code: str) -> type[TriptychError]:
    """The class of that code; TriptychError itself for a code that none has."""
    kinds = [TriptychError]
    for kind in kinds:  # grows on the way: the whole tree
        if kind.code == code:
            return kind
        kinds += kind.__subclasses__()
    return TriptychError

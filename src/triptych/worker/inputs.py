"""What a task brings, fetched from where it is kept, ahead of its turn."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from PIL import Image

from triptych.decode import read_image, read_mask
from triptych.errors import MediaError, TriptychError, WrongPayload
from triptych.messages import Route, Task, Ticket
from triptych.request import StageName
from triptych.stage import GatherStage, Stage, StageTask
from triptych.transfer import Exchange, Fetched, Header, Payload

Input = Literal["pictures", "payload", "checkpoint"]
MASKS = ("mask_image",)


class InputFailed(Exception):
    """An input did not come: which, and why."""

    def __init__(self, what: Input, error: TriptychError) -> None:
        super().__init__(f"{what}: {error}")
        self.what: Input = what
        self.error = error


@dataclass
class Brought:
    """A task with its inputs, and what fetching them took."""

    task: StageTask
    seconds: float = 0.0
    bytes: int = 0
    route: Route | None = None
    _fetched: list[Fetched] = field(default_factory=list)

    def close(self) -> None:
        """Lets go of the inputs; the task must have ended."""
        fetched, self._fetched = self._fetched, []
        for item in fetched:
            item.close()


class Inputs:
    """Fetches tasks' inputs through an exchange. The stages say what an input's header may hold, before memory is
    taken for its body of at most `limit` bytes."""

    def __init__(self, exchange: Exchange, stages: Mapping[StageName, Stage], limit: int) -> None:
        self._exchange = exchange
        self._stages = {name: stage for name, stage in stages.items() if isinstance(stage, GatherStage)}
        self._limit = limit

    def at_hand(self, task: Task) -> bool:
        """Whether bringing it takes but a moment. Another's pictures have to be read, which may take longer."""
        if task.pictures is not None and task.pictures.descriptor.owner != self._exchange.owner:
            return False
        return all(
            ticket is None or self._exchange.is_near(ticket.descriptor) for ticket in (task.payload, task.checkpoint)
        )

    def bring(self, task: Task) -> Brought:
        """The task, ready for its stage. Raises InputFailed for what does not come, MediaError for a picture that
        cannot be read."""
        brought, stage = Brought(stage_task(task)), self._stages.get(task.stage)
        try:
            if task.pictures is not None:
                check = stage and stage.expects_tensor if task.bare is not None else None
                hand_pictures(brought.task, self._fetch(brought, "pictures", task.pictures, check).payload)
            if task.payload is not None:
                fetched = self._fetch(brought, "payload", task.payload, stage and stage.expects)
                brought.task.payload = fetched.payload
            if task.checkpoint is not None:
                check = stage and stage.expects_checkpoint
                brought.task.checkpoint = self._fetch(brought, "checkpoint", task.checkpoint, check).payload
        except BaseException:
            brought.close()
            raise
        return brought

    def _fetch(self, brought: Brought, what: Input, ticket: Ticket, check: Callable[[Header], None] | None) -> Fetched:
        began = time.perf_counter()
        try:
            fetched = self._exchange.fetch(ticket, limit=self._limit, check=check)
        except TriptychError as error:
            raise InputFailed(what, error) from error
        brought._fetched.append(fetched)
        brought.seconds += time.perf_counter() - began
        brought.bytes += fetched.bytes
        brought.route = fetched.route
        return fetched


def stage_task(task: Task) -> StageTask:
    """The task as its stage takes it, without what has to be fetched."""
    return StageTask(
        job=task.job,
        fields=dict(task.fields),
        seed=task.seed,
        guidance_scale=task.guidance_scale,
        shift=task.shift,
        preview=task.preview,
        raw=task.raw,
        attempt=task.attempt,
        exact=task.exact,
        checkpoint_seconds=task.checkpoint_seconds,
        bare=task.bare,
    )


def hand_pictures(task: StageTask, payload: Payload) -> None:
    """Gives the task the pictures that its job came with, or a bare one its tensor. Raises MediaError."""
    if task.bare is None:
        task.fields.update(pictures_of(payload))
    else:
        task.payload = payload


def pictures_of(payload: Payload) -> dict[str, Any]:
    """The request's pictures by field, as the pipelines want them: PIL images, or lists of them. Raises MediaError."""
    return {name: _picture(name, value) for name, value in payload.values.items()}


def _picture(name: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_picture(name, item) for item in value]
    if not isinstance(value, torch.Tensor) or value.dtype != torch.uint8:
        raise WrongPayload("a picture crosses as uint8 pixels, or as the bytes of a file", field=name)
    if value.ndim == 1:
        read = read_mask if name in MASKS else read_image
        return read(value.numpy().tobytes(), field=name)
    pixels = value[..., 0] if value.ndim == 3 and value.shape[-1] == 1 else value
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] in (3, 4))) or not pixels.numel():
        raise MediaError(f"given pixels of shape {tuple(value.shape)}; allowed: height, width, 1, 3 or 4", field=name)
    return Image.fromarray(pixels.contiguous().numpy()).copy()


class Hands:
    """A few threads that do what they are told, in turn. What a job raises is its own business to catch."""

    def __init__(self, count: int, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._at_work: set[str] = set()
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{index}", daemon=True) for index in range(count)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def busy(self) -> bool:
        """Whether something is being done."""
        return bool(self._at_work)

    def give(self, job: Callable[[], None]) -> None:
        """Another thing to do; whoever gives bounds how many."""
        self._jobs.put(job)

    def close(self, timeout: float = 5.0) -> None:
        """Ends the threads, after what is under way or `timeout` seconds."""
        for _ in self._threads:
            self._jobs.put(None)
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _run(self) -> None:
        name = threading.current_thread().name
        while (job := self._jobs.get()) is not None:
            self._at_work.add(name)
            job()
            self._at_work.discard(name)

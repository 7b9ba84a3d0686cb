"""What the coordinator's side keeps of others' payloads: results, checkpoints, inputs of failed tasks, pictures."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import torch

from triptych.cluster import Kept, NotNear
from triptych.engine.jobs import ResultFile
from triptych.errors import StorageFailed, TriptychError
from triptych.messages import MEDIA_TYPES, Descriptor, ticket_for
from triptych.transfer import Exchange, Payload, payload_of, payload_parts, tensors_in

if TYPE_CHECKING:
    from triptych.cluster import ArtifactFolder

__all__ = ["Folder", "Memory", "PayloadKeeper", "Shelf"]

logger = logging.getLogger(__name__)

FETCHERS = 2
SUFFIXES = {kind: suffix for suffix, kind in MEDIA_TYPES.items()}
NAMES = {"input": "failed.payload"}
"""What the cluster calls a failed stage's input is a replay's payload."""
BESIDE = ("pictures", "checkpoint")
"""What else of a failed job a replay needs."""
Done = Callable[[Kept | Exception], None]


class Shelf(Protocol):
    """Where kept payloads lie, by job and name."""

    def is_memory(self, name: str) -> bool:
        """Whether putting a payload of that name takes but a moment."""
        ...

    def is_near(self, job: str, name: str) -> bool:
        """Whether getting it, if it is there, takes but a moment."""
        ...

    def put(self, job: str, name: str, payload: Payload) -> int:
        """Keeps a payload, in place of an older one of that name; returns its bytes."""
        ...

    def get(self, job: str, name: str) -> Payload:
        """What was kept. Raises KeyError."""
        ...

    def drop(self, job: str, name: str | None) -> None:
        """Forgets one, or all of a job's."""
        ...

    def keep_failed(self, job: str, task: bytes) -> None:
        """Keeps a failed task, and the job's pictures and checkpoint beside it, for a replay."""
        ...

    def files(self, job: str) -> list[ResultFile]:
        """The files that a finished job's result consists of."""
        ...


class Memory:
    """In this process, for as long as it lives."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, Payload]] = {}

    def is_memory(self, name: str) -> bool:
        """All is."""
        return True

    def is_near(self, job: str, name: str) -> bool:
        """All is."""
        return True

    def put(self, job: str, name: str, payload: Payload) -> int:
        """Keeps the payload itself."""
        self._kept.setdefault(job, {})[name] = payload
        return _bytes(payload)

    def get(self, job: str, name: str) -> Payload:
        """What was kept. Raises KeyError."""
        return self._kept[job][name]

    def drop(self, job: str, name: str | None) -> None:
        """Forgets one, or all of a job's."""
        if name is None:
            self._kept.pop(job, None)
        else:
            self._kept.get(job, {}).pop(name, None)

    def keep_failed(self, job: str, task: bytes) -> None:
        """Nothing: who has the error has the request too."""

    def files(self, job: str) -> list[ResultFile]:
        """From the result's bytes."""
        values = self._kept.get(job, {}).get("result", Payload({})).values
        pairs = zip(values.get("files", ()), values.get("media_types", ()), strict=True)
        return [ResultFile(kind, data=data.numpy().tobytes()) for data, kind in pairs]


class Folder:
    """In files, so that a restarted coordinator finds them. A result's own files (pictures, clips) lie as they are;
    other payloads in wire form. Unless `lasting`, a result of pixels stays in memory: its caller takes it at once."""

    def __init__(self, artifacts: ArtifactFolder, *, lasting: bool = True) -> None:
        self.artifacts = artifacts
        self._lasting = lasting
        self._pixels: dict[str, Payload] = {}

    def is_memory(self, name: str) -> bool:
        """A result is that its caller takes at once."""
        return name == "result" and not self._lasting

    def is_near(self, job: str, name: str) -> bool:
        """Whether its file is on this host."""
        return self.artifacts.is_near(job, NAMES.get(name, name))

    def put(self, job: str, name: str, payload: Payload) -> int:
        """Writes the payload's files, or the payload."""
        files = payload.values.get("files")
        if name == "result" and files is None and not self._lasting:
            self._pixels[job] = payload
            return _bytes(payload)
        if name != "result" or files is None:
            return self.artifacts.write(job, NAMES.get(name, name), *payload_parts(payload))
        total = 0
        for index, (data, kind) in enumerate(zip(files, payload.values["media_types"], strict=True)):
            total += self.artifacts.write(job, f"{index}.{SUFFIXES[kind]}", data.contiguous().numpy().data)
        return total

    def get(self, job: str, name: str) -> Payload:
        """Reads a payload. Raises KeyError."""
        if name == "result" and job in self._pixels:
            return self._pixels[job]
        return payload_of(self.artifacts.view(job, NAMES.get(name, name)))

    def drop(self, job: str, name: str | None) -> None:
        """Deletes a job's files, or one."""
        if name in (None, "result"):
            self._pixels.pop(job, None)
        if self.artifacts.names(job):
            self.artifacts.delete(job, None if name is None else NAMES.get(name, name))

    def keep_failed(self, job: str, task: bytes) -> None:
        """Writes `failed.task`, and copies of what else a replay needs."""
        self._keep_beside(job, "task", lambda: task)
        for name in BESIDE:
            self._keep_beside(job, name, functools.partial(self.artifacts.view, job, name))

    def _keep_beside(self, job: str, name: str, blob: Callable[[], bytes | memoryview]) -> None:
        try:
            self.artifacts.write_soon(job, f"failed.{name}", blob())
        except KeyError:
            pass
        except OSError as error:
            logger.warning("the %s of failed job %s cannot be kept for a replay: %s", name, job, error)

    def _path(self, job: str, name: str) -> Path:
        try:
            return self.artifacts.path(job, name)
        except OSError as error:
            raise StorageFailed(f"a result cannot be read: {error}") from error

    def files(self, job: str) -> list[ResultFile]:
        """The numbered files, in the order of the outputs."""
        found = []
        for name in self.artifacts.names(job):
            number, _, suffix = name.partition(".")
            if number.isdigit() and suffix in MEDIA_TYPES:
                file = ResultFile(MEDIA_TYPES[suffix], functools.partial(self._path, job, name))
                found.append((int(number), file))
        return [file for _, file in sorted(found, key=lambda pair: pair[0])]


def _bytes(payload: Payload) -> int:
    return sum(tensor.nbytes for tensor in tensors_in(payload.values))


def _own(value: Any) -> Any:
    """The value with every tensor cloned out of buffers that belong to others."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, list | tuple):
        return type(value)(map(_own, value))
    return {key: _own(item) for key, item in value.items()} if isinstance(value, dict) else value


class PayloadKeeper:
    """The coordinator's Keeper over an exchange and a shelf. What is near and stays in memory is kept at once, the rest
    on threads of its own."""

    def __init__(self, exchange: Exchange, shelf: Shelf) -> None:
        self._exchange = exchange
        self._shelf = shelf
        self._offered: dict[str, Descriptor] = {}
        self._coming: dict[str, Future[Payload]] = {}
        self._put_off: dict[str, list[str | None]] = {}
        """what is to be dropped of failed jobs once their tasks are kept"""
        self._lock = threading.Lock()
        self._fetchers = ThreadPoolExecutor(FETCHERS, thread_name_prefix="triptych-keeper")

    def put(self, job: str, what: str, payload: Payload) -> Kept:
        """Keeps a payload of this process' own, such as a request's pictures."""
        try:
            return Kept(name=f"{job}/{what}", bytes=self._shelf.put(job, what, payload))
        except OSError as error:
            raise StorageFailed(f"the {what} of job {job} cannot be kept: {error}") from error

    def take(self, job: str, what: str) -> Payload:
        """A kept payload, no longer kept. Raises KeyError."""
        payload = self._shelf.get(job, what)
        self.drop(job, what)
        return payload

    def keep(self, job: str, what: str, descriptor: Descriptor, secret: bytes, done: Done) -> None:
        """Fetches a payload and keeps it; see `cluster.Keeper`."""
        if self._exchange.is_near(descriptor) and self._shelf.is_memory(what):
            self._keep(job, what, descriptor, secret, done)
            return
        with contextlib.suppress(RuntimeError):  # closing: nobody waits any more
            self._fetchers.submit(self._keep, job, what, descriptor, secret, done)

    def _keep(self, job: str, what: str, descriptor: Descriptor, secret: bytes, done: Done) -> None:
        try:
            fetched = self._exchange.fetch(ticket_for(descriptor, secret))
            try:
                payload = fetched.payload
                if fetched.route != "reference":
                    payload = Payload(_own(payload.values), payload.tags, payload.job, payload.attempt, payload.stage)
                self._withdraw(f"{job}/{what}")
                kept = msgspec.structs.replace(
                    self.put(job, what, payload),
                    fetched_seconds=fetched.seconds,
                    fetched_bytes=fetched.bytes,
                    fetched_by=fetched.route,
                )
            finally:
                fetched.close()
        except Exception as error:  # whatever it is: without an answer the job would wait for ever
            if not isinstance(error, TriptychError | OSError):
                logger.exception("the %s of job %s cannot be kept", what, job)
            done(error)
            return
        done(kept)

    def offer(self, kept: str) -> tuple[Descriptor, bytes]:
        """What was kept, published for a worker to fetch. Raises KeyError if it is gone, or can no longer be read, and
        NotNear while it is being brought here."""
        with self._lock:
            if kept not in self._offered:
                try:
                    self._offered[kept] = self._exchange.publish(self._here(kept))
                except NotNear:
                    raise
                except Exception as error:  # whatever it is: a task that is not sent would never end
                    logger.warning("%s cannot be offered: %s: %s", kept, type(error).__name__, error)
                    raise KeyError(kept) from error
            return self._offered[kept], self._exchange.secret

    def _here(self, kept: str) -> Payload:
        job, _, what = kept.partition("/")
        coming = self._coming.get(kept)
        if coming is None:
            if self._shelf.is_near(job, what):
                return self._shelf.get(job, what)
            coming = self._coming[kept] = self._fetchers.submit(self._shelf.get, job, what)
        if not coming.done():
            raise NotNear(coming)
        return self._coming.pop(kept).result()

    def _withdraw(self, kept: str) -> None:
        with self._lock:
            self._coming.pop(kept, None)
            descriptor = self._offered.pop(kept, None)
        if descriptor is not None:
            self._exchange.release(descriptor.payload)

    def drop(self, job: str, what: str | None = None) -> None:
        """Forgets what was kept for a job: all of it, or `what`."""
        with self._lock:
            known = [name for name in (*self._offered, *self._coming) if name.startswith(f"{job}/")]
            names = [f"{job}/{what}"] if what else known
            if later := job in self._put_off:
                self._put_off[job].append(what)
        for name in names:
            self._withdraw(name)
        if not later:
            self._shelf.drop(job, what)

    def keep_failed(self, job: str, task: bytes) -> None:
        """Keeps a failed task for a replay, where there is a folder for it. What has to be brought here for that is
        on threads of the keeper's own, and dropped only afterwards."""
        if all(self._shelf.is_near(job, name) for name in BESIDE):
            self._shelf.keep_failed(job, task)
            return
        self._put_off[job] = []
        try:
            kept = self._fetchers.submit(self._shelf.keep_failed, job, task)
        except RuntimeError:  # closing
            self._drop_put_off(job)
        else:
            kept.add_done_callback(lambda _: self._drop_put_off(job))

    def _drop_put_off(self, job: str) -> None:
        with self._lock:
            put_off = dict.fromkeys(self._put_off.pop(job, ()))
        for what in put_off:
            self._shelf.drop(job, what)

    def files(self, job: str) -> list[ResultFile]:
        """A finished job's result as files; none if it has none, or they have expired."""
        return self._shelf.files(job)

    def trim(self) -> int:
        """Gives up memory of its exchange in which nothing lies; returns its bytes."""
        return self._exchange.trim()

    def close(self) -> None:
        """Waits for what is being fetched, for nothing that has not begun."""
        self._fetchers.shutdown(wait=True, cancel_futures=True)

"""Layouts: which stages run where, read from a file and then from flags."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from triptych.config.sections import (
    LOCAL,
    NAME,
    LimitsSection,
    ListenSection,
    Section,
    TransferSection,
    WorkerPlan,
)
from triptych.config.serve import ServeSection
from triptych.config.words import STAGES, is_loopback
from triptych.config.wrong import follows, line_of, problem
from triptych.errors import InvalidRequest
from triptych.request import StageName

__all__ = ["Layout", "Slot"]

Kind = TypeVar("Kind", bound=Section)


@dataclass(frozen=True)
class Slot:
    """A place for one worker process, as a layout says."""

    name: str
    stages: tuple[StageName, ...]
    device: str
    threads: int | None
    cpus: tuple[int, ...] | None
    dtype: str | None
    capacity: int | None
    host: str

    @property
    def local(self) -> bool:
        """Whether its process is started here."""
        return self.host == LOCAL

    def arguments(self) -> list[str]:
        """The part of a `triptych worker` command line that this slot decides."""
        cpus = None if self.cpus is None else ",".join(map(str, self.cpus))
        options = {
            "device": self.device, "threads": self.threads, "cpus": cpus, "dtype": self.dtype,
            "capacity": self.capacity, "name": self.name, "slot": self.name,
        }  # fmt: skip
        words = [",".join(self.stages)]
        for option, value in options.items():
            words += [] if value is None else [f"--{option}", str(value)]
        return words


class Layout(Section):
    """Which stages run where, how many of each, and under which bounds."""

    name: str = Field(default="file", pattern=NAME)
    """what people call it"""
    workers: tuple[WorkerPlan, ...] = Field(min_length=1, max_length=1024)
    """what runs where"""
    missing: Literal["fail", "wait"] = "fail"
    """a stage that no entry of `workers` holds: an error at the start, or fine, as one will join"""
    transfer: TransferSection = TransferSection()
    """how payloads travel"""
    limits: LimitsSection = LimitsSection()
    """what is bounded"""
    listen: ListenSection | None = None
    """where workers of other hosts join; null: nowhere"""
    serve: ServeSection = ServeSection()
    """the HTTP door"""

    @classmethod
    def fused(cls) -> Layout:
        """One worker that holds all of the model's stages."""
        return cls(name="fused", workers=(WorkerPlan(stages=("all",)),))

    @classmethod
    def split(cls) -> Layout:
        """A worker on this machine for each of the model's stages."""
        return cls(name="split", workers=(WorkerPlan(stages=("each",)),))

    @classmethod
    def of(cls, given: str | os.PathLike[str] | Layout) -> Layout:
        """`fused`, `split`, or a file's path. Raises InvalidRequest naming the first thing that is wrong."""
        if isinstance(given, Layout):
            return given
        return cls.fused() if given == "fused" else cls.split() if given == "split" else cls.load(given)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Layout:
        """Reads a YAML file. Raises InvalidRequest naming the first thing that is wrong, and its line."""
        found = cls.look(path)
        if isinstance(found, Layout):
            return found
        raise found[0]

    @classmethod
    def look(cls, path: str | os.PathLike[str]) -> Layout | list[InvalidRequest]:
        """Reads a YAML file; returns all that is wrong with it instead, one error each, if anything is."""
        from triptych.config.yaml_file import read_yaml

        try:
            content, lines = read_yaml(path)
        except InvalidRequest as error:
            return [error]
        try:
            found = cls.model_validate(content if content is not None else {})
            if found.name in ("fused", "split"):
                raise InvalidRequest.of(
                    "name", found.name, f"another name ({Path(path).name}, line {lines[('name',)]})"
                )
            return found
        except InvalidRequest as error:
            return [error]
        except ValidationError as error:
            name, wrong = Path(path).name, error.errors()
            told = [one for one in wrong if not follows(one, wrong)]
            told.sort(key=lambda one: line_of(one["loc"], lines))
            return [problem(cls, one, file=name, lines=lines) for one in told]

    def overridden(
        self, *, device: str | None = None, dtype: str | None = None, threads: int | None = None,
        capacity: int | None = None, listen: str | None = None, keys: Path | None = None,
        host: str | None = None, port: int | None = None, api_keys: Path | None = None,
        insecure: bool | None = None, artifacts: str | None = None, log_format: str | None = None,
        otlp: str | None = None,
    ) -> Layout:  # fmt: skip
        """With what flags say in place of what the file says; None leaves it. `device` and the three after it go for
        every worker. Raises InvalidRequest for a value that is not allowed."""
        plan = {"devices": device, "dtype": dtype, "threads": threads, "capacity": capacity}
        door = {
            "host": host, "port": port, "api_keys": api_keys, "insecure": insecure, "artifacts": artifacts,
            "log_format": log_format, "otlp": otlp,
        }  # fmt: skip
        join = {"endpoint": listen, "keys": keys}
        return _changed(
            self,
            workers=tuple(_changed(worker, **plan) for worker in self.workers),
            listen=_changed_listen(self.listen, join),
            serve=_changed(self.serve, **door),
        )

    def slots(self, stages: Iterable[StageName]) -> tuple[Slot, ...]:
        """A place for each worker process, for a model of these stages. Their names are unique."""
        own = tuple(stages)
        places = [(plan, held) for plan in self.workers for held in _held(plan, own) for _ in range(plan.replicas)]
        names = [plan.name or "-".join(held) for plan, held in places]
        count, made = Counter(names), Counter[str]()
        slots = []
        for name, (plan, held) in zip(names, places, strict=True):
            number, made[name] = made[name], made[name] + 1
            full = name if count[name] == 1 else f"{name}-{number}"
            device, host = plan.devices[0], plan.host
            slots.append(Slot(full, held, device, plan.threads, plan.cpus, plan.dtype, plan.capacity, host))
        return tuple(slots)

    def missing_stages(self, stages: Iterable[StageName]) -> tuple[StageName, ...]:
        """The model's stages that no worker of this layout holds."""
        own = tuple(stages)
        held = {stage for slot in self.slots(own) for stage in slot.stages}
        return tuple(stage for stage in own if stage not in held)

    def check(self, stages: Sequence[StageName], memory_bytes: int | None = None) -> None:
        """Whether it fits a model of these stages and a host of so much memory. Raises InvalidRequest for the first
        thing that does not."""
        for wrong in self.problems(stages, memory_bytes):
            raise wrong

    def problems(self, stages: Sequence[StageName], memory_bytes: int | None = None) -> list[InvalidRequest]:
        """All that does not fit a model of these stages, or a host of so much memory, one error each."""
        found = [error for index, plan in enumerate(self.workers) for error in self._wrong(index, plan, stages)]
        lacking = self.missing_stages(stages)
        if lacking and self.missing == "fail":
            allowed = f"one for {', '.join(lacking)} too (or `missing: wait`, to wait for one to join)"
            found.append(InvalidRequest.of("workers", ", ".join(sorted(self._words())), allowed))
        slots = self.slots(stages)
        twice = sorted(name for name, count in Counter(slot.name for slot in slots).items() if count > 1)
        if twice:
            found.append(InvalidRequest.of("workers", ", ".join(twice), "names that differ once they are numbered"))
        return found + self._wrong_addresses(slots) + self._wrong_memory(slots, memory_bytes)

    def _words(self) -> set[str]:
        return {word for plan in self.workers for word in plan.stages}

    def _wrong(self, index: int, plan: WorkerPlan, stages: Sequence[StageName]) -> list[InvalidRequest]:
        at = f"workers[{index}]"
        found = [
            InvalidRequest.of(f"{at}.stages", word, [*stages, "all", "each"])
            for word in plan.stages
            if word not in {*stages, "all", "each"}
        ]
        if len(plan.devices) > 1:
            allowed = "one device (a stage on several is not there yet; for several workers write an entry for each)"
            found.append(InvalidRequest.of(f"{at}.devices", list(plan.devices), allowed))
        if plan.host != LOCAL and self.listen is None:
            allowed = f"{LOCAL}, as there is no `listen` section for workers of other hosts to join"
            found.append(InvalidRequest.of(f"{at}.host", plan.host, allowed))
        return found

    def _wrong_addresses(self, slots: Sequence[Slot]) -> list[InvalidRequest]:
        transfer = self.transfer
        if transfer.routes is not None and not {"tcp", "mooncake"} & set(transfer.routes):
            return []
        here = sum(slot.local for slot in slots)
        far = sorted({slot.host for slot in slots if not slot.local})
        joined = self.listen is not None and not is_loopback(self.listen.host)
        found = []
        if transfer.port and here:
            allowed = f"0, as {here} workers and the coordinator on this host each need a port of their own"
            found.append(InvalidRequest.of("transfer.port", transfer.port, allowed))
        if far and joined and transfer.advertise is None and is_loopback(transfer.host):
            allowed = f"an address of this host that {', '.join(far)} can reach"
            found.append(InvalidRequest.of("transfer.host", transfer.host, allowed))
        return found

    def _wrong_memory(self, slots: Sequence[Slot], memory_bytes: int | None) -> list[InvalidRequest]:
        if memory_bytes is None:
            return []
        here = sum(slot.local for slot in slots)
        pool, budget = self.transfer.pool_bytes, self.transfer.budget_bytes
        found = []
        if 2 * pool * here > memory_bytes:
            most = memory_bytes // max(2 * here, 1)
            allowed = f"at most {most}, as {here} workers with two pools each share {memory_bytes} bytes of memory"
            found.append(InvalidRequest.of("transfer.pool_bytes", pool, allowed))
        if budget > memory_bytes:
            allowed = f"at most this host's memory, {memory_bytes} bytes"
            found.append(InvalidRequest.of("transfer.budget_bytes", budget, allowed))
        if budget < pool:
            found.append(InvalidRequest.of("transfer.budget_bytes", budget, f"at least pool_bytes, {pool}"))
        return found


def _held(plan: WorkerPlan, own: tuple[StageName, ...]) -> list[tuple[StageName, ...]]:
    """The stages of each process that one replica of a plan stands for, in the model's order."""
    if plan.stages == ("all",):
        return [own]
    if plan.stages == ("each",):
        return [(stage,) for stage in own]
    return [tuple(stage for stage in STAGES if stage in plan.stages)]


def _values(section: Section) -> dict[str, Any]:
    return {name: getattr(section, name) for name in type(section).model_fields}


def _changed(section: Kind, **fields: Any) -> Kind:
    given = {name: value for name, value in fields.items() if value is not None}
    if not given:
        return section
    try:
        return type(section).model_validate({**_values(section), **given})
    except ValidationError as error:
        raise problem(type(section), error.errors()[0]) from None


def _changed_listen(section: ListenSection | None, fields: dict[str, Any]) -> ListenSection | None:
    given = {name: value for name, value in fields.items() if value is not None}
    before = {} if section is None else _values(section)
    if not given:
        return section
    if not {**before, **given}.keys() >= {"endpoint", "keys"}:
        (only,) = given.values()
        raise InvalidRequest.of("listen", str(only), "an endpoint and a folder of keys, both")
    try:
        return ListenSection.model_validate({**before, **given})
    except ValidationError as error:
        wrong = problem(ListenSection, error.errors()[0])
        raise InvalidRequest(wrong.message, field="listen" if wrong.field == "endpoint" else wrong.field) from None

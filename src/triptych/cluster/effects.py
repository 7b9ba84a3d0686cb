"""Carries out what the scheduler decides: messages to workers, writes to the store, payloads to the keeper."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import msgspec

from triptych.cluster.absentees import Absentees
from triptych.cluster.delivery import Delivery
from triptych.cluster.jobs import ENDED, JobRecord, JobStore, Keeper, Kept, Link, NotNear, Outcome
from triptych.cluster.observers import Observers
from triptych.cluster.scheduling.actions import (
    Action,
    Ask,
    Assign,
    CancelAt,
    Dismiss,
    Drop,
    Ended,
    Fetch,
    Foretell,
    GiveMap,
    Let,
    Persist,
    WriteTask,
)
from triptych.cluster.scheduling.live import Live
from triptych.cluster.scheduling.scheduler import Scheduler
from triptych.messages import (
    Cancel,
    Descriptor,
    Expect,
    Hello,
    PeerGone,
    Prove,
    Refused,
    Release,
    Run,
    SetPreview,
    Task,
    Ticket,
    ToWorker,
    ticket_for,
)

__all__ = ["Effects", "outcome_of"]

logger = logging.getLogger(__name__)

MUCH = 1 << 20
"""Bytes whose release is told at once."""
FINAL = ("unhealthy", "superseded")
"""Kinds of dismissal after which a worker may not come back: two of one slot would oust each other for ever."""


class Effects:
    """Used under the coordinator's lock only. `answer` takes what the keeper says; `changed` wakes those who wait for
    jobs to end and workers to be ready."""

    def __init__(
        self,
        scheduler: Scheduler,
        store: JobStore,
        keeper: Keeper,
        delivery: Delivery,
        *,
        answer: Callable[[str, str, int, Kept | Exception], None],
        changed: Callable[[], None],
        observers: Observers,
        dismissed: Callable[[Hello, str, str], None] | None,
        failed: Callable[[JobRecord, Task], None] | None,
        gone: Callable[[str], None] | None,
        clock: Callable[[], float],
    ) -> None:
        self.links: dict[str, Link] = {}
        """by incarnation"""
        self.unsaved: dict[str, JobRecord] = {}
        """ended jobs that the store did not take; tried again"""
        self._scheduler, self._store, self._keeper, self._delivery = scheduler, store, keeper, delivery
        self._answer, self._changed = answer, changed
        self._observers, self._dismissed, self._failed = observers, dismissed, failed
        self._gone, self._clock = gone, clock
        self._absent = Absentees()
        self._released: dict[str, list[str]] = {}
        """by worker, what is told with the next task"""
        self._to_do: deque[Action] = deque()
        self._performing = False
        self._perform_one: dict[type, Callable[..., None]] = {
            Assign: self._run,
            Foretell: self._foretell,
            CancelAt: lambda action: self.send(action.worker, Cancel(job=action.job)),
            Let: self._let,
            Ask: lambda action: self.send(action.worker, Prove()),
            GiveMap: lambda action: self.send(action.worker, SetPreview(preview=action.preview)),
            Dismiss: self._dismiss,
            Fetch: self._fetch,
            Drop: lambda action: self._keeper.drop(action.job, action.what),
            Persist: self._persist,
            WriteTask: self._write_task,
            Ended: self._tell_end,
        }

    def perform(self) -> None:
        """Carries out what the scheduler wants. A keeper that answers at once brings more, which comes after."""
        self._to_do.extend(self._scheduler.take())
        if self._performing:
            return
        self._performing = True
        try:
            while self._to_do:
                action = self._to_do.popleft()
                try:
                    self._perform_one[type(action)](action)
                except Exception:  # one action's failure must not lose the others'
                    logger.exception("could not carry out %s", type(action).__name__)
                self._to_do.extend(self._scheduler.take())
        finally:
            self._performing = False

    def send(self, worker: str, message: ToWorker) -> None:
        """Says something to a worker, if it is in."""
        if link := self.links.get(worker):
            link.send(message)

    def hang_up(self, last: ToWorker | None) -> None:
        """Ends every line, with a last message if there is one."""
        for link in self.links.values():
            if last is not None:
                link.send(last)
            link.close()
        self.links.clear()
        self._released.clear()

    def save_again(self) -> None:
        """Offers the store once more what it did not take."""
        for job, record in list(self.unsaved.items()):
            del self.unsaved[job]
            self._persist(Persist(record))

    def _run(self, action: Assign) -> None:
        live = self._scheduler.jobs.get(action.job)
        if live is None or live.worker is None or live.worker.id != action.worker or action.worker not in self.links:
            return  # or the coordinator has closed while something was brought here
        record = live.record
        if record.attempts[record.stage] != action.attempt:
            return
        try:
            task = self._task(live)
        except NotNear as error:  # nobody waits for a store under the lock
            error.coming.add_done_callback(partial(self._again, action))
            return
        if task is None:
            return
        self.send(action.worker, Run(task=task, released=tuple(self._released.get(action.worker, ()))))
        self._released.pop(action.worker, None)  # not before: what could not be sent is told again
        name = live.worker.hello.name
        self._observers.assigned(record.spec, task.stage, action.attempt, name, action.waited, self._clock())

    def _foretell(self, action: Foretell) -> None:
        live = self._scheduler.jobs.get(action.job)
        if live is not None and live.foretold.get(action.stage) == action.worker:
            attempt = live.record.attempts[action.stage] + 1
            self.send(action.worker, Expect(task=self._unticketed(live.record, action.stage, attempt)))

    def _again(self, action: Assign, coming: Future[Any]) -> None:
        """Called from the keeper's threads: whatever is said to the coordinator has it perform what is to do."""
        self._to_do.append(action)
        self._answer(action.job, "", 0, NotNear(coming))

    def _task(self, live: Live) -> Task | None:
        """The task with tickets for all that it needs; None if the keeper has lost what it cannot do without. Raises
        NotNear."""
        record = live.record
        spec, part = record.spec, record.spec.stages[record.stage]
        pictures = checkpoint = None
        if part.pictures and spec.pictures is not None:
            pictures = self._offer(live, "pictures", spec.pictures)
            if pictures is None:
                return None
        if record.checkpoint is not None and record.checkpoint_stage == record.stage:
            checkpoint = self._offer(live, "checkpoint", record.checkpoint.name)
        return msgspec.structs.replace(
            self._unticketed(record, record.stage, record.attempts[record.stage]),
            pictures=pictures,
            payload=self._ticket(live.input),
            checkpoint=checkpoint,
        )

    def _offer(self, live: Live, what: str, name: str) -> Ticket | None:
        try:
            return ticket_for(*self._keeper.offer(name))
        except NotNear:
            raise
        except KeyError:
            reason = "no longer kept"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        logger.warning("the %s of job %s cannot be had: %s", what, live.id, reason)
        self._scheduler.gone(live.id, what, reason)
        return None

    def _ticket(self, descriptor: Descriptor | None) -> Ticket | None:
        if descriptor is None:
            return None
        owner = self._scheduler.fleet.owner(descriptor.owner)
        return ticket_for(descriptor, owner.hello.secret) if owner else Ticket(descriptor=descriptor)

    def _let(self, action: Let) -> None:
        """At once only where much memory may be waited for: each message takes its worker's time from the next task."""
        if action.worker in self.links:
            self._released.setdefault(action.worker, []).append(action.payload)
            if action.bytes is None or action.bytes >= MUCH:
                self._tell_released(action.worker)

    def _tell_released(self, worker: str) -> None:
        self.links[worker].send(Release(payloads=tuple(self._released.pop(worker))))

    def _fetch(self, action: Fetch) -> None:
        answer = partial(self._answer, action.job, action.what, action.number)
        try:
            self._keeper.keep(action.job, action.what, action.descriptor, action.secret, answer)
        except Exception as error:
            answer(error)

    def _dismiss(self, action: Dismiss) -> None:
        hello, link = action.hello, self.links.pop(action.worker, None)
        self._released.pop(action.worker, None)
        if link is not None:
            if action.kind != "left":
                said = {"event": "worker out", "worker": hello.name, "reason": f"{action.kind}: {action.reason}"}
                logger.warning("worker %s is out, %s: %s", hello.name, action.kind, action.reason, extra=said)
                reason = f"{action.kind}: {action.reason}"
                link.send(Refused(reason=reason, again=action.kind not in FINAL))
            link.close()
        if action.kind == "left":
            self._peer_gone(hello.owner)
        elif self._scheduler.fleet.owner(hello.owner) is None:
            self._absent.add(hello, self._clock())
        self._observers.went(hello, action.kind, action.reason, self._clock())
        if dismissed := self._dismissed:
            self._delivery.tell(lambda one: dismissed(one.hello, one.kind, one.reason), action)
        self._changed()

    def back(self, owner: str) -> None:
        """A worker that was out is in again."""
        self._absent.back(owner)

    def ended(self, slot: str, pid: int | None) -> None:
        """A process of a launcher's slot has ended (None: whichever)."""
        for owner in self._absent.ended(slot, pid):
            self._peer_gone(owner)

    def look(self) -> None:
        """Tells what was put off, and gives up those that have been away too long."""
        for worker in list(self._released):
            self._tell_released(worker)
        for owner in self._absent.overdue(self._clock()):
            self._peer_gone(owner)

    def _peer_gone(self, owner: str) -> None:
        for link in self.links.values():
            link.send(PeerGone(owner=owner))
        if self._gone:
            self._delivery.tell(self._gone, owner)

    def _persist(self, action: Persist) -> None:
        record = action.record
        try:
            self._store.put(record)
        except Exception as error:
            logger.error("the job store did not take job %s: %s", record.spec.id, error)
            if record.state in ENDED:
                self.unsaved[record.spec.id] = record

    def _write_task(self, action: WriteTask) -> None:
        if self._failed:
            record = action.record
            self._failed(record, self._unticketed(record, action.stage, record.attempts[action.stage]))

    def _unticketed(self, record: JobRecord, stage: int, attempt: int) -> Task:
        """A stage's task, without tickets."""
        spec, part = record.spec, record.spec.stages[stage]
        last = stage == len(spec.stages) - 1
        return Task(
            job=spec.id,
            stage=part.stage,
            attempt=record.mark + attempt,
            fields=part.fields,
            seed=spec.seed,
            guidance_scale=spec.guidance_scale,
            shift=spec.shift,
            preview=spec.preview,
            exact=spec.exact,
            raw=spec.raw and last,
            encoding=spec.encoding if last else None,
            checkpoint_seconds=self._scheduler.limits.checkpoint_seconds,
            bare=spec.bare,
        )

    def _tell_end(self, action: Ended) -> None:
        self._observers.ended(action.record, self._clock())
        self._delivery.put(action.record.spec.id, outcome_of(action.record))
        self._changed()


def outcome_of(record: JobRecord) -> Outcome:
    """How an ended job ended."""
    return Outcome(state=record.state, result=record.result, failures=tuple(record.failures))

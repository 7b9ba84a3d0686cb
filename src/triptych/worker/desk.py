"""A worker's tasks, from their arrival to what they made: fetched ahead, admitted, driven, handed on. One thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from triptych.errors import Cancelled, StageFailed, TriptychError, Unsupported
from triptych.messages import Checkpointed, Descriptor, Stepped, Task, TaskDone
from triptych.messages import Failed as FailedMessage
from triptych.request import StageName
from triptych.stage import Admitted, Checkpoint, Failed, Full, Output, Stage, StageEvent, StepDone
from triptych.transfer import tensors_in
from triptych.worker.health import Pulse
from triptych.worker.inputs import Brought, Hands, InputFailed, Inputs, stage_task
from triptych.worker.outbox import Outbox
from triptych.worker.outputs import as_files, failed, picture
from triptych.worker.previews import Previews

logger = logging.getLogger(__name__)

FETCHERS = 2
AT_ONCE = 1 << 22
"""Bytes that a worker with no other task publishes by itself, as that is sooner done than handed over."""


@dataclass(eq=False)
class Held:
    """A task in this worker's hands: its inputs under way (`brought` is None), waiting for room, or running."""

    task: Task
    at_hand: bool
    """its inputs are brought by whoever takes it in"""
    brought: Brought | None = None
    running: bool = False
    dropped: bool = False
    last: Stepped | None = None
    """its last step, told with its end"""


@dataclass(frozen=True)
class Given:
    """A task has been given to this worker; its inputs are on their way, unless they are at hand."""

    held: Held


@dataclass(frozen=True)
class Arrived:
    """A task's inputs are here, or will not come."""

    held: Held
    outcome: Brought | Exception


class Desk:
    """The tasks of all of a worker's stages. `tell` is called, from other threads, with what belongs to `take` and
    `arrive`; `credits` are the tasks that each stage is sent at most, and twice as many are refused."""

    def __init__(
        self,
        stages: Mapping[StageName, Stage],
        credits: Mapping[StageName, int],
        inputs: Inputs,
        outbox: Outbox,
        pulse: Pulse,
        previews: Previews,
        tell: Callable[[Given | Arrived], None],
    ) -> None:
        self._stages = stages
        self._credits = credits
        self._inputs = inputs
        self._outbox = outbox
        self._pulse = pulse
        self._previews = previews
        self._tell = tell
        self._hands = Hands(FETCHERS, "triptych-inputs")
        self._held: dict[StageName, dict[str, Held]] = {name: {} for name in stages}
        self._expected: dict[str, StageName] = {}
        names: list[StageName] = list(stages)
        self._backwards = names[::-1]

    @property
    def empty(self) -> bool:
        """Whether no task is here."""
        return not any(self._held.values())

    @property
    def waits(self) -> bool:
        """Whether there is nothing to compute now."""
        return all(held.brought is None for tasks in self._held.values() for held in tasks.values())

    @property
    def moving(self) -> bool:
        """Whether inputs are being fetched or outputs handed on; from any thread."""
        return self._hands.busy or not self._outbox.idle

    def turn(self) -> None:
        """Admits, runs one unit of each stage, reports; the last stage first, so that what is nearly done leaves."""
        for name in self._backwards:
            if self._held[name]:
                self._admit(name)
                self._report_all(name, self._step(name))

    def give(self, task: Task) -> None:
        """A new task, from any thread: its inputs are fetched at once, while a unit runs."""
        held = Held(task, self._inputs.at_hand(task))
        self._tell(Given(held))
        if not held.at_hand:
            self._hands.give(lambda: self._tell(Arrived(held, self._bring(held))))

    def take(self, given: Given) -> None:
        """Takes a task in, whether or not there is room for it in its stage yet."""
        held, task = given.held, given.held.task
        tasks = self._held.get(task.stage)
        if tasks is None:
            return self._refuse(held, Unsupported(f"this worker has no stage {task.stage}"))
        if task.job in tasks:  # given again, after an attempt that was given up
            self._end(tasks[task.job])
        most = 2 * self._credits[task.stage]
        if len(tasks) >= most:
            self._expect_no_more(task.job)
            return self._refuse(held, TriptychError(f"stage {task.stage} was sent more than {most} tasks at once"))
        tasks[task.job] = held
        if self._expected.get(task.job) == task.stage:
            del self._expected[task.job]  # its stage goes on with what it has of it
        if held.at_hand:
            self.arrive(Arrived(held, self._bring(held)))
        return None

    def arrive(self, arrived: Arrived) -> None:
        """A task's inputs have come, or not."""
        held, outcome = arrived.held, arrived.outcome
        if held.dropped:
            if isinstance(outcome, Brought):
                outcome.close()
        elif isinstance(outcome, Brought):
            held.brought = outcome
        else:
            self._fail(held, outcome)

    def drop(self, job: str) -> None:
        """Ends a job's tasks before their next unit, wherever they are; nothing more is said of it."""
        for tasks in self._held.values():
            if job in tasks:
                self._end(tasks[job])
        self._expect_no_more(job)
        self._outbox.drop(job)

    def expect(self, task: Task) -> None:
        """Prepares for a task that will come, if there is nothing else to do."""
        if task.stage not in self._stages or not self.empty:
            return
        self._expected[task.job] = task.stage
        self._pulse.unit = (task.job, task.stage, time.monotonic())
        try:
            self._stages[task.stage].expect(stage_task(task))
        except Exception:  # nothing hangs on it; the task itself will tell
            logger.exception("stage %s could not prepare for job %s", task.stage, task.job)
        finally:
            self._pulse.unit = None

    def expect_nothing(self) -> None:
        """Undoes all such preparations."""
        for job in list(self._expected):
            self._expect_no_more(job)

    def _expect_no_more(self, job: str) -> None:
        if (name := self._expected.pop(job, None)) is not None:
            self._stages[name].cancel(job)

    def drop_all(self) -> None:
        """Ends every task; nothing more is said of any."""
        for tasks in self._held.values():
            for held in list(tasks.values()):
                self._end(held)
        self.expect_nothing()
        self._outbox.drop()

    def close(self) -> None:
        """Drops everything and ends the threads that fetch."""
        self.drop_all()
        self._hands.close()

    def _refuse(self, held: Held, error: TriptychError) -> None:
        held.dropped = True
        self._outbox.send(held.task.job, failed(held.task, error))

    def _bring(self, held: Held) -> Brought | Exception:
        if held.dropped:
            return Cancelled("the task was dropped")
        try:
            return self._inputs.bring(held.task)
        except Exception as error:
            return error

    def _admit(self, name: StageName) -> None:
        for held in list(self._held[name].values()):
            if held.running or held.brought is None:
                continue
            if held.task.preview:
                self._previews.start()
            try:
                answer = self._stages[name].admit(held.brought.task)
            except Exception as error:
                self._fail(held, error)
                continue
            if isinstance(answer, Full):
                return
            if isinstance(answer, Admitted):
                held.running = True
            else:
                self._fail(held, answer.error)

    def _step(self, name: StageName) -> list[StageEvent]:
        first = next((held for held in self._held[name].values() if held.running), None)
        if first is None:
            return []
        self._pulse.unit = (first.task.job, name, time.monotonic())
        try:
            return self._stages[name].step()
        except Exception as error:  # not of one task, or the stage would have told: all of them are in doubt
            for held in [held for held in self._held[name].values() if held.running]:
                self._fail(held, error)
            return []
        finally:
            self._pulse.unit = None

    def _report_all(self, name: StageName, events: list[StageEvent]) -> None:
        """A task's last step is told with its end: each message costs both sides something."""
        for index, event in enumerate(events):
            held = self._held[name].get(event.job)
            if held is None:
                continue
            following = events[index + 1] if index + 1 < len(events) else None
            ends = isinstance(following, Output) and following.job == event.job and held.task.encoding is None
            if isinstance(event, StepDone) and ends:
                held.last = _stepped(held.task, event)
            else:
                self._report(held, event)

    def _report(self, held: Held, event: StageEvent) -> None:
        match event:
            case StepDone():
                self._outbox.send(event.job, _stepped(held.task, event))
            case Checkpoint():
                self._checkpoint(held.task, event)
            case Output():
                self._hand_on(held, event)
            case Failed():
                self._fail(held, event.error)

    def _checkpoint(self, task: Task, event: Checkpoint) -> None:
        def make() -> Checkpointed | None:
            try:
                kept = self._outbox.keep(event.payload)
            except TriptychError as error:  # the task goes on; a later one may find room
                logger.warning("no checkpoint of job %s at step %d: %s", task.job, event.step, error)
                return None
            return Checkpointed(job=task.job, stage=task.stage, attempt=task.attempt, step=event.step, descriptor=kept)

        self._outbox.make(task.job, make)

    def _hand_on(self, held: Held, event: Output) -> None:
        """The task has ended well: what it made is published while the next unit runs, if there is one."""
        task, brought = held.task, held.brought
        assert brought is not None
        del self._held[task.stage][task.job]

        def make() -> TaskDone | FailedMessage:
            try:
                made = event.payload if task.encoding is None else as_files(event.payload, task.encoding)
                return _done(held, brought, event, self._outbox.keep(made))
            except Exception as error:
                _log(task, error)
                return failed(task, error)

        idle = self.empty and sum(tensor.nbytes for tensor in tensors_in(event.payload.values)) <= AT_ONCE
        self._outbox.make(task.job, make, finish=brought.close, light=task.encoding is None, idle=idle)

    def _fail(self, held: Held, error: Exception) -> None:
        _log(held.task, error)
        self._end(held)
        self._outbox.send(held.task.job, failed(held.task, error))

    def _end(self, held: Held) -> None:
        task = held.task
        held.dropped = True
        self._held[task.stage].pop(task.job, None)
        self._stages[task.stage].cancel(task.job)  # if it does not run, it may have been expected
        if held.brought is not None:
            held.brought.close()


def _stepped(task: Task, event: StepDone) -> Stepped:
    return Stepped(
        job=task.job,
        stage=task.stage,
        attempt=task.attempt,
        step=event.step,
        steps=event.steps,
        seconds=event.seconds,
        preview=picture(event.preview),
    )


def _done(held: Held, brought: Brought, event: Output, kept: Descriptor) -> TaskDone:
    task = held.task
    return TaskDone(
        job=task.job,
        stage=task.stage,
        attempt=task.attempt,
        descriptor=kept,
        seconds=event.seconds,
        steps=event.steps,
        peak_bytes=event.peak_bytes,
        fetched_seconds=brought.seconds,
        fetched_bytes=brought.bytes,
        fetched_by=brought.route,
        resumed_at=event.resumed_at,
        last=held.last,
    )


def _log(task: Task, error: Exception) -> None:
    """One line; the whole story only for what nobody foresaw."""
    foreseen = isinstance(error, TriptychError | InputFailed) and not isinstance(error, StageFailed)
    story = None if foreseen else error
    logger.warning("job %s failed in %s: %s", task.job, task.stage, error, exc_info=story)

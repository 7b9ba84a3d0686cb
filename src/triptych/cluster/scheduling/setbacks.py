"""What follows when something goes wrong: whether a job goes on, from where, and at whose cost."""

from __future__ import annotations

import math

from triptych.cluster.jobs import Failure, JobRecord, Kept, snapshot
from triptych.cluster.scheduling.actions import Ask, Dismiss, Drop, Persist, WriteTask
from triptych.cluster.scheduling.board import Board
from triptych.cluster.scheduling.ledger import Pending
from triptych.cluster.scheduling.live import Live, Member
from triptych.messages import Failed

__all__ = ["Setbacks"]

FINAL = frozenset({"invalid_request", "invalid_media", "unsupported"})
"""Codes of errors that come again wherever the job runs."""

DAMAGES_BEFORE_REMAKE = 3
"""From this damaged fetch on the source itself is suspected."""


class Setbacks(Board):
    """The part of the scheduler that deals with lost workers, lost payloads and failed tasks."""

    _deaf = -math.inf
    """when a worker was last found silent and nobody else was heard either"""

    def _lose(self, member: Member, kind: str, reason: str, *, suspects: bool = True) -> None:
        """A worker is gone, and what it kept with it. Its jobs go on elsewhere; where one of them may have been the
        cause, each runs alone until it has passed this stage."""
        self.fleet.remove(member)
        suspects = suspects and not (kind == "silent" and self._is_deaf())
        self._out.append(Dismiss(member.id, member.hello, kind, reason))
        self.counts.workers_lost += kind != "left"
        for live in list(member.running.values()):
            self._hand_back(live, member, f"{kind}: {reason}", suspects)
        for live in list(self.jobs.values()):
            if live.place == "queue" and live.input is not None and live.input.owner == member.hello.owner:
                self._withdraw(live)
                self._arrive(live)

    def _is_deaf(self) -> bool:
        """Whether nobody else is heard, or was within the last lease: then our own line is cut, and no job did that."""
        now, lease = self._clock(), self.limits.lease_seconds
        silences = [now - other.seen for other in self.fleet]
        if silences and min(silences) > lease / 2:
            self._deaf = now
        return now - self._deaf < lease

    def _hand_back(self, live: Live, member: Member, reason: str, suspect: bool) -> None:
        """A job lost its worker; this does not count against it unless it was alone there."""
        record, stage = live.record, live.stage
        self._take_from(live)
        self._note(live, Failure(stage=stage, worker=member.hello.name, code="worker_lost", message=reason))
        if suspect:
            record.deaths_alone += record.alone
            record.alone = True
        if record.deaths_alone >= self.limits.deaths_alone:
            self.counts.quarantined += 1
            text = f"its worker was lost {record.deaths_alone} times while the job was alone on it; last: {reason}"
            self._fail(live, "quarantined", text, member.hello.name)
        else:
            self._arrive(live)
            self._out.append(Persist(snapshot(record)))

    def _lost(self, live: Live, message: Failed) -> None:
        """A task could not fetch what it needs. That is not its fault, but may not go on for ever."""
        if message.damaged:
            self._damaged(live, remake=message.lost)
        elif message.lost == "checkpoint":
            self._drop_checkpoint(live)
            self._arrive(live)
        else:
            self._unreachable(live, remake=message.lost == "payload")

    def _damaged(self, live: Live, *, remake: str | None) -> None:
        """What was fetched is not what was sent: the same again, then a new one, and in the end none."""
        self.counts.digest_failures += 1
        place = live.record.stage
        live.damages[place] += 1
        if live.damages[place] >= self.limits.damages:
            self._fail(live, "payload_damaged", f"what it fetched was damaged {live.damages[place]} times")
            return
        if live.damages[place] >= DAMAGES_BEFORE_REMAKE:
            if remake == "checkpoint":
                self._drop_checkpoint(live)
            elif remake == "payload":
                self._forget_input(live.record, place)
        self._arrive(live)

    def _unreachable(self, live: Live, *, remake: bool) -> None:
        """An input cannot be had. Where its producer is gone, it is simply produced again; a producer that lives but
        cannot be reached is asked a limited number of times."""
        place = live.record.stage
        if not remake or self._ledger.presence(live.input) == "here":
            live.losses[place] += 1
        if live.losses[place] > self.limits.losses:
            self._fail(live, "payload_lost", f"what it needs could not be fetched {live.losses[place]} times")
            return
        if remake:
            self._forget_input(live.record, place)
        self._arrive(live)

    def _erred(self, live: Live, member: Member, code: str) -> None:
        """A task failed by its own error: once more, elsewhere, unless the error would come again. Its worker proves
        itself before it gets more."""
        place = live.record.stage
        live.errors[place] += 1
        live.avoid.add(member.id)
        member.failed += 1
        if code not in FINAL and not member.proving:
            member.proving = True
            self._out.append(Ask(member.id))
        if code in FINAL or live.errors[place] >= self.limits.own_errors:
            self._finish_failed(live, keep_task=True)
        else:
            self._arrive(live)

    def _kept_result(self, live: Live, outcome: Kept | Exception) -> None:
        """The keeper has the result, or it could not be had."""
        live.place = "nowhere"
        record, place = live.record, live.record.stage
        if isinstance(outcome, Kept):
            record.result = outcome
            self._end(live, "done")
            return
        code, original = str(getattr(outcome, "code", "error")), type(outcome).__name__
        self._note(live, Failure(stage=None, worker="", code=code, message=str(outcome), original=original))
        if code == "payload_damaged":
            self._damaged(live, remake="payload")
        elif code == "payload_lost":
            self._unreachable(live, remake=True)
        else:
            live.errors[place] += 1
            if live.errors[place] >= self.limits.own_errors:
                self._finish_failed(live, keep_task=False)
            else:
                self._arrive(live)

    def _kept_checkpoint(self, job: str, live: Live | None, pending: Pending, kept: Kept) -> None:
        """The keeper has a checkpoint, if anyone still wants it. A job that got further than before is no suspect for
        the workers it has lost on the way."""
        if live is None:
            self._out.append(Drop(job, "checkpoint"))
            return
        record: JobRecord = live.record
        if pending.stage != record.stage:
            return
        if record.checkpoint is None or pending.step > record.checkpoint_step:
            record.deaths_alone = 0
        record.checkpoint, record.checkpoint_step, record.checkpoint_stage = kept, pending.step, pending.stage
        self._out.append(Persist(snapshot(record)))

    def _fail(self, live: Live, code: str, message: str, worker: str = "") -> None:
        """Ends a job with this as the decisive reason."""
        self._note(live, Failure(stage=live.stage, worker=worker, code=code, message=message))
        self._finish_failed(live, keep_task=code not in ("deadline", "time_limit", "no_worker"))

    def _finish_failed(self, live: Live, *, keep_task: bool) -> None:
        """Ends a job with the reasons collected; the failed task and its input are kept for whoever looks into it."""
        record, descriptor = live.record, live.input
        if keep_task and live.stage is not None:
            self._out.append(WriteTask(snapshot(record), record.stage))
            if descriptor is not None and self._ledger.presence(descriptor) == "here":
                self._ledger.fetch(live.id, "input", descriptor)
                record.inputs[record.stage] = None
        self._end(live, "failed")

    def _note(self, live: Live, failure: Failure) -> None:
        live.record.failures.append(failure)
        del live.record.failures[: -self.limits.failures_kept]

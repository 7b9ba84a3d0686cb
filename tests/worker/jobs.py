"""A request's way through a real model's stages: by workers, and by the stages alone to compare with."""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from tests.worker.fakes import Running
from triptych.messages import Task, TaskDone, Ticket, ticket_for
from triptych.model import Components, Placement, Resolved, Topology, describe, open_model, resolve
from triptych.request import Request, StageName
from triptych.stage import Output, StageTask
from triptych.transfer import Payload
from triptych.worker import build_stage

PICTURES = ("image", "mask_image")


def resolved(topology: Topology, **fields: Any) -> Resolved:
    return resolve(topology, Request.parse(**fields))


def topology_of(model: str, workflow: str | None = None) -> Topology:
    return describe(open_model(model), workflow)


def task_of(topology: Topology, wanted: Resolved, stage: StageName, job: str = "job", **more: Any) -> Task:
    """The stage's share of a request, as the engine makes it."""
    declared = {item.name for item in topology.stage(stage).request_inputs} - set(PICTURES)
    fields = {name: value for name, value in wanted.fields.items() if name in declared}
    task = Task(
        job=job,
        stage=stage,
        attempt=1,
        fields=fields,
        seed=wanted.seed,
        guidance_scale=wanted.guidance_scale,
        shift=wanted.request.shift,
    )
    return msgspec.structs.replace(task, **more)


def through(
    topology: Topology, wanted: Resolved, workers: dict[StageName, Running], job: str = "job", **last: Any
) -> TaskDone:
    """Sends a job from worker to worker; `last` is for decode's task."""
    ticket: Ticket | None = None
    done: TaskDone | None = None
    for part in topology.stages:
        own = workers[part.name]
        before = len(own.coordinator.all(TaskDone, job))
        more = last if part is topology.stages[-1] else {}
        own.coordinator.run(task_of(topology, wanted, part.name, job, payload=ticket, **more))
        done = own.coordinator.wait(TaskDone, job, before + 1)
        ticket = ticket_for(done.descriptor, own.exchange.secret)
    assert done is not None
    return done


@torch.no_grad()
def alone(topology: Topology, wanted: Resolved) -> Payload:
    """What the stages make of a request when they are driven one after the other, by hand."""
    payload: Payload | None = None
    components, placement = Components(topology.source), Placement(torch.device("cpu"), torch.float32)
    for part in topology.stages:
        stage = build_stage(topology, part.name, components, placement)
        stage.load(lambda _: None)
        declared = {item.name for item in part.request_inputs}
        fields = {name: value for name, value in wanted.fields.items() if name in declared}
        stage.admit(StageTask("job", fields, wanted.seed, wanted.guidance_scale, wanted.request.shift, payload))
        outputs: list[Output] = []
        while not outputs:
            outputs = [event for event in stage.step() if isinstance(event, Output)]
        payload = outputs[0].payload
    assert payload is not None
    return payload

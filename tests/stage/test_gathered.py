"""Tasks that share one thread: each comes out as if it had run alone, whatever the others do."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from tests.stage.toy import SOURCE, Network, ToyProgram
from triptych.errors import Cancelled, StageFailed, WrongPayload
from triptych.model import Components, Placement, TaskInputs, TaskOutputs
from triptych.stage import (
    Admitted,
    Checkpoint,
    Failed,
    Full,
    GatherStage,
    Live,
    Output,
    Refused,
    StageEvent,
    StageTask,
    StepDone,
    gathered,
)
from triptych.stage.gather import Gather, ModeChanged, Parked
from triptych.transfer import Payload, encode_payload
from triptych.transfer.payload import decode_header


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def make(capacity: int = 8, network: Network | None = None) -> GatherStage:
    program = ToyProgram(network or Network())
    stage = GatherStage(program, Components(SOURCE), Placement(torch.device("cpu")), capacity)
    stage.load(lambda _: None)
    return stage


def drive(stage: GatherStage) -> list[StageEvent]:
    """Runs all tasks to their ends; at every switch grad mode is off and the process' generator is where it was."""
    events: list[StageEvent] = []
    drawn = torch.get_rng_state()
    for _ in range(200):
        events += stage.step()
        assert not torch.is_grad_enabled()
        assert torch.equal(torch.get_rng_state(), drawn)
    return events


def alone(stage: GatherStage, steps: int, seed: int) -> torch.Tensor:
    task = TaskInputs({"num_inference_steps": steps}, None, torch.Generator().manual_seed(seed))
    return stage.program.run(task, {}).values["latents"]


def test_unequal_tasks_interleave_and_come_out_as_if_alone() -> None:
    stage = make()
    lengths = {"a": 2, "b": 7, "c": 4, "d": 1}
    for seed, (job, steps) in enumerate(lengths.items()):
        assert stage.admit(StageTask(job, {"num_inference_steps": steps}, seed)) == Admitted()
    events = drive(stage)
    outputs = {event.job: event for event in events if isinstance(event, Output)}
    for seed, (job, steps) in enumerate(lengths.items()):
        assert torch.equal(outputs[job].payload.values["latents"], alone(stage, steps, seed))
    order = [event.job for event in events if isinstance(event, StepDone)]
    assert order[:4] == ["a", "b", "c", "d"], "every task gets its turn before any gets a second"
    assert not torch.is_grad_enabled()


def test_modes_are_checked_at_every_switch() -> None:
    gather = Gather({"net": torch.nn.Linear(2, 2)})

    def leaks() -> None:
        torch.set_grad_enabled(True)
        gather.stand_ins["net"](torch.ones(1, 2))

    with pytest.raises(ModeChanged):
        gather.begin(gather.start(leaks))
    assert not torch.is_grad_enabled(), "the next task runs in the right mode"


def test_grad_mode_holds_while_tasks_enter_and_leave_no_grad() -> None:
    gather = Gather({"net": torch.nn.Linear(2, 2)})
    seen: list[bool] = []

    @torch.no_grad()
    def body(calls: int) -> None:
        for _ in range(calls):
            gather.stand_ins["net"](torch.ones(1, 2))
            seen.append(torch.is_grad_enabled())

    tasks = [gather.start(lambda n=n: body(n)) for n in (3, 1, 2)]
    parked = [(task, gather.begin(task)) for task in tasks]
    while parked:
        task, reached = parked.pop(0)
        assert isinstance(reached, Parked)
        reached = gather.resume(task, gather.run([reached.call])[0])
        assert not torch.is_grad_enabled()
        if isinstance(reached, Parked):
            parked.append((task, reached))
    assert seen == [False] * 6


def test_stand_ins_keep_class_signature_and_weights() -> None:
    import inspect

    network = Network()
    double = Gather({"transformer": network}).stand_ins["transformer"]
    assert type(double) is Network and double.linear is network.linear
    assert list(inspect.signature(double.forward).parameters) == ["hidden_states", "timestep"]
    assert torch.equal(double(torch.ones(1, 4)), network(torch.ones(1, 4))), "outside a task it runs at once"


def test_cancel_takes_effect_before_the_next_step() -> None:
    stage = make()
    for job in ("keep", "drop"):
        stage.admit(StageTask(job, {"num_inference_steps": 5}, 0))
    for _ in range(4):
        stage.step()
    calls = stage.program.components["transformer"].calls
    stage.cancel("drop")
    events = drive(stage)
    assert {event.job for event in events} == {"keep"}
    assert stage.program.components["transformer"].calls == calls + 3
    stage.cancel("never heard of")


def test_one_failure_touches_no_other_task() -> None:
    stage = make()
    stage.admit(StageTask("bad", {"num_inference_steps": 3, "explode": True}, 0))
    stage.admit(StageTask("good", {"num_inference_steps": 3}, 1))
    events = drive(stage)
    failed = [event for event in events if isinstance(event, Failed)]
    assert [event.job for event in failed] == ["bad"]
    error = failed[0].error
    assert isinstance(error, StageFailed) and error.original == "ValueError" and error.stage == "denoise"
    assert [event.job for event in events if isinstance(event, Output)] == ["good"]


def test_capacity_is_kept_and_freed() -> None:
    stage = make(capacity=1)
    assert stage.admit(StageTask("a", {"num_inference_steps": 1}, 0)) == Admitted()
    assert stage.admit(StageTask("b", {"num_inference_steps": 1}, 0)) == Full()
    drive(stage)
    assert stage.admit(StageTask("b", {"num_inference_steps": 1}, 0)) == Admitted()


def test_what_is_not_data_is_refused() -> None:
    refused = make().admit(StageTask("a", {"num_inference_steps": 1}, 0, payload=Payload({"x": object()})))
    assert isinstance(refused, Refused) and isinstance(refused.error, WrongPayload)


def test_nan_weights_are_named_at_the_first_step() -> None:
    network = Network()
    network.linear.weight[1, 1] = float("nan")
    stage = make(network=network)
    stage.admit(StageTask("a", {"num_inference_steps": 50}, 0))
    events = drive(stage)
    assert len(events) == 1 and isinstance(events[0], Failed)
    assert "linear.weight of transformer" in str(events[0].error)
    assert network.calls == 1


def test_close_drops_what_runs() -> None:
    stage = make()
    stage.admit(StageTask("a", {"num_inference_steps": 5}, 0))
    stage.step()
    stage.close()
    assert stage.step() == []
    assert isinstance(stage.admit(StageTask("b", {"num_inference_steps": 1}, 0)), Refused)


def test_a_result_that_cannot_cross_fails_its_task_alone() -> None:
    class Picky(GatherStage):
        def _payload(self, live: Live, outputs: TaskOutputs) -> Payload:
            if live.task.job == "bad":
                raise RuntimeError("stack expects each tensor to be equal size")
            return super()._payload(live, outputs)

    stage = Picky(ToyProgram(Network()), Components(SOURCE), Placement(torch.device("cpu")))
    stage.load(lambda _: None)
    for job in ("bad", "good"):
        stage.admit(StageTask(job, {"num_inference_steps": 1}, 0))
    events = drive(stage)
    assert [event.job for event in events if isinstance(event, Failed)] == ["bad"]
    assert [event.job for event in events if isinstance(event, Output)] == ["good"]


def test_what_the_topology_does_not_declare_is_refused() -> None:
    payload = Payload({"start": torch.ones(1), "height": 9})
    refused = make().admit(StageTask("a", {"num_inference_steps": 1}, 0, payload=payload))
    assert isinstance(refused, Refused) and refused.error.field == "height"


def test_a_task_that_swallows_its_cancellation_is_gone_all_the_same() -> None:
    class Stubborn(ToyProgram):
        def run(self, task: TaskInputs, stand_ins: Mapping[str, Any], on_step: Any = None) -> TaskOutputs:
            while True:
                with contextlib.suppress(Cancelled):
                    stand_ins["transformer"](torch.ones(1, 4))

    stage = GatherStage(Stubborn(Network()), Components(SOURCE), Placement(torch.device("cpu")))
    stage.load(lambda _: None)
    stage.admit(StageTask("a", {}, 0))
    stage.step()
    stage.cancel("a")
    assert stage.step() == [] and stage.admit(StageTask("a", {}, 0)) == Admitted()


def kept(stage: GatherStage, *tasks: StageTask) -> dict[str, list[int]]:
    """The steps after which each task gave a checkpoint."""
    for task in tasks:
        assert stage.admit(task) == Admitted()
    found: dict[str, list[int]] = {task.job: [] for task in tasks}
    for event in drive(stage):
        if isinstance(event, Checkpoint):
            assert (event.payload.job, event.payload.stage) == (event.job, "denoise")
            found[event.job].append(event.step)
    return found


def test_checkpoints_come_between_steps_and_only_when_asked_for() -> None:
    tasks = [
        StageTask("each", {"num_inference_steps": 4}, 0, checkpoint_seconds=0.0),
        StageTask("never", {"num_inference_steps": 4}, 0),
        StageTask("seldom", {"num_inference_steps": 4}, 0, checkpoint_seconds=3600.0),
        StageTask("one step", {"num_inference_steps": 1}, 0, checkpoint_seconds=0.0),
        StageTask("opaque", {"num_inference_steps": 4, "opaque": True}, 0, checkpoint_seconds=0.0),
    ]
    assert kept(make(), *tasks) == {"each": [1, 2, 3], "never": [], "seldom": [], "one step": [], "opaque": []}


def test_seconds_are_the_tasks_own_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """One second a call, two tasks in turn: what one waits for the other does not count."""
    now = [0.0]
    monkeypatch.setattr(gathered, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    class Slow(Network):
        def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor | None = None) -> torch.Tensor:
            now[0] += 1.0
            return super().forward(hidden_states, timestep)

    tasks = [StageTask(job, {"num_inference_steps": 7}, 0, checkpoint_seconds=2.0) for job in "ab"]
    assert kept(make(network=Slow()), *tasks) == {"a": [2, 4, 6], "b": [2, 4, 6]}


def test_a_payload_says_which_attempt_made_it() -> None:
    stage = make()
    stage.admit(StageTask("a", {"num_inference_steps": 2}, 0, attempt=3, checkpoint_seconds=0.0))
    made = [event.payload for event in drive(stage) if isinstance(event, Checkpoint | Output)]
    assert [payload.attempt for payload in made] == [3, 3]


def test_an_exact_task_is_never_in_a_group() -> None:
    class Grouping(GatherStage):
        """Takes all there are."""

        def _group(self) -> list[Live]:
            return list(self._live.values())

    def stage(exact: bool) -> GatherStage:
        made = Grouping(ToyProgram(Network()), Components(SOURCE), Placement(torch.device("cpu")))
        made.load(lambda _: None)
        for job in "ab":
            made.admit(StageTask(job, {"num_inference_steps": 1}, 0, exact=exact and job == "b"))
        return made

    assert len([event for event in drive(stage(exact=False)) if isinstance(event, Output)]) == 2
    with pytest.raises(AssertionError, match="an exact task runs alone"):
        stage(exact=True).step()


def test_what_is_no_checkpoint_is_refused_at_once() -> None:
    task = StageTask("a", {"num_inference_steps": 2}, 0, checkpoint=Payload({"x": torch.ones(1)}))
    refused = make().admit(task)
    assert isinstance(refused, Refused) and refused.error.field == "checkpoint.form"


def test_what_may_arrive_is_known_before_it_is_fetched() -> None:
    make().expects(decode_header(encode_payload(Payload({"start": torch.ones(4)}))[0]))
    with pytest.raises(WrongPayload, match=r"height: stage denoise takes no height"):
        make().expects(decode_header(encode_payload(Payload({"start": torch.ones(1), "height": 9}))[0]))


def test_what_a_checkpoint_may_bring() -> None:
    stage = make()
    names = {"form": 1, "step": 1, "parts": {"state": {"latents": torch.ones(4)}}}
    stage.expects_checkpoint(decode_header(encode_payload(Payload(names))[0]))
    with pytest.raises(WrongPayload, match=r"latents: a checkpoint of stage denoise takes no latents"):
        stage.expects_checkpoint(decode_header(encode_payload(Payload({"latents": torch.ones(4)}))[0]))


class Starting(ToyProgram):
    """Draws before it looks at what has come; tells of both."""

    def __init__(self, network: Network) -> None:
        super().__init__(network)
        self.told: list[str] = []

    def run(self, task: TaskInputs, stand_ins: Mapping[str, Any], on_step: Any = None) -> TaskOutputs:
        self.told.append("begun")
        try:
            drawn = torch.randn(1, 4, generator=task.generator)
            if task.fields.get("early"):
                raise ValueError("boom")
            start = task.values.get("start", torch.zeros(1, 4))
            self.told.append("arrived")
            made = super().run(task, stand_ins, on_step).values["latents"]
            return TaskOutputs({"latents": made + drawn + start, "tag": task.tags.get("tag", [])})
        finally:
            self.told.append("over")


def starting(capacity: int = 4) -> tuple[GatherStage, Starting]:
    program = Starting(Network())
    stage = GatherStage(program, Components(SOURCE), Placement(torch.device("cpu")), capacity)
    stage.load(lambda _: None)
    return stage, program


def made(stage: GatherStage, task: StageTask) -> dict[str, Any]:
    assert stage.admit(task) == Admitted()
    (output,) = [event for event in drive(stage) if isinstance(event, Output)]
    return output.payload.values


def test_a_task_that_was_expected_goes_on_from_there_and_makes_the_same() -> None:
    stage, program = starting()
    payload = Payload({"start": torch.ones(1, 4)}, tags={"tag": ["start"]})
    task = StageTask("a", {"num_inference_steps": 3}, 7, payload=payload, attempt=3)
    wanted = made(stage, task)
    program.told.clear()
    stage.expect(StageTask("a", {"num_inference_steps": 3}, 7, attempt=2))
    assert program.told == ["begun"] and stage.step() == []
    found = made(stage, task)
    assert program.told == ["begun", "arrived", "over"]
    assert torch.equal(found["latents"], wanted["latents"]) and found["tag"] == wanted["tag"] == ["start"]


@pytest.mark.parametrize(
    "other",
    [
        StageTask("a", {"num_inference_steps": 3}, 8),
        StageTask("a", {"num_inference_steps": 2}, 7),
        StageTask("a", {"num_inference_steps": 3}, 7, guidance_scale=2.0),
    ],
)
def test_another_task_of_that_name_has_nothing_of_the_expected_one(other: StageTask) -> None:
    stage, program = starting()
    wanted = made(stage, other)["latents"]
    stage.expect(StageTask("a", {"num_inference_steps": 3}, 7))
    program.told.clear()
    assert torch.equal(made(stage, other)["latents"], wanted)
    assert program.told == ["over", "begun", "arrived", "over"]


def test_what_is_expected_is_bounded_and_can_be_given_up() -> None:
    stage, program = starting(capacity=2)
    for job in "abc":
        stage.expect(StageTask(job, {"num_inference_steps": 2}, 1))
    assert program.told == ["begun", "begun"], "as many as it takes at once"
    stage.cancel("b")
    assert program.told.count("over") == 1
    assert stage.admit(StageTask("a", {"num_inference_steps": 0}, 1)) == Admitted()
    assert program.told.count("over") == 2, "another task of that name has come"
    stage.expect(StageTask("d", {"num_inference_steps": 2}, 1))
    stage.close()
    assert program.told.count("begun") == program.told.count("over") == 3


def test_what_goes_wrong_before_a_task_has_come_is_told_when_it_has() -> None:
    stage, program = starting()
    task = StageTask("a", {"num_inference_steps": 2, "early": True}, 1)
    stage.expect(task)
    assert program.told == ["begun", "over"] and stage.step() == []
    assert stage.admit(task) == Admitted()
    (failed,) = stage.step()
    assert isinstance(failed, Failed) and "boom" in str(failed.error)


def test_a_program_that_needs_nothing_from_before_is_not_run_ahead_of_its_turn() -> None:
    class Heedless(ToyProgram):
        def run(self, task: TaskInputs, stand_ins: Mapping[str, Any], on_step: Any = None) -> TaskOutputs:
            drawn = torch.randn(1, 4, generator=task.generator)
            return TaskOutputs({"latents": stand_ins["transformer"](hidden_states=drawn)})

    network = Network()
    stage = GatherStage(Heedless(network), Components(SOURCE), Placement(torch.device("cpu")), 4)
    stage.load(lambda _: None)
    task = StageTask("a", {}, 1)
    stage.expect(task)
    assert network.calls == 0
    wanted = network(torch.randn(1, 4, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(made(stage, task)["latents"], wanted)

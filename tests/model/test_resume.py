"""A denoise loop that another process takes up in the middle ends in the very bits that it would have ended in."""

from __future__ import annotations

import functools
import json
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.families import folder
from tests.model import tiny
from tests.model.bench import STEPS, Bench, case_of, driven, equal
from tests.model.cases import CASES, SEED, Case
from triptych.errors import WrongPayload
from triptych.model import Pause
from triptych.transfer import Payload, payload_parts

# Some of diffusers' schedulers hand tensors to NumPy the old way.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.usefixtures("one_thread"),
]
HEADER = f"{'family':<42} | {'resumed after':<14} | = undisturbed | forwards run, of | checkpoint"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_resumed_is_undisturbed(case: Case, rows: list[tuple[str, ...]]) -> None:
    bench = Bench(case)
    whole = bench.denoise()
    kept = bench.denoise(checkpoint_seconds=0.0)
    total = whole.output.steps
    assert equal(kept.output.payload.values, whole.output.payload.values) and kept.forwards == whole.forwards
    assert total >= 3 and sorted(kept.checkpoints) == list(range(1, total)), "after every step but the last"
    size = max(len(wire(made.values)) for made in kept.checkpoints.values())
    points = sorted({1, total // 2, total - 1})
    resumed = {step: bench.resume(kept.checkpoints[step], checkpoint_seconds=0.0) for step in points}
    same = [equal(run.output.payload.values, whole.output.payload.values) for run in resumed.values()]
    calls = [run.forwards.total() for run in resumed.values()]
    told = "bit for bit" if all(same) else f"DIFFERS {same}"
    rows.append((case.name, str(points), told, f"{calls}, {whole.forwards.total()}", f"{size / 1024:.0f} KiB"))
    assert all(same)
    each = whole.forwards.total() // total
    assert calls == [each * (total - step) for step in points]
    for step, run in resumed.items():
        assert run.steps == list(range(step + 1, total + 1)), "steps that were replayed are not told"
        assert (run.output.steps, run.output.resumed_at) == (total, step)
        assert sorted(run.checkpoints) == list(range(step + 1, total))
        for later, payload in run.checkpoints.items():
            assert equal(payload.values, kept.checkpoints[later].values), (
                "and from there on the checkpoints are the same"
            )


def variant(family: str, where: Path, part: str, kind: str, **config: Any) -> Path:
    """The family with another scheduler or guider."""
    made = where / family
    shutil.copytree(folder(family), made)
    old = json.loads((made / part / f"{part}_config.json").read_text())
    names = ("beta_start", "beta_end", "beta_schedule", "steps_offset", "flow_shift")
    same = {name: old[name] for name in names if name in old}
    getattr(diffusers, kind).from_config({**same, **config}).save_pretrained(made / part)
    tiny.edit_json(made / "model_index.json", **{part: ["diffusers", kind]})
    return made


@pytest.mark.parametrize(
    ("family", "kind", "config"),
    [
        ("flux", "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True, "use_dynamic_shifting": True}),
        ("wan-t2v", "DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
        ("sdxl", "EulerAncestralDiscreteScheduler", {}),
        ("sdxl", "LCMScheduler", {}),
        ("sdxl", "PNDMScheduler", {}),
        ("sdxl", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("stable-diffusion", "EulerAncestralDiscreteScheduler", {}),
        ("stable-diffusion", "LCMScheduler", {}),
        ("stable-diffusion", "PNDMScheduler", {}),
        ("stable-diffusion", "HeunDiscreteScheduler", {}),
        ("stable-diffusion", "DPMSolverSinglestepScheduler", {"lower_order_final": True}),
        ("stable-diffusion", "UniPCMultistepScheduler", {}),
        ("stable-diffusion", "IPNDMScheduler", {}),
        ("cogvideox", "CogVideoXDPMScheduler", {}),
    ],
)
def test_whatever_a_scheduler_draws_and_remembers(
    family: str, kind: str, config: dict[str, Any], tmp_path: Path
) -> None:
    bench = Bench(case_of(family), variant(family, tmp_path, "scheduler", kind, **config))
    whole = bench.denoise(checkpoint_seconds=0.0)
    last = whole.output.steps - 1
    for step in (1, 2, last):
        resumed = bench.resume(whole.checkpoints[step])
        assert equal(resumed.output.payload.values, whole.output.payload.values), f"after step {step}"


def test_whatever_a_guider_remembers(tmp_path: Path) -> None:
    """Adaptive projected guidance adds its former steps' directions to each step's."""
    family, kind = "hunyuan-video-1.5", "AdaptiveProjectedGuidance"
    config = {"guidance_scale": 6.0, "adaptive_projected_guidance_momentum": -0.5}
    bench = Bench(case_of(family), variant(family, tmp_path, "guider", kind, **config), num_frames=1)
    whole = bench.denoise(checkpoint_seconds=0.0)
    assert "momentum_buffer" in whole.checkpoints[2].values["parts"]["guider"]
    resumed = bench.resume(whole.checkpoints[2])
    assert equal(resumed.output.payload.values, whole.output.payload.values)


@pytest.mark.parametrize("family", ["wan-t2v", "stable-diffusion"])
def test_others_in_the_same_stage_change_nothing(family: str) -> None:
    """A task that keeps checkpoints, and one that goes on from one, beside others of another length."""
    bench = Bench(case_of(family))
    whole = bench.denoise(checkpoint_seconds=0.0)
    other = bench.task("denoise", bench.encoded, job="other", checkpoint_seconds=0.0)
    other.fields["num_inference_steps"] = 7
    kept = driven(bench.stage(), other, bench.task("denoise", bench.encoded, checkpoint_seconds=0.0))
    assert equal(kept.output.payload.values, whole.output.payload.values)
    stage = bench.stage()
    resumed = driven(stage, other, bench.task("denoise", bench.encoded, checkpoint=kept.checkpoints[2]))
    assert equal(resumed.output.payload.values, whole.output.payload.values)
    assert equal(driven(stage, bench.task("denoise", bench.encoded)).output.payload.values, whole.output.payload.values)


class Ops(TorchDispatchMode):
    """Notes what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["wan-t2v", "stable-diffusion"])
def test_a_checkpoint_costs_copies_only_and_stays_as_it_is(family: str) -> None:
    bench = Bench(case_of(family))
    ops = Ops()
    then: list[bytes] = []
    taken: list[dict[str, Any]] = []

    def keep(pause: Pause) -> None:
        with ops:
            values = pause.take()
        assert values is not None
        taken.append(values)
        then.append(wire(values))

    stage = bench.stage()
    inputs = stage._inputs(bench.task("denoise", bench.encoded))
    inputs.keep = keep
    with torch.no_grad():
        stage.program.run(inputs, {})
    assert len(taken) == STEPS - 1
    assert ops.names <= {"clone", "detach"}, "copies where the tensors are, no computation, no transfer"
    assert [wire(values) for values in taken] == then, "what ran after a checkpoint has not changed it"
    assert min(map(len, then)) > 1000


def wire(values: dict[str, Any]) -> bytes:
    return b"".join(payload_parts(Payload(values)))


@pytest.fixture(scope="module")
def flux() -> tuple[Bench, Payload]:
    bench = Bench(case_of("flux"))
    return bench, bench.denoise(checkpoint_seconds=0.0).checkpoints[2]


@pytest.fixture(scope="module")
def stable() -> tuple[Bench, Payload]:
    bench = Bench(case_of("stable-diffusion"))
    return bench, bench.denoise(checkpoint_seconds=0.0).checkpoints[2]


def changed(payload: Payload, path: str, value: Any = None) -> Payload:
    """The checkpoint with one value changed; without it if `value` is None."""
    values = deepcopy(payload.values)
    *way, last = path.split("/")
    place = functools.reduce(lambda at, name: at[name], way, values)
    if value is None:
        del place[last]
    else:
        place[last] = value
    return Payload(values, job=payload.job, stage=payload.stage)


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("form", 9, "checkpoint.form"),
        ("pipeline", "OtherPipeline", "checkpoint.pipeline"),
        ("step", 0, "checkpoint.step"),
        ("step", 5, "checkpoint.step"),
        ("step", "2", "checkpoint.step"),
        ("step", 3, "checkpoint.calls"),
        ("steps", 6, "checkpoint.steps"),
        ("calls", {"transformer": 3}, "checkpoint.calls.transformer"),
        ("calls", {}, "checkpoint.calls.transformer"),
        ("calls", None, "checkpoint.calls"),
        ("extra", 1, "checkpoint.extra"),
        ("parts/state/latents", None, "checkpoint.parts.state.latents"),
        ("parts/state/latents", torch.zeros(1, 16, 8), "checkpoint.parts.state.latents"),
        ("parts/state/latents", torch.zeros(1, 16, 16).double(), "checkpoint.parts.state.latents"),
        ("parts/state/latents", "zeros", "checkpoint.parts.state.latents"),
        ("parts/state/other", 1, "checkpoint.parts.state.other"),
        ("parts/scheduler", None, "checkpoint.parts.scheduler"),
        ("parts/scheduler/_step_index", "2", "checkpoint.parts.scheduler._step_index"),
        ("generator_state", torch.zeros(5056, dtype=torch.uint8), "checkpoint.generator_state"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    flux: tuple[Bench, Payload], path: str, value: Any, field: str
) -> None:
    bench, checkpoint = flux
    with pytest.raises(WrongPayload) as caught:
        bench.resume(changed(checkpoint, path, value))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("results/scheduler", None, "checkpoint.results.scheduler"),
        ("results/scheduler", [3, (torch.zeros(1),)], "checkpoint.results.scheduler"),
        ("results/scheduler", [2, (torch.zeros(1),)], "checkpoint.results.scheduler"),
        ("results/other", [2, 0], "checkpoint.results.other"),
        ("results/scheduler", 5, "checkpoint.results.scheduler"),
        ("parts/scheduler", None, "checkpoint.parts.scheduler"),
        ("steps", 6, "checkpoint.steps"),
    ],
)
def test_nor_does_one_of_a_standard_pipeline(stable: tuple[Bench, Payload], path: str, value: Any, field: str) -> None:
    bench, checkpoint = stable
    with pytest.raises(WrongPayload) as caught:
        bench.resume(changed(checkpoint, path, value))
    assert caught.value.field == field


@pytest.mark.parametrize("which", ["flux", "stable"])
def test_another_task_cannot_go_on_from_it(which: str, request: pytest.FixtureRequest) -> None:
    bench, checkpoint = request.getfixturevalue(which)
    task = bench.task("denoise", bench.encoded, checkpoint=checkpoint)
    for other, at in (
        (replace(task, seed=SEED + 1), "checkpoint.generator_state"),
        (replace(task, fields={**task.fields, "num_inference_steps": 4}), "checkpoint.steps"),
        (replace(task, fields={**task.fields, "height": 32}), "checkpoint"),
    ):
        with pytest.raises(WrongPayload) as caught:
            driven(bench.stage(), other)
        assert (caught.value.field or "").startswith(at)
    with pytest.raises(WrongPayload, match=r"checkpoint.pipeline: given"):
        other = "stable" if which == "flux" else "flux"
        bench.resume(request.getfixturevalue(other)[1])


def test_stages_without_steps_take_none(flux: tuple[Bench, Payload]) -> None:
    bench, checkpoint = flux
    with pytest.raises(WrongPayload, match=r"checkpoint: given one; allowed: none \(stage encode has no steps\)"):
        bench.run("encode", None, checkpoint=checkpoint)

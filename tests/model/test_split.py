"""Split over three processes, each with its own weights and fed only what crosses, every family gives bit for bit
what its pipeline gives unsplit, and what diffusers' standard pipeline gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModularPipeline
from diffusers.guiders import ClassifierFreeGuidance

from tests.families import FAMILIES, folder
from tests.families.modular import MODULAR
from tests.model.cases import CASES, CPU, SEED, Case, standard_result, topology_of
from triptych.model import Components, TaskInputs, Topology, program, unsplit
from triptych.request import StageName
from triptych.stage import StageTask
from triptych.transfer import Payload
from triptych.worker import StageProcess, StageSpec

# diffusers' Euler scheduler hands a tensor to NumPy the old way.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.usefixtures("one_thread"),
]
HEADER = f"{'family':<42} | split = unsplit | max error to standard"

GOLDEN = Path(__file__).parent / "golden"
MEDIA = ("images", "videos")
TOLERANCE = 1e-5

SPLIT = [case for case in CASES if case.family != "ddpm"]


class Processes:
    """Three stage processes that live as long as the tests, so that imports are paid once."""

    def __init__(self) -> None:
        self.by_stage: dict[StageName, StageProcess] = {
            "encode": StageProcess(),
            "denoise": StageProcess(),
            "decode": StageProcess(),
        }
        self.loads: dict[StageName, tuple[str, ...]] = {}
        self.held = ""

    def hold(self, case: Case) -> None:
        """Has the processes hold the case's model, unless they do."""
        if self.held == f"{case.family} {case.workflow}":
            return
        for stage, process in self.by_stage.items():
            spec = StageSpec(str(folder(case.family)), stage, case.workflow, device="cpu", threads=1)
            self.loads[stage] = process.open(spec)
        self.held = f"{case.family} {case.workflow}"

    def run(self, case: Case, topology: Topology) -> dict[StageName, Payload]:
        """What each stage gave."""
        crossed: dict[StageName, Payload] = {}
        payload: Payload | None = None
        for stage in topology.stages:
            declared = {item.name for item in stage.request_inputs}
            fields = {name: value for name, value in case.fields.items() if name in declared}
            task = StageTask("test", fields, SEED, case.guidance_scale, None, payload, raw=True)
            payload = self.by_stage[stage.name].run(task).payload
            crossed[stage.name] = payload
        return crossed


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    started = Processes()
    yield started
    for process in started.by_stage.values():
        process.close()


def whole(case: Case, topology: Topology) -> dict[str, Any]:
    """What the pipeline's own code gives in one piece."""
    runner = unsplit(topology)
    runner.load(Components(topology.source), CPU)
    generator = torch.Generator().manual_seed(SEED)
    return runner.run(TaskInputs(deepcopy(dict(case.fields)), case.guidance_scale, generator), {}).values


def media(values: dict[str, Any]) -> torch.Tensor:
    """The pictures or clips among a decode stage's values."""
    return next(values[name] for name in MEDIA if name in values)


def outline(value: Any) -> Any:
    """What a golden file says of a value: dtype and shape of a tensor, the rest as it is."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return [outline(item) for item in value]
    if isinstance(value, dict):
        return {key: outline(item) for key, item in value.items()}
    return value


def boundary(crossed: dict[StageName, Payload]) -> dict[str, Any]:
    """Names, dtypes and shapes of all that crossed."""
    return {stage: {name: outline(v) for name, v in sorted(p.values.items())} for stage, p in crossed.items()}


def check_loads(loads: dict[StageName, tuple[str, ...]], topology: Topology) -> None:
    """Each process has the weights of its own models only, and none is missing."""
    weighty = {name for name, info in topology.components.items() if info.parameters}
    assert not any("transformer" in name or "unet" in name for name in (*loads["encode"], *loads["decode"]))
    assert all("transformer" in name or "unet" in name for name in loads["denoise"])
    assert loads["decode"] == ("vae",)
    assert {name for names in loads.values() for name in names} == weighty


@pytest.mark.parametrize("case", SPLIT, ids=lambda case: case.name)
def test_split_is_unsplit(case: Case, processes: Processes, rows: list[tuple[str, ...]]) -> None:
    topology = topology_of(case)
    processes.hold(case)
    check_loads(processes.loads, topology)
    crossed = processes.run(case, topology)
    split, reference = media(crossed["decode"].values), media(whole(case, topology))
    equal = torch.equal(split, reference)
    error = 0.0
    if case.standard is not None:
        error = (split - standard_result(case, topology).reshape(split.shape)).abs().max().item()
    shown = f"{error:.1e}" if case.standard is not None else "does something else"
    rows.append((case.name, "bit for bit" if equal else "DIFFERS", shown))
    assert split.isfinite().all() and split.std() > 0.01
    assert equal
    assert error <= TOLERANCE
    golden = json.loads((GOLDEN / f"{case.family}.json").read_text(encoding="utf-8"))
    assert boundary(crossed) == golden[case.label]


# diffusers imports every pipeline there is to find a modular one's class; one of them uses torch.jit.
THEIR_IMPORTS = "ignore:.torch.jit.script. is deprecated:DeprecationWarning"

MENDED = {"hunyuan-video-1.5", "qwen-image-edit-plus", "z-image"}
"""Families whose unsplit run is not diffusers' own as it comes: a decoder's slicing, positions of pictures, a formula
of guidance; what they are compared to in `test_split_is_unsplit` has the same."""


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.label == "as it is" and case.family in MODULAR],
    ids=lambda case: case.name,
)
@pytest.mark.filterwarnings(THEIR_IMPORTS)
def test_unsplit_is_diffusers_own(case: Case) -> None:
    if case.family in MENDED:
        pytest.skip("differs from diffusers as it comes, on purpose")
    pipe: Any = ModularPipeline.from_pretrained(str(folder(case.family)))
    pipe.load_components()
    second = case.fields.get("guidance_scale_2", case.guidance_scale)
    scales = {"guider": case.guidance_scale, "guider_2": second}
    guiders = {
        name: ClassifierFreeGuidance(guidance_scale=scale)
        for name, scale in scales.items()
        if name in pipe.components and scale is not None
    }
    pipe.update_components(**guiders)
    fields = {name: value for name, value in case.fields.items() if name != "guidance_scale_2"}
    if not guiders and case.guidance_scale is not None:
        fields["guidance_scale"] = case.guidance_scale
    state = pipe(generator=torch.Generator().manual_seed(SEED), output_type="pt", **deepcopy(fields))
    made = next(value for name in MEDIA if (value := state.get(name)) is not None)
    assert torch.equal(torch.as_tensor(made), media(whole(case, topology_of(case))))


def test_positions_of_pictures_are_put_right() -> None:
    """diffusers does not pass mm_token_type_ids on, so that transformers 5 gives a picture's tokens the positions of
    a line of text. The encode stage passes it, and nothing else changes."""
    case = next(case for case in CASES if case.family == "qwen-image-edit-plus")
    topology = topology_of(case)
    encode = program(topology, "encode")
    encode.load(Components(topology.source), CPU)
    mended = encode.components["text_encoder"]
    config = mended.config
    image = torch.full((4,), config.image_token_id)
    ids = torch.cat([torch.tensor([config.vision_start_token_id]), image, torch.arange(5)])[None]
    pixels = torch.randn(16, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "output_hidden_states": True,
    }
    types = (ids == config.image_token_id).int()
    with torch.no_grad():
        got = mended(**given).hidden_states[-1]
        right = type(mended).forward(mended, **given, mm_token_type_ids=types).hidden_states[-1]
        wrong = type(mended).forward(mended, **given).hidden_states[-1]
    assert torch.equal(got, right)
    assert (got - wrong).norm() / wrong.norm() > 0.001


def write_golden() -> None:
    """Writes the golden files anew. Run it when a new diffusers moved a boundary and the new one has been read."""
    processes = Processes()
    for family in FAMILIES:
        found = {}
        for case in (case for case in SPLIT if case.family == family):
            processes.hold(case)
            found[case.label] = boundary(processes.run(case, topology_of(case)))
        if found:
            text = json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False)
            (GOLDEN / f"{family}.json").write_text(text + "\n", encoding="utf-8")
    for process in processes.by_stage.values():
        process.close()


if __name__ == "__main__":
    write_golden()

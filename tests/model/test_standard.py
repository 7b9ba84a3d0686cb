"""Standard pipelines in stages: equal to the whole bit for bit, with their own weights and only what crosses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    KandinskyCombinedPipeline,
    StableCascadeCombinedPipeline,
    StableVideoDiffusionPipeline,
    WanPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from tests.families import FAMILIES, folder, picture
from triptych.denoise import DenoiseStage
from triptych.errors import InvalidRequest, Unsupported, WrongPayload
from triptych.model import Components, Placement, Source, Step, TaskInputs, Topology, component_infos
from triptych.model.anatomy import anatomy
from triptych.model.description import describe
from triptych.model.fused import FusedProgram
from triptych.model.pipeline import Loop, own_schedulers, pictures, view
from triptych.model.replay import (
    Blanks,
    Player,
    Recorder,
    Shapes,
    blank,
    overridden,
    pack,
    skeleton,
    unpack,
)
from triptych.model.standard import StandardProgram
from triptych.model.standard_topology import standard_topology
from triptych.stage import Failed, Output, StageTask
from triptych.transfer import Payload, tensors_in
from triptych.transfer.payload import decode_payload, encode_payload

SEED = 5
CPU = Placement(torch.device("cpu"))
SPLIT = ("wan2.2-ti2v", "hunyuan-video", "stable-diffusion", "stable-diffusion-img2img", "cogvideox")
FORCED = ("flux", "wan-i2v", "sdxl", "ltx", "flux2-klein")
"""Families with modular blocks, sent through the adapter to show that it knows no family."""

pytestmark = [
    pytest.mark.usefixtures("no_grad"),
    # diffusers' EulerDiscreteScheduler, with numpy 2.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]


@pytest.fixture
def no_grad() -> Any:
    with torch.no_grad():
        yield


def source_of(name: str) -> Source:
    return Source(name, str(folder(name)), "folder")


@cache
def topology_of(name: str) -> Topology:
    source = source_of(name)
    return standard_topology(source, component_infos(source))


@cache
def programs_of(name: str) -> dict[str, StandardProgram]:
    """The three stages, each with components of its own, as if in three processes."""
    topology, made = topology_of(name), {}
    for stage in topology.stages:
        made[stage.name] = StandardProgram(topology, stage)
        made[stage.name].load(Components(topology.source), CPU)
    return made


@cache
def whole_of(name: str) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder(name))
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            # Some CPU kernels are chosen by this flag, also without gradients, and differ in the last bit.
            component.requires_grad_(False)
    return pipe


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def whole(name: str, **changes: Any) -> torch.Tensor:
    arguments = {**FAMILIES[name].standard, **changes}
    made = whole_of(name)(**arguments, generator=generator(), output_type="pt", return_dict=False)[0]
    return torch.as_tensor(made)


def cross(values: dict[str, Any]) -> dict[str, Any]:
    """Over the wire and back: what is no plain data does not arrive."""
    header, body = encode_payload(Payload(values))
    return decode_payload(header, bytearray(b"".join(bytes(part) for part in body))).values


def inputs_for(program: Any, name: str, values: dict[str, Any], scale: float | None, **changes: Any) -> TaskInputs:
    """A task of one stage, given only the fields that the stage declares."""
    declared = {item.name for item in program.stage.request_inputs}
    fields = {key: value for key, value in {**FAMILIES[name].fields, **changes}.items() if key in declared}
    return TaskInputs(fields, scale, generator(), values)


def split(name: str, scale: float | None, on_step: Callable[[Step], None] | None = None, **changes: Any) -> Any:
    """The pictures, and what crossed by stage."""
    values, crossed = {}, {}
    for stage, program in programs_of(name).items():
        outputs = program.run(inputs_for(program, name, values, scale, **changes), {}, on_step)
        values = crossed[stage] = cross(outputs.values)
    (made,) = values.values()
    return made, crossed


@pytest.mark.parametrize("name", [*SPLIT, *FORCED])
def test_the_split_is_the_standard_pipeline(name: str) -> None:
    family = FAMILIES[name]
    assert torch.equal(split(name, family.guidance_scale)[0], whole(name))


@pytest.mark.parametrize("name", [name for name in (*SPLIT, *FORCED) if FAMILIES[name].off])
def test_without_guidance(name: str) -> None:
    expected = whole(name, **FAMILIES[name].off)
    assert torch.equal(split(name, 1.0)[0], expected)
    assert not torch.equal(expected, whole(name))


@pytest.mark.parametrize("name", [name for name in (*SPLIT, *FORCED) if FAMILIES[name].two])
def test_two_prompts_with_two_outputs_each(name: str) -> None:
    family = FAMILIES[name]
    made = split(name, family.guidance_scale, **family.two)[0]
    assert len(made) == 4
    assert torch.equal(made, whole(name, **family.two))


@pytest.mark.parametrize("name", ["wan2.2-ti2v", "stable-diffusion-img2img", "ltx"])
def test_in_another_dtype(name: str) -> None:
    topology, placement = topology_of(name), Placement(torch.device("cpu"), torch.bfloat16)
    values: dict[str, Any] = {}
    for stage in topology.stages:
        program = StandardProgram(topology, stage)
        program.load(Components(topology.source), placement)
        values = cross(program.run(inputs_for(program, name, values, FAMILIES[name].guidance_scale), {}).values)
    fused = FusedProgram(topology, topology.stage("denoise"))
    fused.load(Components(topology.source), placement)
    task = TaskInputs(dict(FAMILIES[name].fields), FAMILIES[name].guidance_scale, generator())
    expected = fused.run(task, {}).values
    assert values.keys() == expected.keys()
    assert all(torch.equal(values[key], expected[key]) for key in values)
    assert not torch.equal(next(iter(values.values())).float(), whole(name))


@pytest.mark.parametrize("name", [*SPLIT, "wan-i2v"])
def test_a_stage_holds_only_its_own_weights(name: str) -> None:
    topology = topology_of(name)
    held = {stage: set(program.components) for stage, program in programs_of(name).items()}
    assert held == {stage.name: set(stage.loads) for stage in topology.stages}
    for program in programs_of(name).values():
        for part, component in program._pipe.components.items():
            if isinstance(component, torch.nn.Module) and part not in program.components:
                assert part in program.stage.reads
                assert sum(p.numel() for p in component.parameters() if not p.is_meta) == 0
    weighted = [{part for part in names if topology.components[part].bytes} for names in held.values()]
    assert set.union(*weighted) == {part for part, info in topology.components.items() if info.bytes}
    shared = weighted[0] & weighted[2]
    assert shared == ({"vae"} if "vae_encode" in {port.name for port in topology.stage("denoise").inputs} else set())
    assert not weighted[1] & (weighted[0] | weighted[2])


@pytest.mark.parametrize("name", SPLIT)
def test_what_crosses_is_what_the_topology_says(name: str) -> None:
    crossed = split(name, FAMILIES[name].guidance_scale)[1]
    for stage in topology_of(name).stages:
        assert set(crossed[stage.name]) <= {port.name for port in stage.outputs}
        assert set(crossed[stage.name]) >= {port.name for port in stage.outputs if port.required}
    tensors = list(tensors_in(crossed["denoise"]))
    assert len(tensors) == 1, "decode gets the latents and plain values"


def test_wan_ti2v_is_described_as_what_it_is() -> None:
    topology = describe(source_of("wan2.2-ti2v"))
    assert (topology.adapter, topology.workflow, topology.makes) == ("standard", "text2video", "video")
    assert (topology.spatial_multiple, topology.latent_scale) == (32, 16)
    assert (topology.latent_channels, topology.temporal_scale, topology.guidance) == (48, 4, "classifier_free")
    defaults = topology.defaults
    assert (defaults.width, defaults.height, defaults.num_frames, defaults.guidance_scale) == (832, 480, 81, 5.0)
    names = {item.name for item in topology.stages[0].request_inputs}
    assert {"prompt", "negative_prompt", "num_videos_per_prompt", "guidance_scale_2"} <= names
    assert not names & {"generator", "prompt_embeds", "output_type", "callback_on_step_end", "attention_kwargs"}


def test_hunyuan_video_takes_its_guidance_in_the_transformer() -> None:
    topology = describe(source_of("hunyuan-video"))
    assert (topology.adapter, topology.guidance, topology.spatial_multiple) == ("standard", "embedded", 16)


def test_pictures_go_to_encode_alone_and_cross_from_there() -> None:
    topology = topology_of("stable-diffusion-img2img")
    assert topology.workflow == "image2image"
    takes = {stage.name: {item.name for item in stage.request_inputs} for stage in topology.stages}
    assert "image" in takes["encode"] and "image" not in takes["denoise"] | takes["decode"]


def test_every_step_is_told_with_latents_and_an_estimate() -> None:
    steps: list[Step] = []
    crossed = split("wan2.2-ti2v", 5.0, steps.append)[1]
    assert [(step.index, step.total) for step in steps] == [(0, 3), (1, 3), (2, 3)]
    last, foreseen = steps[-1], steps[-1].denoised()
    assert last.latents is not None and foreseen is not None
    # The last step ends at sigma 0, where the latents are the estimate.
    torch.testing.assert_close(foreseen, last.latents, rtol=1e-4, atol=1e-5)
    assert all(step.latents.shape == crossed["denoise"]["latents"].shape for step in steps if step.latents is not None)


@pytest.mark.parametrize("name", [*SPLIT, "flux"])
def test_a_steps_latents_in_the_form_that_decode_takes(name: str) -> None:
    program, family = programs_of(name)["denoise"], FAMILIES[name]
    encode = programs_of(name)["encode"]
    values = cross(encode.run(inputs_for(encode, name, {}, family.guidance_scale), {}).values)
    task = inputs_for(program, name, values, family.guidance_scale)
    seen: list[torch.Tensor] = []

    def on_step(step: Step) -> None:
        assert step.latents is not None
        seen.append(program.boundary_latents(task, step.latents))

    latents = program.run(task, {}, on_step).values["latents"]
    assert torch.equal(seen[-1], latents)
    assert not torch.equal(seen[0], latents)


class Enough(Exception):
    """What a driver raises to end a task."""


@pytest.mark.parametrize("name", ["wan2.2-ti2v", "ddpm"])
def test_raising_in_on_step_ends_the_task_and_comes_out(name: str) -> None:
    calls: list[int] = []
    fatal = Enough("enough")

    def on_step(step: Step) -> None:
        calls.append(step.index)
        if step.index == 1:
            raise fatal

    with pytest.raises(Enough) as caught:
        if name == "ddpm":
            run_fused(name, on_step)
        else:
            split(name, 5.0, on_step)
    assert caught.value is fatal
    assert calls == [0, 1]


def test_tasks_of_unequal_length_take_turns_without_touching_each_other() -> None:
    name, scale = "wan2.2-ti2v", 5.0
    program, encode = programs_of(name)["denoise"], programs_of(name)["encode"]
    encoded = cross(encode.run(inputs_for(encode, name, {}, scale), {}).values)
    alone = {
        steps: program.run(inputs_for(program, name, encoded, scale, num_inference_steps=steps), {}).values["latents"]
        for steps in (2, 4)
    }
    stage = DenoiseStage(StandardProgram(program.topology, program.stage), Components(source_of(name)), CPU)
    stage.load(lambda _: None)
    for steps in alone:
        fields = inputs_for(program, name, {}, scale, num_inference_steps=steps).fields
        stage.admit(StageTask(str(steps), fields, SEED, scale, payload=Payload(dict(encoded))))
    outputs: dict[str, Payload] = {}
    for _ in range(40):
        for event in stage.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, Output):
                outputs[event.job] = event.payload
    assert list(outputs) == ["2", "4"]
    assert all(torch.equal(outputs[str(steps)].values["latents"], latents) for steps, latents in alone.items())


def test_a_program_keeps_nothing_of_a_task() -> None:
    first = split("stable-diffusion", 5.0)[0]
    split("stable-diffusion", 2.0, prompt="something else", num_inference_steps=2)
    assert torch.equal(split("stable-diffusion", 5.0)[0], first)


def test_latents_alone_can_be_decoded() -> None:
    name = "hunyuan-video"
    made, crossed = split(name, 6.0)
    program = programs_of(name)["decode"]
    alone = program.run(inputs_for(program, name, {"latents": crossed["denoise"]["latents"]}, None), {})
    torch.testing.assert_close(alone.values["videos"], made, rtol=0, atol=1e-6)


def test_shift_is_the_schedulers() -> None:
    name = "wan2.2-ti2v"
    values: dict[str, Any] = {}
    for program in programs_of(name).values():
        task = inputs_for(program, name, values, 5.0)
        task.shift = 8.0
        values = program.run(task, {}).values
    pipe = DiffusionPipeline.from_pretrained(folder(name))
    expected = WanPipeline(
        **{
            **whole_of(name).components,
            "scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=8.0),
        },
        expand_timesteps=True,
    )
    expected.set_progress_bar_config(disable=True)
    made = expected(**FAMILIES[name].standard, generator=generator(), output_type="pt", return_dict=False)[0]
    assert torch.equal(values["videos"], made)


def test_wrong_input_is_named() -> None:
    program = programs_of("stable-diffusion")["encode"]
    task = inputs_for(program, "stable-diffusion", {}, 5.0)
    with pytest.raises(InvalidRequest, match=r"shift: given 3\.0; allowed: nothing"):
        program.run(replace(task, shift=3.0), {})
    with pytest.raises(InvalidRequest, match="num_frames: given 9; allowed: nothing"):
        program.run(replace(task, fields={**task.fields, "num_frames": 9}), {})
    source = source_of("stable-diffusion")
    with pytest.raises(Unsupported, match="workflow: given 'inpaint'; allowed: text2image"):
        standard_topology(source, component_infos(source), "inpaint")


def test_a_stage_without_what_should_have_crossed_says_so() -> None:
    denoise = programs_of("wan2.2-ti2v")["denoise"]
    with pytest.raises(WrongPayload, match="encode_prompt is called more often"):
        denoise.run(inputs_for(denoise, "wan2.2-ti2v", {}, 5.0), {})
    decode = programs_of("wan2.2-ti2v")["decode"]
    with pytest.raises(WrongPayload, match="latents: decode needs a tensor"):
        decode.run(inputs_for(decode, "wan2.2-ti2v", {}, 5.0), {})
    crossed = dict(split("wan2.2-ti2v", 5.0)[1]["denoise"])
    with pytest.raises(WrongPayload, match="skeleton: decode needs the shapes"):
        decode.run(inputs_for(decode, "wan2.2-ti2v", {**crossed, "skeleton": {}}, 5.0), {})
    wrong = {**crossed, "latents": crossed["latents"][:, :, :2]}
    with pytest.raises(WrongPayload, match=r"latents: \(1, 48, 2, 4, 4\) came, decode takes \(1, 48, 3, 4, 4\)"):
        decode.run(inputs_for(decode, "wan2.2-ti2v", wrong, 5.0), {})


def run_fused(name: str, on_step: Callable[[Step], None] | None = None) -> torch.Tensor:
    topology = topology_of(name)
    program = FusedProgram(topology, topology.stage("denoise"))
    program.load(Components(topology.source), CPU)
    (made,) = program.run(inputs_for(program, name, {}, FAMILIES[name].guidance_scale), {}, on_step).values.values()
    return made


def test_what_cannot_be_split_runs_in_one_piece_and_says_why() -> None:
    topology = describe(source_of("ddpm"))
    assert (topology.adapter, [stage.name for stage in topology.stages]) == ("fused", ["denoise"])
    assert topology.notes == ("runs in one piece: DDPMPipeline has no VAE whose decode ends its call",)
    steps: list[Step] = []
    assert torch.equal(run_fused("ddpm", steps.append), whole("ddpm"))
    assert [(step.index, step.total) for step in steps] == [(0, 3), (1, 3), (2, 3)]
    assert all(step.denoised() is not None for step in steps)


@pytest.mark.parametrize("name", ["stable-diffusion", "hunyuan-video"])
def test_a_splittable_pipeline_runs_in_one_piece_too(name: str) -> None:
    topology = replace(topology_of(name), adapter="fused")
    program = FusedProgram(topology, topology.stage("denoise"))
    program.load(Components(topology.source), CPU)
    task = TaskInputs(dict(FAMILIES[name].fields), FAMILIES[name].guidance_scale, generator())
    (made,) = program.run(task, {}).values.values()
    assert torch.equal(made, whole(name))


class Inner(DiffusionPipeline):
    """A denoising loop of its own."""

    def __init__(self, unet: torch.nn.Module, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)


class Combined(DiffusionPipeline):
    """A pipeline that hands its components to another one inside it."""

    def __init__(self, unet: torch.nn.Module, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.inner = Inner(unet, scheduler)


def test_a_view_reaches_into_pipelines_inside_pipelines() -> None:
    pipe = Combined(torch.nn.Linear(1, 1), DDIMScheduler())
    own = view(pipe, own_schedulers(pipe, None, Loop()))
    assert own.inner.scheduler is own.scheduler
    assert own.scheduler is not pipe.scheduler and pipe.inner.scheduler is pipe.scheduler
    assert own.unet is pipe.unet and own.inner.unet is pipe.unet


def test_a_copied_scheduler_steps_by_itself() -> None:
    pipe = Combined(torch.nn.Linear(1, 1), DDIMScheduler())
    steps: list[Step] = []
    ((_, scheduler),) = own_schedulers(pipe, None, Loop(pipe, steps.append))
    second = deepcopy(scheduler)
    for other in (scheduler, second):
        other.set_timesteps(3)
    second.set_timesteps(7)
    sample = torch.rand(1, 1, 2, 2)
    first = int(second.timesteps[0])
    made = second.step(sample, first, sample, return_dict=False)[0]
    assert steps == []
    plain = DDIMScheduler()
    plain.set_timesteps(7)
    assert torch.equal(made, plain.step(sample, first, sample, return_dict=False)[0])
    scheduler.step(sample, int(scheduler.timesteps[0]), sample)
    assert [(step.index, step.total) for step in steps] == [(0, 3)]


@pytest.mark.parametrize(
    ("result", "makes", "shape"),
    [
        ((np.zeros((2, 4, 6, 3), np.float32),), "image", (2, 3, 4, 6)),
        (([picture(0, 6, 4), picture(1, 6, 4)],), "image", (2, 3, 4, 6)),
        (([[picture(0, 6, 4)] * 5],), "video", (1, 5, 3, 4, 6)),
        ((torch.rand(1, 5, 3, 4, 6),), "video", (1, 5, 3, 4, 6)),
    ],
)
def test_any_form_of_result_becomes_a_tensor(result: Any, makes: Any, shape: tuple[int, ...]) -> None:
    made = pictures(result, makes)
    assert made.shape == shape and made.dtype == torch.float32 and 0 <= made.min() <= made.max() <= 1


def test_a_result_that_is_no_picture_is_refused() -> None:
    with pytest.raises(Unsupported, match="made no image"):
        pictures((torch.rand(1, 2),), "image")


def test_code_is_read_without_running_it() -> None:
    wan = anatomy(WanPipeline)
    assert wan.recorded == ("encode_prompt",)
    assert wan.mentions("vae", "decode") and not wan.mentions("vae", "encode")
    assert wan.encodes("tokenizer") and not wan.mentions("tokenizer")
    assert anatomy(StableVideoDiffusionPipeline).mentions("vae", "encode")
    for combined in (StableCascadeCombinedPipeline, KandinskyCombinedPipeline):
        assert not anatomy(combined).mentions("vae", "decode")


def same(left: Any, right: Any) -> bool:
    """Deep equality, tensors by value and layout."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right) and left.stride() == right.stride()
    if isinstance(left, list | tuple):
        return type(left) is type(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return left == right


def test_plain_values_come_back_as_they_were() -> None:
    value = [None, True, 3, 0.5, "a", (torch.arange(3), [torch.eye(2)]), torch.rand(2, 3, 4, 4)]
    assert same(unpack(cross({"value": pack(value)})["value"]), value)


def test_a_models_output_comes_back_by_name_attribute_and_place() -> None:
    distribution = DiagonalGaussianDistribution(torch.rand(1, 8, 2, 2))
    record = unpack(cross({"value": pack({"latent_dist": distribution, "past_key_values": object()})})["value"])
    assert not hasattr(record, "past_key_values") and not hasattr(record, "latents")
    for found in (record.latent_dist, record["latent_dist"], record[0]):
        assert torch.equal(found.sample(generator()), distribution.sample(generator()))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "1", "P", "LA", "CMYK"])
def test_pictures_cross_in_any_mode(mode: str) -> None:
    given = picture(0, 8, 6).convert(mode)
    back = unpack(cross({"value": pack(given)})["value"])
    assert isinstance(back, Image.Image) and back.size == (8, 6)
    assert back.convert("RGB").tobytes() == given.convert("RGB").tobytes()


def test_an_object_does_not_cross() -> None:
    with pytest.raises(Unsupported, match="SimpleNamespace cannot cross between stages"):
        pack([SimpleNamespace()])


@pytest.mark.parametrize(
    "value", [{"code": "x"}, {"distribution": "os.system", "parameters": 1, "deterministic": False}]
)
def test_what_pack_cannot_have_made_is_refused(value: Any) -> None:
    with pytest.raises(WrongPayload):
        unpack(value)


def test_a_skeleton_has_no_tensors_and_gives_blanks_of_its_shapes() -> None:
    value = pack([(torch.rand(2, 3), torch.ones(4, dtype=torch.bool)), picture(0, 8, 6)])
    bones = skeleton(value)
    assert not list(tensors_in(Payload({"bones": bones}).check().values))
    (zeros, ones), black = unpack(blank(bones, torch.device("cpu")))
    assert same(zeros, torch.zeros(2, 3)) and same(ones, torch.ones(4, dtype=torch.bool))
    assert black.size == (8, 6)
    with pytest.raises(WrongPayload, match="unknown dtype 'load'"):
        blank({"shape": [1], "dtype": "load"}, torch.device("cpu"))


def test_only_the_outermost_call_is_recorded_and_as_it_was_then() -> None:
    recorder = Recorder()
    inner = recorder.around("inner", lambda: torch.zeros(2))
    outer = recorder.around("outer", lambda: inner() + 1)
    result = outer()
    result += 5
    assert list(recorder.calls) == ["outer"]
    player = Player(cross(recorder.calls))
    replayed = player.around("outer", outer)
    assert torch.equal(replayed(), torch.ones(2))
    with pytest.raises(WrongPayload, match="outer is called more often"):
        replayed()


def test_a_replaced_method_keeps_its_signature_and_the_module_its_class() -> None:
    module = torch.nn.Linear(2, 2)
    double = overridden(module, forward=lambda *_: "replaced")
    assert type(double) is torch.nn.Linear and double.weight is module.weight
    assert list(inspect.signature(double.forward).parameters) == ["input"]
    given = torch.ones(1, 2)
    assert double(given) == "replaced"
    assert isinstance(module(given), torch.Tensor)


def test_blanks_follow_the_shapes_that_were_noted() -> None:
    shapes, sizes = Shapes(), iter((1, 1, 2))
    noted = shapes.around("net", lambda: (torch.rand(next(sizes)),))
    for _ in range(3):
        noted()
    assert [times for times, _ in shapes.runs["net"]] == [2, 1]
    answer = Blanks(cross({"runs": shapes.runs})["runs"], torch.device("cpu")).around("net", noted)
    assert [answer()[0].tolist() for _ in range(4)] == [[0], [0], [0, 0], [0, 0]]
    with pytest.raises(WrongPayload, match="the shapes that other returns are missing"):
        Blanks({}, torch.device("cpu")).around("other", noted)()

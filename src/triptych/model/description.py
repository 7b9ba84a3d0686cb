"""The topology of a model: what its stages are and what crosses between them. Reads configs, never weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from diffusers.configuration_utils import FrozenDict
from diffusers.modular_pipelines.modular_pipeline import ModularPipeline, ModularPipelineBlocks

from triptych.errors import LoadError, Unsupported
from triptych.model import blocks as modular
from triptych.model.declared import (
    DENOISERS,
    FRAME_RATES,
    GENERATOR_STATE,
    OUTPUT_COUNTS,
    folder_defaults,
    hint_name,
    plain_default,
)
from triptych.model.families import Family, resolve_family, wrong_in_modular
from triptych.model.index import read_index as check_index
from triptych.model.infos import component_infos
from triptych.model.load import component_config, meta_component
from triptych.model.topology import (
    STAGES,
    ComponentInfo,
    Defaults,
    InputInfo,
    Port,
    Source,
    StageName,
    StageTopology,
    Topology,
)
from triptych.model.trust import NO_TRUST, Trust

__all__ = ["describe"]

_DENOISERS = (*DENOISERS, "prior")
# Inputs of the blocks that are no person's to give: run-time objects, and tensors that earlier blocks make.
NOT_REQUESTED = frozenset(
    {"generator", "output_type", "timesteps", "dtype", "batch_size", "latents", "device", "padding_mask_crop"}
)


@dataclass(frozen=True)
class _Model:
    """What every step of the description needs."""

    source: Source
    index: Mapping[str, Any]
    infos: Mapping[str, ComponentInfo]
    family: Family
    trust: Trust


def describe(source: Source, workflow: str | None = None, trust: Trust = NO_TRUST) -> Topology:
    """The topology of `source` for one workflow, or for the union of its workflows where `workflow` is None.

    Raises Unsupported for an unknown workflow (listing the known ones), LoadError for a broken folder.
    """
    check_index(source, trust)
    index = modular.read_index(source)
    infos = component_infos(source, trust)
    family = resolve_family(index)
    reason = wrong_in_modular(index)
    if family is None or reason is not None:
        from triptych.model.standard import standard_topology

        topology = standard_topology(source, infos, workflow, trust)
        return topology if reason is None else replace(topology, notes=(reason, *topology.notes))
    return _modular_topology(_Model(source, index, infos, family, trust), workflow)


def _modular_topology(model: _Model, workflow: str | None) -> Topology:
    whole = modular.full_blocks(model.family, model.index)
    native = modular.native_workflows(whole, model.family)
    lacking = {
        ours: _lacking(model, ours, modular.workflow_blocks(whole, name)) + _unfit(model, ours)
        for ours, name in native.items()
    }
    supported = [name for name, missing in lacking.items() if not missing]
    if not supported:
        missing = sorted({name for names in lacking.values() for name in names})
        raise LoadError(f"{model.source.name} lacks {', '.join(missing)}, without which no workflow can run")
    if workflow is not None and workflow not in supported:
        why = f" (needs {', '.join(lacking[workflow])})" if workflow in lacking else ""
        raise Unsupported(f"given {workflow!r}{why}; allowed: {', '.join(supported)}", field="workflow")
    stages = _stages(model, whole, {name: native[name] for name in supported}, workflow)
    notes = [f"{name} needs {', '.join(missing)}, not found here" for name, missing in lacking.items() if missing]
    chosen = workflow or next((name for name in supported if name.startswith("text2")), supported[0])
    return _with_facts(model, whole, stages, chosen, tuple(supported), tuple(notes))


def _lacking(model: _Model, workflow: str, blocks: Mapping[str, ModularPipelineBlocks]) -> list[str]:
    """The components that these blocks need and the folder does not have, and modules that are not installed."""
    modules = [module for name, module in model.family.modules if name == workflow]
    specs = {name: spec for block in blocks.values() for name, spec in _specs(block).items()}
    return [
        name
        for name, spec in specs.items()
        if spec.default_creation_method == "from_pretrained"
        and name not in model.infos
        and name not in model.family.nullable
    ] + [module for module in modules if importlib.util.find_spec(module) is None]


def _unfit(model: _Model, workflow: str) -> list[str]:
    """What a workflow that encodes pictures wants of the VAE and does not find."""
    wanted = model.family.picture_channels
    if wanted is None or "vae" not in model.infos or workflow.startswith("text2"):
        return []
    config = component_config(model.source, model.infos["vae"], model.trust)
    found = config.get("z_dim") or config.get("latent_channels")
    return [] if found == wanted else [f"a VAE of {wanted} latent channels (this one has {found})"]


def _specs(block: ModularPipelineBlocks) -> dict[str, Any]:
    with modular.quiet():
        return {str(spec.name): spec for spec in block.expected_components}


def _stages(
    model: _Model, whole: ModularPipelineBlocks, native: Mapping[str, str | None], workflow: str | None
) -> tuple[StageTopology, ...]:
    """The stages: ports from the blocks that will run; components, fields and values from the workflows that are
    supported (the whole blocks list those of unsupported ones as well)."""
    run = modular.workflow_blocks(whole, native[workflow] if workflow else None)
    grouped = modular.group(run)
    flat = [modular.workflow_blocks(whole, native[name]) for name in ([workflow] if workflow else native)]
    needed = {stage: _components(flat, stage) for stage in STAGES}
    taken = {item.name for blocks in flat for item in modular.inputs_of(modular.joined(blocks.values()))}
    able = {item.name for blocks in flat for item in _made(modular.joined(blocks.values()))}
    ports = _Ports({stage: modular.joined(run[name] for name in names) for stage, names in grouped.items()}, able)
    return tuple(
        StageTopology(
            name=stage,
            blocks=tuple(grouped[stage]),
            loads=_loads(model, stage, needed[stage]),
            reads=_reads(model, stage, needed[stage]),
            request_inputs=(
                *ports.request_inputs(stage, taken),
                *_expert_guidance(needed[stage]),
                *(ports.output_count(taken) if stage == "encode" and model.family.outputs_as_prompts else ()),
            ),
            inputs=ports.inputs(stage),
            outputs=ports.outputs(stage),
        )
        for stage in STAGES
        if grouped[stage]
    )


def _expert_guidance(components: Iterable[str]) -> tuple[InputInfo, ...]:
    """A second expert's own guidance scale, which diffusers takes as a component and not as an input."""
    if "guider_2" not in components:
        return ()
    what = "guidance scale of the second expert; the first's if left out"
    return (InputInfo("guidance_scale_2", None, False, "float", what),)


def _components(workflows: Iterable[Mapping[str, ModularPipelineBlocks]], stage: StageName) -> list[str]:
    """The components that any of the workflows lists in this stage."""
    names: dict[str, None] = {}
    for blocks in workflows:
        for block in modular.group(blocks)[stage]:
            names.update(dict.fromkeys(_specs(blocks[block])))
    return list(names)


def _runs(model: _Model, stage: StageName, name: str) -> bool:
    """Whether a stage that lists the component runs it, and does not merely read its config."""
    if (stage, name) in model.family.uses:
        return True
    kind = name.rstrip("_0123456789")
    if kind.endswith("vae"):
        return stage != "denoise"
    return not (kind in _DENOISERS and stage != "denoise")


def _loads(model: _Model, stage: StageName, needed: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in needed if name in model.infos and _runs(model, stage, name))


def _reads(model: _Model, stage: StageName, needed: Iterable[str]) -> tuple[str, ...]:
    """Listed but not run, plus what blocks look at without listing it: the VAE's scale decides every latent size."""
    silent = ["vae", *(name for where, name in model.family.reads if where == stage)]
    loads = _loads(model, stage, needed)
    return tuple(name for name in dict.fromkeys([*needed, *silent]) if name in model.infos and name not in loads)


def _made(blocks: ModularPipelineBlocks) -> list[Any]:
    """What the leaves and the loops among the blocks put into the state."""
    parts = [*modular.leaves_of(blocks), *modular.loops_of(blocks)]
    return [item for part in parts for item in modular.outputs_of(part)]


class _Ports:
    """What crosses between groups of blocks, from what the blocks declare."""

    def __init__(self, parts: Mapping[StageName, ModularPipelineBlocks], able: set[str]) -> None:
        """`able`: what the workflows make at all; the blocks hold those of unsupported ones as well."""
        self.declared: dict[StageName, list[Any]] = {}
        self.made: dict[StageName, dict[str, Any]] = {}
        for stage, blocks in parts.items():
            self.declared[stage] = modular.inputs_of(blocks)
            self.made[stage] = {item.name: item for item in _made(blocks) if item.name in able}

    def _later(self, stage: StageName) -> tuple[set[str], set[str]]:
        """The names and the tags that later stages want."""
        later = [item for other in STAGES[STAGES.index(stage) + 1 :] for item in self.declared[other]]
        names = {item.name for item in later if item.name}
        return names, {item.kwargs_type for item in later if item.kwargs_type}

    def _samples(self, stage: StageName) -> bool:
        """Whether the stage may draw from the generator."""
        return any(item.name == "generator" for item in self.declared[stage])

    def outputs(self, stage: StageName) -> tuple[Port, ...]:
        """What later stages want of what this one makes, and of what it merely hands on."""
        if stage == "decode":
            return tuple(
                Port(item.name, None, hint_name(item.type_hint))
                for item in self.made[stage].values()
                if _is_media(item)
            )
        names, tags = self._later(stage)
        ports = [
            Port(item.name, item.kwargs_type, hint_name(item.type_hint))
            for item in self.made[stage].values()
            if item.name in names or item.kwargs_type in tags
        ]
        known = {port.name for port in ports}
        if stage == "denoise":
            ports += [port for port in self.outputs("encode") if port.name in names and port.name not in known]
        if self._samples(stage) and "generator" in names and not any(port.name == GENERATOR_STATE for port in ports):
            ports.append(Port(GENERATOR_STATE, None, "torch.Tensor"))
        return tuple(ports)

    def inputs(self, stage: StageName) -> tuple[Port, ...]:
        """What this stage takes from the one before it."""
        place = STAGES.index(stage)
        if place == 0:
            return ()
        required = {item.name for item in self.declared[stage] if item.required}
        before = self.outputs(STAGES[place - 1])
        return tuple(Port(port.name, port.tag, port.type_hint, port.name in required) for port in before)

    def request_inputs(self, stage: StageName, taken: set[str]) -> tuple[InputInfo, ...]:
        """The fields that a person may give: declared, made by no stage before, no tensor, and `taken` by one of the
        workflows (the blocks hold those of unsupported ones as well)."""
        made = {name for other in STAGES[: STAGES.index(stage)] for name in self.made[other]}
        given = [item for item in self.declared[stage] if item.name and _is_requested(item)]
        return tuple(
            InputInfo(
                item.name,
                plain_default(item.default),
                bool(item.required),
                hint_name(item.type_hint),
                item.description or "",
            )
            for item in given
            if item.name in taken and (item.name not in made or item.name in ("height", "width"))
        )

    def output_count(self, taken: set[str]) -> tuple[InputInfo, ...]:
        """How many outputs a prompt is to have, as the denoise stage declares it, if encode does not."""
        own = {item.name for item in self.declared["encode"]}
        later = self.request_inputs("denoise", taken)
        return tuple(item for item in later if item.name in OUTPUT_COUNTS and item.name not in own)


def _is_media(item: Any) -> bool:
    return item.name in ("images", "videos", "audio")


def _is_requested(item: Any) -> bool:
    hint = hint_name(item.type_hint)
    return item.name not in NOT_REQUESTED and not ("Tensor" in hint and "image" not in hint.lower())


def _with_facts(
    model: _Model,
    whole: ModularPipelineBlocks,
    stages: tuple[StageTopology, ...],
    workflow: str,
    workflows: tuple[str, ...],
    notes: tuple[str, ...],
) -> Topology:
    pipe = modular.make_pipeline(model.source, model.family, model.index, whole)
    for name in _DENOISERS:
        if name in model.infos:
            config = component_config(model.source, model.infos[name], model.trust)
            setattr(pipe, name, SimpleNamespace(config=FrozenDict(config)))
    if "vae" in model.infos:
        vae = meta_component(model.source, model.infos["vae"], model.trust)
        setattr(pipe, "vae", vae)  # noqa: B010 (a component, not an attribute)
    scale = _spatial_scale(pipe)
    video = any(port.name == "videos" for stage in stages for port in stage.outputs)
    inputs = {item.name: item for stage in stages for item in stage.request_inputs}
    guidance = _guidance(pipe, inputs)
    return Topology(
        source=model.source,
        workflow=workflow,
        workflows=workflows,
        family=model.family.name,
        pipeline_class=model.index["_class_name"],
        adapter="modular",
        stages=stages,
        components=dict(model.infos),
        defaults=_defaults(model, pipe, inputs, video, guidance),
        spatial_multiple=scale * model.family.patch,
        latent_scale=scale,
        latent_channels=_latent_channels(pipe),
        temporal_scale=_temporal_scale(pipe) if video else None,
        makes="video" if video else "image",
        guidance=guidance,
        notes=notes,
    )


def _first(pipe: ModularPipeline, names: Iterable[str], fallback: Any) -> Any:
    for name in names:
        value = getattr(pipe, name, None)
        if value is not None:
            return value
    return fallback


def _spatial_scale(pipe: ModularPipeline) -> int:
    # Z-Image's vae_scale_factor_spatial is its image processor's (a multiple for pictures, not the VAE's scale).
    return int(_first(pipe, ("vae_scale_factor", "vae_spatial_compression_ratio", "vae_scale_factor_spatial"), 8))


def _temporal_scale(pipe: ModularPipeline) -> int:
    return int(_first(pipe, ("vae_scale_factor_temporal", "vae_temporal_compression_ratio"), 1))


def _latent_channels(pipe: ModularPipeline) -> int:
    config = getattr(getattr(pipe, "vae", None), "config", {})
    return int(config.get("latent_channels") or config.get("z_dim") or _first(pipe, ("num_channels_latents",), 0))


def _guidance(pipe: ModularPipeline, inputs: Mapping[str, InputInfo]) -> Any:
    if getattr(pipe, "guider", None) is not None:
        return "classifier_free"
    config = getattr(_first(pipe, _DENOISERS, None), "config", {})
    return "embedded" if "guidance_scale" in inputs and config.get("guidance_embeds", True) else "none"


def _defaults(
    model: _Model, pipe: ModularPipeline, inputs: Mapping[str, InputInfo], video: bool, guidance: str
) -> Defaults:
    def declared(*names: str) -> Any:
        return next((inputs[name].default for name in names if name in inputs), None)

    guider = getattr(pipe, "guider", None)
    found: dict[str, Any] = {
        "width": declared("width") or getattr(pipe, "default_width", None),
        "height": declared("height") or getattr(pipe, "default_height", None),
        "num_inference_steps": declared("num_inference_steps"),
        "guidance_scale": guider.config.get("guidance_scale") if guider is not None else declared("guidance_scale"),
    }
    if video:
        found["num_frames"] = declared("num_frames") or getattr(pipe, "default_num_frames", None)
        found["fps"] = declared(*FRAME_RATES) or model.family.fps
    found |= folder_defaults(model.source)
    if guidance == "none":
        found["guidance_scale"] = None
    return Defaults(**found)

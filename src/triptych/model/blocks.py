"""Modular Diffusers' blocks of one model: found, restricted to a workflow, grouped into stages. Reads no weights."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import importlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusers.modular_pipelines import LoopSequentialPipelineBlocks, SequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline import ModularPipeline, ModularPipelineBlocks

from triptych.errors import Unsupported
from triptych.model import index
from triptych.model.checkpoint import read_json
from triptych.model.families import Family, our_workflow
from triptych.model.topology import STAGES, Source, StageName

__all__ = [
    "full_blocks",
    "group",
    "inputs_of",
    "joined",
    "leaves_of",
    "loops_of",
    "make_pipeline",
    "native_workflows",
    "outputs_of",
    "quiet",
    "read_index",
    "select",
    "workflow_blocks",
]

_ours = contextvars.ContextVar("triptych_runs_diffusers", default=False)


class _OnlyTheirs(logging.Filter):
    """Drops what diffusers logs while we run it: tracebacks of errors that we raise anyway, one per nesting level,
    its notice that guiders are new, its doubts when SDXL's own code casts a VAE. What others log passes."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not _ours.get()


_NOISY = (
    "diffusers.modular_pipelines.modular_pipeline",
    "diffusers.guiders.guider_utils",
    "diffusers.models.modeling_utils",
)
_FILTER = _OnlyTheirs()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Runs diffusers without its log noise, in this context (greenlet, thread) only."""
    for name in _NOISY:
        logging.getLogger(name).addFilter(_FILTER)
    token = _ours.set(True)
    try:
        yield
    finally:
        _ours.reset(token)


def read_index(source: Source) -> dict[str, Any]:
    """What the folder's model_index.json (or modular_model_index.json) holds. Raises as `index.read_index` does."""
    return read_json(Path(source.folder) / index.read_index(source).file)


def _configs(index: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of an index (boundary_ratio, is_distilled…); components come through our own door."""
    return {key: value for key, value in index.items() if not isinstance(value, list) and not key.startswith("_")}


def full_blocks(family: Family, index: Mapping[str, Any]) -> ModularPipelineBlocks:
    """The family's blocks, a copy of our own. Raises Unsupported if this diffusers lacks them."""
    diffusers = importlib.import_module("diffusers")
    kind = getattr(diffusers, family.modular, None)
    if kind is None:
        raise Unsupported(f"this diffusers ({diffusers.__version__}) has no {family.modular}")
    names = (index.get("_blocks_class_name"), kind.default_blocks_name)
    chosen = next(
        blocks for name in names if name and (blocks := getattr(diffusers, name, None)) and blocks.block_classes
    )
    # Some families share block instances between all pipelines of the process; ours get hooks, so they are copies.
    blocks = copy.deepcopy(chosen())
    for old, new in family.swaps:
        _swap(blocks, _block_class(old), _block_class(new))
    if family.unguided_fails:
        for leaf in leaves_of(blocks):
            _always_negative(leaf)
    return blocks


def _block_class(path: str) -> type[ModularPipelineBlocks]:
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(f"diffusers.modular_pipelines.{module}"), name)


def _swap(blocks: ModularPipelineBlocks, old: type, new: type[ModularPipelineBlocks]) -> None:
    for name, block in blocks.sub_blocks.items():
        if type(block) is old:
            blocks.sub_blocks[name] = new()
        else:
            _swap(block, old, new)


def _always_negative(leaf: ModularPipelineBlocks) -> None:
    """Has a text block give negative embeddings without guidance too. They are the prompt's own: nothing reads them,
    and a prompt cache knows them already."""
    encode = getattr(leaf, "encode_prompt", None)
    if encode is None:
        return

    @functools.wraps(encode)
    def encode_prompt(*args: Any, prepare_unconditional_embeds: bool, **kwargs: Any) -> Any:
        if not prepare_unconditional_embeds:
            prompt = kwargs["prompt"]
            kwargs["negative_prompt"] = prompt if isinstance(prompt, list) else [prompt]
        return encode(*args, prepare_unconditional_embeds=True, **kwargs)

    vars(leaf)["encode_prompt"] = encode_prompt


def native_workflows(blocks: ModularPipelineBlocks, family: Family) -> dict[str, str | None]:
    """Our workflow names with diffusers' (None where the blocks know one workflow only and do not name it)."""
    known: Any = blocks._workflow_map
    if not known:
        return {family.workflow or "text2image": None}
    return {our_workflow(name): name for name in known}


def workflow_blocks(blocks: ModularPipelineBlocks, native: str | None) -> dict[str, ModularPipelineBlocks]:
    """The blocks of one workflow, flat, with dotted names; all of them, nested, where `native` is None."""
    chosen = blocks if native is None else blocks.get_workflow(native)
    return dict(chosen.sub_blocks)


def group(names: Iterable[str]) -> dict[StageName, list[str]]:
    """Block names by stage: up to the first `denoise*` encode, up to the first `decode*` denoise, then decode."""
    grouped: dict[StageName, list[str]] = {stage: [] for stage in STAGES}
    current: StageName = "encode"
    for name in names:
        if current == "encode" and name.startswith("denoise"):
            current = "denoise"
        elif name.startswith("decode"):
            current = "decode"
        grouped[current].append(name)
    return grouped


def joined(blocks: Iterable[ModularPipelineBlocks]) -> SequentialPipelineBlocks:
    """The blocks as one sequence, for asking what it takes and gives."""
    return SequentialPipelineBlocks.from_blocks_dict({f"{i}": block for i, block in enumerate(blocks)})


def select(family: Family, index: Mapping[str, Any], workflow: str, names: Iterable[str]) -> SequentialPipelineBlocks:
    """One stage's blocks by the names that its topology lists: nested ones, or the flat ones of a workflow."""
    names = list(names)
    blocks = full_blocks(family, index)
    found = dict(blocks.sub_blocks)
    if not set(names) <= set(found):
        found = workflow_blocks(blocks, native_workflows(blocks, family).get(workflow))
    missing = [name for name in names if name not in found]
    if missing:
        raise Unsupported(f"this diffusers has no block {missing[0]} in {workflow} of {family.name}")
    return SequentialPipelineBlocks.from_blocks_dict({name: found[name] for name in names})


def make_pipeline(
    source: Source, family: Family, index: Mapping[str, Any], blocks: ModularPipelineBlocks
) -> ModularPipeline:
    """A pipeline of these blocks whose pretrained components are all None."""
    diffusers = importlib.import_module("diffusers")
    with quiet():
        return getattr(diffusers, family.modular)(
            blocks=blocks, pretrained_model_name_or_path=source.folder, config_dict=_configs(index)
        )


def inputs_of(blocks: ModularPipelineBlocks) -> list[Any]:
    """The blocks' InputParams (diffusers annotates them as tuples)."""
    return list(blocks.inputs)


def outputs_of(blocks: ModularPipelineBlocks) -> list[Any]:
    """The blocks' OutputParams (diffusers annotates them as strings)."""
    return list(blocks.intermediate_outputs)


def loops_of(blocks: ModularPipelineBlocks) -> Iterator[LoopSequentialPipelineBlocks]:
    """Every block whose sub-blocks run once a step; conditional blocks hold one per workflow."""
    if isinstance(blocks, LoopSequentialPipelineBlocks):
        yield blocks
    for block in blocks.sub_blocks.values():
        yield from loops_of(block)


def leaves_of(blocks: ModularPipelineBlocks) -> Iterator[ModularPipelineBlocks]:
    """Every block without sub-blocks, in order of appearance."""
    if not blocks.sub_blocks:
        yield blocks
    for block in blocks.sub_blocks.values():
        yield from leaves_of(block)

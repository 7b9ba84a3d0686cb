"""What each component of a model is and weighs, from configurations and safetensors headers alone."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

from triptych.model.checkpoint import WeightFiles, read_header, read_json
from triptych.model.files import ITEMSIZE, file_sizes, prevailing, weights_of
from triptych.model.index import Entry, read_index
from triptych.model.topology import ComponentInfo, Source
from triptych.model.trust import NO_TRUST, Trust

logger = logging.getLogger(__name__)


def component_infos(source: Source, trust: Trust = NO_TRUST) -> dict[str, ComponentInfo]:
    """Every component that the model's index names, by name. Weights of a hub source that are not in the cache are
    described by what the hub tells of them; their dtype may be unknown then. Raises LoadError for damaged headers."""
    return {name: _info(source, entry, trust) for name, entry in read_index(source).entries.items()}


def _info(source: Source, entry: Entry, trust: Trust) -> ComponentInfo:
    folder = Path(source.folder) / entry.subfolder
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    weights = weights_of(source, entry.subfolder)
    parameters, size, dtype = _measure(source, entry, weights, config, trust)
    return ComponentInfo(
        name=entry.name,
        library=entry.library,
        class_name=entry.class_name,
        subfolder=entry.subfolder,
        parameters=parameters,
        bytes=size,
        dtype=dtype,
        files=tuple(f"{entry.subfolder}/{file}" for file in weights.files) if weights else (),
        causal=causal(entry.library, entry.class_name, config),
    )


def _measure(
    source: Source, entry: Entry, weights: WeightFiles | None, config: dict[str, Any], trust: Trust
) -> tuple[int, int, str | None]:
    """Parameters, bytes and the prevailing dtype: from the headers if every file is here, else by the files' sizes."""
    if weights is None:
        return 0, 0, None
    folder = Path(source.folder) / entry.subfolder
    here = [folder / file for file in weights.files if (folder / file).is_file()]
    if weights.pickle:
        sizes = file_sizes(source, entry.subfolder)
        return 0, sum(sizes.get(file, 0) for file in weights.files), None
    if weights.files and len(here) == len(weights.files):
        elements: Counter[str] = Counter()
        size = 0
        for path in here:
            header = read_header(path)
            elements.update(header.elements)
            size += header.bytes
        return elements.total(), size, prevailing(elements)
    return _measure_remote(source, entry, weights, config, trust)


def _measure_remote(
    source: Source, entry: Entry, weights: WeightFiles, config: dict[str, Any], trust: Trust
) -> tuple[int, int, str | None]:
    """By the sizes that the hub or the shards' index tells. Elements are counted on the configuration's own model,
    without memory, and the dtype follows from bytes per element where only one fits."""
    sizes = file_sizes(source, entry.subfolder)
    metadata: dict[str, Any] = {}
    if weights.index and (path := Path(source.folder) / entry.subfolder / weights.index).is_file():
        metadata = read_json(path).get("metadata") or {}
    size = sum(sizes.get(file, 0) for file in weights.files)
    if not all(file in sizes for file in weights.files):
        size = int(metadata.get("total_size") or size)
    parameters = int(metadata.get("total_parameters") or _count(source, entry, trust) or 0)
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype not in ITEMSIZE:
        dtype = {4: "float32", 8: "float64"}.get(round(size / parameters)) if parameters else None
    return parameters or size // ITEMSIZE.get(dtype or "float16", 2), size, dtype


def _count(source: Source, entry: Entry, trust: Trust) -> int | None:
    from triptych.model.load import meta_component

    info = ComponentInfo(entry.name, entry.library, entry.class_name, entry.subfolder)
    try:
        return sum(tensor.numel() for tensor in meta_component(source, info, trust).parameters())
    except Exception as error:  # a class that this diffusers lacks, say: sizes are all that can be told
        logger.info("cannot count the parameters of %s: %s", entry.name, error)
        return None


def causal(library: str, class_name: str, config: dict[str, Any]) -> bool | None:
    """Whether a text encoder's later tokens leave earlier ones' states unchanged; None for what is no text encoder.

    Decided by the configuration, then by what transformers uses the architecture for: one that serves masked language
    modelling or sequence to sequence looks both ways unless the configuration makes it a decoder.
    """
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert text is not None
    if library != "transformers" or "vocab_size" not in text | config:
        return None
    for settings in (text, config):
        if isinstance(settings.get("is_causal"), bool):
            return settings["is_causal"]
        if settings.get("use_bidirectional_attention") not in (None, False):
            return False
    if config.get("is_encoder_decoder") or class_name.endswith("EncoderModel"):
        return False
    kind = str(config.get("model_type", ""))
    if kind in ("clip", "clip_text_model"):  # in none of transformers' tables: CLIP's text half is causal
        return True
    from transformers.models.auto import modeling_auto as tables

    bases = {kind, kind.removesuffix("_text"), str(text.get("model_type", ""))}
    if bases & set(tables.MODEL_FOR_MASKED_LM_MAPPING_NAMES):
        return bool(config.get("is_decoder"))
    if bases & set(tables.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES):
        return False
    decoders = {*tables.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *tables.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    return bool(bases & decoders)

"""The one door through which weights enter."""

from __future__ import annotations

import inspect
import logging
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from triptych.errors import DeviceError, LoadError, NotEnoughMemory, TriptychError, Unsupported
from triptych.model import processors
from triptych.model.checkpoint import WeightFiles, read_header, read_json, read_shards
from triptych.model.files import fetch_weights, prevailing, weights_of
from triptych.model.index import installed_library
from triptych.model.topology import ComponentInfo, Source
from triptych.model.trust import NO_TRUST, Trust

__all__ = ["Components", "Placement", "Trust", "component_class", "load_component", "meta_component", "quiet"]

logger = logging.getLogger(__name__)

_one_at_a_time = threading.RLock()
"""Building a model changes torch's default dtype, and `quiet` both libraries' verbosity: the whole process' own."""


@dataclass(frozen=True)
class Placement:
    """Where a component's weights go. One kind today; streaming and sharding come through the same door."""

    device: torch.device
    dtype: torch.dtype | None = None
    """None: as on disk, except that a CPU gets float32."""
    kind: Literal["resident"] = "resident"
    quantization: str | None = None


def load_component(source: Source, spec: ComponentInfo, placement: Placement, trust: Trust) -> Any:
    """Builds one component with its weights. Raises LoadError naming the component, the file and the reason: missing,
    truncated, a pickle, remote code, or tensors that do not fit the class.

    A model comes in eval mode, without gradients, on `placement.device`; tokenizers, processors and schedulers come
    from their configurations.
    """
    if placement.kind != "resident" or placement.quantization is not None:
        raise Unsupported(
            f"placement {placement.kind!r} with quantization {placement.quantization!r}", field="placement"
        )
    folder = Path(source.folder) / spec.subfolder
    if not folder.is_dir() and source.kind != "hub":
        raise LoadError(f"component {spec.name!r}: no folder {folder}", field="model")
    cls = component_class(source, spec, trust)
    # Outside of `quiet`: a download shows its progress.
    weights = checked_weights(source, spec, trust) if issubclass(cls, torch.nn.Module) else None
    with quiet(), _explained(spec, folder):
        if weights is None:
            return processors.load_plain(cls, folder)
        return _model(cls, folder, weights, placement, trust)


def component_class(source: Source, spec: ComponentInfo, trust: Trust) -> type:
    """The class that the index names. Raises LoadError if the library has none of that name, or if it is code of the
    model's own and `trust` does not allow it."""
    folder = Path(source.folder) / spec.subfolder
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    custom = bool(config.get("auto_map")) or not installed_library(spec.library)
    if custom and not trust.remote_code:
        raise LoadError(
            f"component {spec.name!r} asks for code that is not part of diffusers or transformers "
            f"({spec.library}.{spec.class_name} in {folder}); allow it only if you trust its author "
            "(--allow-remote-code)",
            field="model",
        )
    found = _installed_class(spec) if installed_library(spec.library) else None
    if isinstance(found, type):
        return found
    if custom:
        return _custom_class(folder, spec, config)
    import diffusers
    import transformers

    raise LoadError(
        f"component {spec.name!r}: {spec.library} has no class {spec.class_name!r} here "
        f"(diffusers {diffusers.__version__}, transformers {transformers.__version__})",
        field="model",
    )


def _installed_class(spec: ComponentInfo) -> Any:
    import diffusers
    import transformers

    if spec.library == "transformers":
        with quiet():
            return getattr(transformers, spec.class_name, None) or processors.renamed(spec.class_name)
    library = diffusers if spec.library == "diffusers" else getattr(diffusers.pipelines, spec.library, None)
    return getattr(library, spec.class_name, None)


def _custom_class(folder: Path, spec: ComponentInfo, config: dict[str, Any]) -> type:
    """A class from a Python file in the component's folder; the caller has checked that this is allowed."""
    from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module

    references = [str(value) for value in (config.get("auto_map") or {}).values()]
    module = next((ref.rsplit(".", 1)[0] for ref in references if ref.endswith(f".{spec.class_name}")), spec.library)
    file = f"{module.split('--')[-1]}.py"
    if not (folder / file).is_file():
        raise LoadError(f"component {spec.name!r}: {spec.class_name!r} should be in {folder / file}", field="model")
    found: Any = get_class_from_dynamic_module(
        str(folder), module_file=file, class_name=spec.class_name, local_files_only=True, trust_remote_code=True
    )
    return found


def checked_weights(source: Source, spec: ComponentInfo, trust: Trust) -> WeightFiles:
    """The component's weight files, fetched if need be, all there and whole. Raises LoadError; reads headers only."""
    folder = Path(source.folder) / spec.subfolder
    weights = weights_of(source, spec.subfolder)
    if weights is None:
        raise LoadError(f"component {spec.name!r}: no weights in {folder} (expected *.safetensors)", field="model")
    if weights.pickle and not trust.pickle_weights:
        raise LoadError(
            f"component {spec.name!r}: {folder} has weights only as a pickle ({weights.files[0]}), which can run code "
            "when read; convert it to safetensors, or allow it if you trust its author (--allow-pickle)",
            field="model",
        )
    fetch_weights(source, spec)
    if weights.pickle:
        return weights
    if weights.index:
        for file, tensors in read_shards(folder / weights.index).items():
            lacking = set(tensors) - set(_header_of(folder, file, spec).tensors)
            if lacking:
                raise LoadError(f"{folder / file} lacks tensors of {weights.index}: {_some(lacking)}", field="model")
    for file in weights.files:
        _header_of(folder, file, spec)
    return weights


def _header_of(folder: Path, file: str, spec: ComponentInfo) -> Any:
    if not (folder / file).is_file():
        raise LoadError(f"component {spec.name!r}: the weights file {folder / file} is missing", field="model")
    return read_header(folder / file)


def _some(names: Any, most: int = 5) -> str:
    ordered = sorted(str(name) for name in names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


def _model(cls: Any, folder: Path, weights: WeightFiles, placement: Placement, trust: Trust) -> torch.nn.Module:
    """from_pretrained, with nothing left random and nothing that should have been used left over."""
    options: dict[str, Any] = {"variant": weights.variant, "output_loading_info": True, "local_files_only": True}
    options["use_safetensors"] = not weights.pickle
    options["ignore_mismatched_sizes"] = True  # so that they are listed, and refused below
    options["dtype"] = placement.dtype or _disk_dtype(folder, weights, placement.device)
    if trust.remote_code and "PreTrainedModel" in {base.__name__ for base in cls.__mro__}:
        options["trust_remote_code"] = True
    model, info = cls.from_pretrained(str(folder), **options)
    _check_fit(model, info)
    try:
        return model.eval().requires_grad_(False).to(placement.device)
    except torch.OutOfMemoryError as error:
        raise NotEnoughMemory(f"{placement.device}: {str(error).splitlines()[0]}", field="device") from error
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(f"{placement.device}: {str(error).splitlines()[0]}", field="device") from error


def _disk_dtype(folder: Path, weights: WeightFiles, device: torch.device) -> torch.dtype:
    if device.type == "cpu" or weights.pickle:
        return torch.float32
    elements: Counter[str] = Counter()
    for file in weights.files:
        elements.update(read_header(folder / file).elements)
    dtype = getattr(torch, prevailing(elements) or "float32", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


def _check_fit(model: torch.nn.Module, info: dict[str, Any]) -> None:
    """Raises LoadError for tensors that the files lack, have in another shape, or have beyond the class.

    Left-over tensors are tolerated only where the class has no such part at all (a language model's head when only
    its body is wanted) or recomputes it (a buffer that is not saved any more).
    """
    missing, mismatched = set(info.get("missing_keys", ())), list(info.get("mismatched_keys", ()))
    if mismatched:
        raise LoadError(f"the weights do not fit the configuration: {_some([_mismatch(each) for each in mismatched])}")
    missing = missing or {name for name, tensor in model.named_parameters() if tensor.is_meta}
    if missing:
        raise LoadError(f"the weights lack {_some(missing)}")
    parts, buffers = {name for name, _ in model.named_children()}, {name for name, _ in model.named_buffers()}
    left = {name for name in info.get("unexpected_keys", ()) if name not in buffers}
    wrong = {name for name in left if name.split(".")[0] in parts}
    if wrong:
        raise LoadError(f"the weights hold what the configuration has no place for: {_some(wrong)}")
    if left:
        logger.info("%s leaves unused: %s", type(model).__name__, _some(left))


def _mismatch(entry: Any) -> str:
    name, *shapes = entry if isinstance(entry, (tuple, list)) else (entry,)
    return f"{name} {' in place of '.join(str(tuple(shape)) for shape in shapes)}".strip()


def meta_component(source: Source, spec: ComponentInfo, trust: Trust = NO_TRUST) -> Any:
    """The component built from its configuration on the meta device: right in its settings, without any weights. What
    has no weights anyway (a tokenizer, a scheduler) is loaded. Raises LoadError."""
    folder = Path(source.folder) / spec.subfolder
    cls: Any = component_class(source, spec, trust)
    if not issubclass(cls, torch.nn.Module):
        with quiet(), _explained(spec, folder):
            return processors.load_plain(cls, folder)
    return _without_weights(cls, spec, folder)


def component_config(source: Source, spec: ComponentInfo, trust: Trust = NO_TRUST) -> dict[str, Any]:
    """A model's settings: its config.json over its class' defaults. Cheaper than the model without its weights.
    Raises LoadError."""
    folder = Path(source.folder) / spec.subfolder
    cls = component_class(source, spec, trust)
    if not (folder / "config.json").is_file():
        raise LoadError(f"component {spec.name!r}: no config.json in {folder}", field="model")
    declared = inspect.signature(cls.__init__).parameters.values()
    defaults = {item.name: item.default for item in declared if item.default is not inspect.Parameter.empty}
    return {**defaults, **read_json(folder / "config.json")}


def _without_weights(cls: Any, spec: ComponentInfo, folder: Path) -> torch.nn.Module:
    with quiet(), _explained(spec, folder):
        if not (folder / "config.json").is_file():
            raise LoadError(f"no config.json in {folder}")
        with torch.device("meta"):
            if hasattr(cls, "load_config"):
                model = cls.from_config(cls.load_config(str(folder), local_files_only=True))
            else:
                model = cls._from_config(cls.config_class.from_pretrained(str(folder), local_files_only=True))
        return model.eval().requires_grad_(False)


@contextmanager
def _explained(spec: ComponentInfo, folder: Path) -> Iterator[None]:
    """Turns whatever a library raises into a LoadError that names the component."""
    try:
        yield
    except TriptychError as error:
        if error.field is None:
            raise LoadError(f"component {spec.name!r} in {folder}: {error.message}", field="model") from error
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise LoadError(
            f"component {spec.name!r} in {folder}: {type(error).__name__}: {' '.join(lines[:3])[:400]}", field="model"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """diffusers and transformers without their progress bars and warnings, in one thread at a time; both are as they
    were afterwards."""
    from diffusers.utils import logging as diffusers_log
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging as transformers_log

    with _one_at_a_time:
        hub_shows_none = are_progress_bars_disabled()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with _hushed(diffusers_log), _hushed(transformers_log):
                    yield
            finally:
                if hub_shows_none:  # transformers switches the hub's bars together with its own
                    disable_progress_bars()


@contextmanager
def _hushed(log: Any) -> Iterator[None]:
    """One library's logging module, at its quietest."""
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


@dataclass
class Components:
    """The components of one model that this process holds, each loaded once per placement and shared by its stages.
    Stages may ask from several threads."""

    source: Source
    trust: Trust = NO_TRUST
    _placed: dict[tuple[str, Placement], Any] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def get(self, spec: ComponentInfo, placement: Placement) -> Any:
        """The component, loaded now if it was not. Raises LoadError."""
        key = (spec.name, placement)
        with self._lock:
            if key not in self._placed:
                self._placed[key] = load_component(self.source, spec, placement, self.trust)
            return self._placed[key]

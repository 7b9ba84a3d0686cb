"""A pipeline folder's table of contents: model_index.json, or modular_model_index.json where only that exists."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triptych.errors import LoadError, ModelNotFound, Unsupported
from triptych.model.checkpoint import read_json
from triptych.model.topology import Source
from triptych.model.trust import Trust

INDEX_FILES = ("model_index.json", "modular_model_index.json")


@dataclass(frozen=True)
class Entry:
    """A component as the index names it. `subfolder` is relative to the model's folder."""

    name: str
    library: str
    class_name: str
    subfolder: str


@dataclass(frozen=True)
class PipelineIndex:
    """What the index says: the pipeline's class, its components without those left out ([null, null]), and its
    plain settings (boundary_ratio, expand_timesteps, …)."""

    file: str
    class_name: str
    entries: dict[str, Entry]
    settings: dict[str, Any] = field(default_factory=dict)


def read_index(source: Source, trust: Trust | None = None) -> PipelineIndex:
    """Reads the index. Raises ModelNotFound if the folder has none, LoadError if it is malformed or, unless `trust`
    allows it (None: don't check), names code that is not part of an installed library."""
    folder = Path(source.folder)
    file = next((name for name in INDEX_FILES if (folder / name).is_file()), None)
    if file is None:
        raise ModelNotFound(f"{source.name} has no {' or '.join(INDEX_FILES)}: not a diffusers folder", field="model")
    content = read_json(folder / file)
    class_name = content.get("_class_name")
    if isinstance(class_name, list) and trust is not None and not trust.remote_code:
        raise _remote_code(folder / file, f"a pipeline of its own, {class_name}")
    entries, settings = {}, {}
    for name, value in content.items():
        if name.startswith("_"):
            continue
        if not isinstance(value, list) or len(value) not in (2, 3) or not _names(value[:2]):
            settings[name] = value
        elif value[0] is not None or value[1] is not None or _type_hint(value):
            entries[name] = _entry(source, name, value)
    index = PipelineIndex(file, _last(class_name), entries, settings)
    if trust is not None and not trust.remote_code:
        _check_code(folder, index)
    return index


def _names(pair: list[Any]) -> bool:
    return all(part is None or isinstance(part, str) for part in pair)


def _last(class_name: Any) -> str:
    return str(class_name[-1] if isinstance(class_name, list) and class_name else class_name or "")


def _type_hint(value: list[Any]) -> tuple[str, str] | None:
    """The library and class in a modular entry's third element."""
    hint = value[2].get("type_hint") if len(value) == 3 and isinstance(value[2], dict) else None
    return (str(hint[0]), str(hint[1])) if isinstance(hint, (list, tuple)) and len(hint) == 2 and all(hint) else None


def _entry(source: Source, name: str, value: list[Any]) -> Entry:
    library, class_name = value[0], value[1]
    subfolder = name
    if len(value) == 3 and isinstance(value[2], dict):
        library, class_name = _type_hint(value) or (library, class_name)
        subfolder = value[2].get("subfolder") or name
        origin = value[2].get("pretrained_model_name_or_path")
        if origin not in (None, "", source.name) and not (Path(source.folder) / subfolder).is_dir():
            raise Unsupported(f"component {name!r} lies in another repository, {origin!r}", field="model")
    if library is None or class_name is None:
        raise LoadError(f"component {name!r} has no class: {value[:2]}", field="model")
    if Path(subfolder).is_absolute() or ".." in Path(subfolder).parts:
        raise LoadError(f"component {name!r} lies outside the model's folder: {subfolder!r}", field="model")
    return Entry(name, library, class_name, subfolder)


def _check_code(folder: Path, index: PipelineIndex) -> None:
    """Refuses an index or a component's config that would have code from the folder run."""
    for entry in index.entries.values():
        if not installed_library(entry.library):
            raise _remote_code(folder / index.file, f"{entry.name} of class {entry.library}.{entry.class_name}")
        config = folder / entry.subfolder / "config.json"
        if config.is_file() and read_json(config).get("auto_map"):
            raise _remote_code(config, "auto_map")
    for file in ("config.json", "modular_config.json"):
        if (folder / file).is_file() and read_json(folder / file).get("auto_map"):
            raise _remote_code(folder / file, "auto_map")


def _remote_code(file: Path, what: str) -> LoadError:
    return LoadError(
        f"{file} asks for code that is not part of diffusers or transformers ({what}); allow it only if you trust "
        "its author (--allow-remote-code)",
        field="model",
    )


def installed_library(library: str) -> bool:
    """Whether an index's library name means diffusers, transformers, or a package of diffusers' own pipelines."""
    if library in ("diffusers", "transformers"):
        return True
    spec = importlib.util.find_spec("diffusers")
    places = spec.submodule_search_locations if spec else None
    return library.isidentifier() and any((Path(place) / "pipelines" / library).is_dir() for place in places or ())

"""Which of a model's weights `generate` would refuse, told from the names of files alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from triptych.errors import LoadError

if TYPE_CHECKING:
    from triptych.model import ComponentInfo, Topology, Trust

__all__ = ["check_weights", "refused_weights"]

_SAFE = ".safetensors"


def refused_weights(topology: Topology, trust: Trust) -> list[str]:
    """One sentence for each component whose weights are missing, or there only as a pickle that `trust` refuses. Of a
    hub model, files that are still there count as present."""
    loaded = dict.fromkeys(name for stage in topology.stages for name in stage.loads)
    infos = (topology.components[name] for name in loaded if name in topology.components)
    problems = ((info.name, _problem(topology, info, trust)) for info in infos)
    return [f"component {name!r}: {problem}" for name, problem in problems if problem]


def check_weights(topology: Topology, trust: Trust) -> None:
    """Raises LoadError for the first of them: nobody should wait for other weights to be loaded before an error."""
    for problem in refused_weights(topology, trust):
        raise LoadError(problem, field="model")


def _problem(topology: Topology, info: ComponentInfo, trust: Trust) -> str | None:
    folder = Path(topology.source.folder)
    place = folder / info.subfolder
    if not info.files:
        return f"no weights in {place} (expected *{_SAFE})" if _needs_weights(info, place) else None
    if not info.files[0].endswith(_SAFE) and not trust.pickle_weights:
        return (
            f"{place} has weights only as a pickle ({Path(info.files[0]).name}), which can run code when read; convert "
            "it to safetensors, or allow it if you trust its author (--allow-pickle)"
        )
    missing = [name for name in info.files if not (folder / name).is_file()]
    if missing and topology.source.kind != "hub":
        return f"the file {Path(missing[0]).name} is missing in {place}"
    return None


def _needs_weights(info: ComponentInfo, folder: Path) -> bool:
    """Whether the component's class is a network; False for a class that cannot be told."""
    # Tokenizers, schedulers and processors have no config.json: their classes need not be imported.
    if folder.is_dir() and not (folder / "config.json").is_file():
        return False
    import diffusers
    import torch
    import transformers

    library = {"diffusers": diffusers, "transformers": transformers}.get(info.library)
    cls = getattr(library, info.class_name, None)
    return isinstance(cls, type) and issubclass(cls, torch.nn.Module)

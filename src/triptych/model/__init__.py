"""Models: opened from a name, described as a topology, loaded and run stage by stage.

Names are resolved on first use, so that importing this package costs no torch.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych.model.boundary import SAMPLE_PROMPT, BoundaryTensor, boundary
    from triptych.model.describe import describe
    from triptych.model.load import Components, Placement, load_component, meta_component
    from triptych.model.open import component_infos, embedded_models, open_model
    from triptych.model.program import StageProgram, Step, TaskInputs, TaskOutputs
    from triptych.model.programs import program
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
    from triptych.model.trust import Trust
    from triptych.model.unsplit import unsplit

_HOMES = {
    "boundary": ("SAMPLE_PROMPT", "BoundaryTensor", "boundary"),
    "describe": ("describe",),
    "load": ("Components", "Placement", "load_component", "meta_component"),
    "open": ("component_infos", "embedded_models", "open_model"),
    "program": ("StageProgram", "Step", "TaskInputs", "TaskOutputs"),
    "programs": ("program",),
    "topology": (
        "STAGES",
        "ComponentInfo",
        "Defaults",
        "InputInfo",
        "Port",
        "Source",
        "StageName",
        "StageTopology",
        "Topology",
    ),
    "trust": ("Trust",),
    "unsplit": ("unsplit",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "SAMPLE_PROMPT",
    "STAGES",
    "BoundaryTensor",
    "ComponentInfo",
    "Components",
    "Defaults",
    "InputInfo",
    "Placement",
    "Port",
    "Source",
    "StageName",
    "StageProgram",
    "StageTopology",
    "Step",
    "TaskInputs",
    "TaskOutputs",
    "Topology",
    "Trust",
    "boundary",
    "component_infos",
    "describe",
    "embedded_models",
    "load_component",
    "meta_component",
    "open_model",
    "program",
    "unsplit",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Room(types.ModuleType):
    """Keeps the exported functions `describe` and `program` from being shadowed by the submodules of those names,
    which Python binds here whenever they are first imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME_OF and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Room

"""Models: opened from a name, described as a topology, loaded and run stage by stage.

Names are resolved on first use, so that importing this package costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych.model.contract import StageProgram, Step, TaskInputs, TaskOutputs
    from triptych.model.crossings import SAMPLE_PROMPT, BoundaryTensor, boundary
    from triptych.model.description import describe
    from triptych.model.door import Resolved, resolve
    from triptych.model.infos import component_infos
    from triptych.model.load import Components, Placement, load_component, meta_component
    from triptych.model.open import embedded_models, open_model
    from triptych.model.programs import program, unsplit
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

_HOMES = {
    "door": ("Resolved", "resolve"),
    "crossings": ("SAMPLE_PROMPT", "BoundaryTensor", "boundary"),
    "description": ("describe",),
    "load": ("Components", "Placement", "load_component", "meta_component"),
    "infos": ("component_infos",),
    "open": ("embedded_models", "open_model"),
    "contract": ("StageProgram", "Step", "TaskInputs", "TaskOutputs"),
    "programs": ("program", "unsplit"),
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
    "Resolved",
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
    "resolve",
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

"""Models: opened from a name, described as a topology, loaded and run stage by stage.

Names are resolved on first use, so that importing this package costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych.model.contract import LateInputs, Pause, StageProgram, Step, TaskInputs, TaskOutputs
    from triptych.model.course import CHECKPOINT, CHECKPOINT_VALUES, check_checkpoint
    from triptych.model.crossings import SAMPLE_PROMPT, BoundaryTensor, boundary
    from triptych.model.description import describe
    from triptych.model.digest import model_digest
    from triptych.model.door import Resolved, made_size, resolve
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
    from triptych.model.topology_codec import topology_from_bytes, topology_to_bytes
    from triptych.model.trust import Trust
    from triptych.model.vae_call import (
        Extent,
        VaeCall,
        VaeOptions,
        check_memory,
        extent_of,
        picture_call,
        vae_stage,
    )

_HOMES = {
    "door": ("Resolved", "made_size", "resolve"),
    "crossings": ("SAMPLE_PROMPT", "BoundaryTensor", "boundary"),
    "description": ("describe",),
    "digest": ("model_digest",),
    "load": ("Components", "Placement", "load_component", "meta_component"),
    "infos": ("component_infos",),
    "open": ("embedded_models", "open_model"),
    "contract": ("LateInputs", "Pause", "StageProgram", "Step", "TaskInputs", "TaskOutputs"),
    "course": ("CHECKPOINT", "CHECKPOINT_VALUES", "check_checkpoint"),
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
    "topology_codec": ("topology_from_bytes", "topology_to_bytes"),
    "trust": ("Trust",),
    "vae_call": ("Extent", "VaeCall", "VaeOptions", "check_memory", "extent_of", "picture_call", "vae_stage"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "CHECKPOINT",
    "CHECKPOINT_VALUES",
    "SAMPLE_PROMPT",
    "STAGES",
    "BoundaryTensor",
    "ComponentInfo",
    "Components",
    "Defaults",
    "Extent",
    "InputInfo",
    "LateInputs",
    "Pause",
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
    "VaeCall",
    "VaeOptions",
    "boundary",
    "check_checkpoint",
    "check_memory",
    "component_infos",
    "describe",
    "embedded_models",
    "extent_of",
    "load_component",
    "made_size",
    "meta_component",
    "model_digest",
    "open_model",
    "picture_call",
    "program",
    "resolve",
    "topology_from_bytes",
    "topology_to_bytes",
    "unsplit",
    "vae_stage",
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

"""Options that several commands take, each declared once. Their defaults are the commands' own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from triptych.errors import InvalidRequest

__all__ = [
    "AllowPickle",
    "AllowRemoteCode",
    "Device",
    "Dtype",
    "Findings",
    "Model",
    "ModelPath",
    "Offline",
    "PreviewVae",
    "Revision",
    "Threads",
    "Workflow",
    "chosen_model",
]

Model = Annotated[str, typer.Argument(help="An embedded model, a diffusers folder or a hub id.")]
ModelPath = Annotated[str | None, typer.Option(metavar="MODEL", help="The same as the argument, as cache-dit has it.")]
Workflow = Annotated[str | None, typer.Option(help="What to ask of a model that does several things.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, xpu or mps; with an index such as xpu:1.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16.", show_default="as on disk, float32 on a CPU")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never go to the hub.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Load weights that can run code when read.")]
AllowRemoteCode = Annotated[bool, typer.Option("--allow-remote-code", help="Run Python code from the model.")]
PreviewVae = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="A tiny VAE (such as TAESD) to make previews with.")
]
Findings = Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")]


def chosen_model(model: str | None, model_path: str | None, default: str) -> str:
    """The model that was named, in either way. Raises InvalidRequest for two that differ."""
    if model is not None and model_path is not None and model != model_path:
        raise InvalidRequest.of("model-path", model_path, f"the model that was named before it, {model!r}, or only one")
    named = model if model is not None else model_path
    return default if named is None else named

"""Options that several commands take, each declared once. Their defaults are the commands' own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "AllowPickle",
    "AllowRemoteCode",
    "Device",
    "Dtype",
    "Findings",
    "Model",
    "Offline",
    "PreviewVae",
    "Revision",
    "Threads",
    "Workflow",
]

Model = Annotated[str, typer.Argument(help="An embedded model, a diffusers folder or a hub id.")]
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

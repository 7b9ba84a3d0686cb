"""`triptych generate`: a picture or a clip from a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from triptych.cli.generation import DEFAULT_MODEL, Asked, Opening, parse_extra, parse_numbers, run
from triptych.cli.options import AllowPickle, AllowRemoteCode, Device, Dtype, Offline, Revision, Workflow

__all__ = ["generate"]


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to make. Needed unless --like is given.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="An embedded model, a diffusers folder or a hub id.",
            show_default=DEFAULT_MODEL,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The .png, .webp, .jpg or .mp4 (clips) to write; several become name-0, name-1…",
            show_default="triptych-SEED.png",
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", help="A picture to start from; repeat for several."),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option("--mask", help="Where to paint: white is painted anew."),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to keep away from.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    aspect_ratio: Annotated[str | None, typer.Option(help="Such as 16:9, instead of a size.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames of a clip.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Denoising steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="How closely to follow the prompt.")] = None,
    shift: Annotated[float | None, typer.Option(help="The noise schedule's shift.")] = None,
    sigmas: Annotated[str | None, typer.Option(help="The noise schedule itself: 1,0.75,0.5,0.25")] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="The same seed gives the same picture.", show_default="random"),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="How far to go from the given picture, 0 to 1."),
    ] = None,
    max_sequence_length: Annotated[int | None, typer.Option(help="Tokens of the prompt that are read.")] = None,
    extra: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=JSON",
            help="An input that only this model has; repeatable.",
        ),
    ] = None,
    number: Annotated[
        int | None,
        typer.Option("--number", "-n", help="Outputs.", show_default="1"),
    ] = None,
    workflow: Workflow = None,
    layout: Annotated[str, typer.Option(help="fused (one process), split (one a stage), or a layout file.")] = "fused",
    device: Device = "auto",
    dtype: Dtype = None,
    revision: Revision = None,
    offline: Offline = False,
    allow_pickle: AllowPickle = False,
    allow_remote_code: AllowRemoteCode = False,
    no_metadata: Annotated[
        bool,
        typer.Option("--no-metadata", help="Leave the settings out of the file."),
    ] = False,
    like: Annotated[
        Path | None,
        typer.Option(help="Repeat the settings in this file; other options override."),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Draw the picture in the terminal.")] = False,
    preview: Annotated[
        Path | None,
        typer.Option(help="A picture file to refresh after each step."),
    ] = None,
    preview_vae: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="A tiny VAE (such as TAESD) to decode previews with, at full size.",
            show_default="a linear map",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no times.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Make a picture or a clip from a prompt.

    Prints the path of each file it has written. Its settings are kept inside the file, for --like.
    """
    fields = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "width": width,
        "height": height,
        "aspect_ratio": aspect_ratio,
        "num_frames": num_frames,
        "fps": fps,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "shift": shift,
        "sigmas": parse_numbers("sigmas", sigmas),
        "seed": seed,
        "num_outputs": number,
        "strength": strength,
        "max_sequence_length": max_sequence_length,
        "extra": parse_extra(extra or []),
    }
    run(
        Asked(
            fields={name: value for name, value in fields.items() if value is not None},
            images=tuple(image or ()),
            mask=mask,
            like=like,
            opening=Opening(
                model=model,
                workflow=workflow,
                layout=layout,
                device=device,
                dtype=dtype,
                revision=revision,
                offline=offline,
                allow_pickle=allow_pickle,
                allow_remote_code=allow_remote_code,
                preview_vae=preview_vae,
            ),
            output=output,
            preview=preview,
            metadata=not no_metadata,
            show=show,
            quiet=quiet,
            as_json=as_json,
        )
    )

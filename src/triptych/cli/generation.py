"""What `triptych generate` does once its command line is read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych import __version__
from triptych.cli.console import Display, note, times_table, warn
from triptych.cli.targets import FORMATS, Target, check_writable, write
from triptych.cli.weights import check_weights
from triptych.errors import InvalidRequest

if TYPE_CHECKING:
    from PIL import Image

    from triptych import Engine, Request, Result, Trust
    from triptych.decode import Settings
    from triptych.request import Clip

__all__ = ["DEFAULT_MODEL", "Asked", "Opening", "parse_extra", "parse_numbers", "run"]

DEFAULT_MODEL = "emoji"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True)
class Opening:
    """Which model to open, and how. `model` None: the settings' of `--like`, else the default."""

    model: str | None
    workflow: str | None
    device: str
    dtype: str | None
    revision: str | None
    offline: bool
    allow_pickle: bool
    allow_remote_code: bool
    preview_vae: Path | None = None
    layout: str = "fused"

    def completed(self, settings: Settings | None) -> Opening:
        """With what the settings say where the person said nothing. What is allowed is never theirs to say.
        Raises InvalidRequest if the model is needed and they cannot name it."""
        if settings is None:
            return replace(self, model=DEFAULT_MODEL if self.model is None else self.model)
        return replace(
            self,
            model=_model_of(settings) if self.model is None else self.model,
            revision=self.revision or (settings.revision if self.model is None else None),
            workflow=self.workflow or settings.workflow,
            dtype=self.dtype or settings.dtype,
        )

    @property
    def trust(self) -> Trust:
        """What the person allows."""
        from triptych import Trust

        return Trust(pickle_weights=self.allow_pickle, remote_code=self.allow_remote_code)

    def check(self, request: Request, target: Target) -> None:
        """Looks at the model without reading a weight: would it serve the request? Loading can take minutes,
        and nobody should wait them for an error. Raises TriptychError."""
        from triptych.config import Layout
        from triptych.device import free_bytes, pick_device, pick_dtype
        from triptych.model import describe, open_model, resolve

        assert self.model is not None
        layout = Layout.of(self.layout)
        device = pick_device(self.device)
        pick_dtype(self.dtype, device)
        source = open_model(self.model, revision=self.revision, offline=self.offline, trust=self.trust)
        topology = describe(source, self.workflow, self.trust)
        layout.check([part.name for part in topology.stages])
        target.check_makes(topology.makes)
        resolve(topology, request, free_bytes(device))
        check_weights(topology, self.trust)

    def open(self, display: Display) -> Engine:
        """Opens it, showing what is loaded. Raises TriptychError."""
        from triptych import Engine

        assert self.model is not None
        return Engine.open(
            self.model,
            workflow=self.workflow,
            device=self.device,
            dtype=self.dtype,
            revision=self.revision,
            offline=self.offline,
            trust=self.trust,
            preview_vae=None if self.preview_vae is None else str(self.preview_vae),
            layout=self.layout,
            report=display.loaded,
        )


@dataclass(frozen=True)
class Asked:
    """A command line, read but not yet checked. `fields` are those of the request that were given."""

    fields: dict[str, Any]
    images: tuple[Path, ...]
    mask: Path | None
    like: Path | None
    opening: Opening
    output: Path | None
    preview: Path | None
    metadata: bool
    show: bool
    quiet: bool
    as_json: bool


def run(asked: Asked) -> None:
    """Makes what was asked and writes it. Raises TriptychError, with nothing written."""
    # What can be wrong without a model is looked at first, and what needs no torch before that.
    target = Target.of(asked.output)
    _check_preview(asked.preview, asked.opening.preview_vae)
    settings = _settings(asked.like)
    fields = _fields(asked, settings)
    differing = _differing(settings, fields) if settings else []
    if asked.output is None and asked.like is not None:
        target = Target.of(None, FORMATS.get(asked.like.suffix.lower()))
    request = _request({**fields, "output_format": target.format})
    opening = asked.opening.completed(settings)
    with Display(quiet=asked.quiet) as display:
        # Nothing is said until all is checked: an error is the only line then.
        opening.check(request, target)
        for text in differing:
            warn(text)
        display.say(f"opening {opening.model}")
        with opening.open(display) as engine:
            result = _stream(engine, request, display, asked.preview)
            made = _write(engine, result, target, opening, asked, settings)
    _tell(result, [path for path, _ in made], asked)
    if asked.show:
        _draw([output for _, output in made])


def parse_numbers(field: str, text: str | None) -> tuple[float, ...] | None:
    """Numbers separated by commas. Raises InvalidRequest."""
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        raise InvalidRequest.of(field, text, "numbers separated by commas, such as 1,0.75,0.5")
    return numbers


def parse_extra(items: Sequence[str]) -> dict[str, Any] | None:
    """KEY=JSON items as a dict, None if there are none. Raises InvalidRequest."""
    found: dict[str, Any] = {}
    for item in items:
        key, sign, value = item.partition("=")
        if not key or not sign or key in found:
            raise InvalidRequest.of("extra", item, "KEY=JSON, each key once")
        try:
            found[key] = json.loads(value)
        except ValueError:
            raise InvalidRequest.of("extra", item, 'KEY=JSON, such as size=3 or name="text"') from None
    return found or None


def _check_preview(path: Path | None, vae: Path | None) -> None:
    if vae is not None and (path is None or not (vae / "config.json").is_file()):
        allowed = "with --preview, a folder with a VAE's config.json and weights"
        raise InvalidRequest.of("preview_vae", str(vae), allowed)
    if path is None:
        return
    allowed = [suffix for suffix, format in FORMATS.items() if format != "mp4"]
    if path.suffix.lower() not in allowed:
        raise InvalidRequest.of("preview", str(path), f"a file name ending in {', '.join(allowed)}")
    check_writable(path, field="preview")


def _settings(like: Path | None) -> Settings | None:
    if like is None:
        return None
    from triptych.decode import read_settings

    return read_settings(like)


def _model_of(settings: Settings) -> str:
    """The settings' model, as far as a file may name one: an embedded model or a hub id, never a path."""
    from triptych.model import embedded_models

    name = settings.model
    if settings.source == "embedded" and name in embedded_models():
        return name
    if settings.source == "hub" and _HUB_ID.fullmatch(name) and ".." not in name and not Path(name).exists():
        return name
    raise InvalidRequest.of("model", name, f"(for a {settings.source} model of --like) naming it with -m")


def _fields(asked: Asked, settings: Settings | None) -> dict[str, Any]:
    """The request's fields: the settings' where there are some, what was given over them, and the
    pictures."""
    from triptych.decode import read_image, read_mask, repeat_settings

    fields = repeat_settings(settings, asked.fields) if settings else dict(asked.fields)
    if "prompt" not in fields:
        raise InvalidRequest.of("prompt", None, "a text, or --like FILE")
    fields["images"] = tuple(read_image(path, field="images") for path in asked.images)
    fields["mask"] = read_mask(asked.mask) if asked.mask else None
    return fields


def _differing(settings: Settings, fields: dict[str, Any]) -> list[str]:
    """A warning for each kind of pictures that are not the settings' own. Raises InvalidRequest if the settings had
    pictures and none are given."""
    from triptych.decode import digest

    given = {"images": fields["images"], "mask": (fields["mask"],) if fields["mask"] else ()}
    known = {"images": settings.images, "mask": (settings.mask,) if settings.mask else ()}
    warnings = []
    for field, pictures in given.items():
        if known[field] and not pictures:
            raise InvalidRequest.of(field, "none", f"the {len(known[field])} that --like was made with")
        if pictures and [digest(picture) for picture in pictures] != list(known[field]):
            warnings.append(f"{field}: not what --like was made with; the result will differ")
    return warnings


def _request(fields: dict[str, Any]) -> Request:
    from triptych import Request
    from triptych.decode import check_fps

    request = Request.parse(**fields)
    if request.fps is not None:
        check_fps(request.fps)
    return request


def _stream(engine: Engine, request: Request, display: Display, preview: Path | None) -> Result:
    """Runs the request to its end; leaving early, by Ctrl-C too, cancels it."""
    from triptych import Progress
    from triptych.decode import write_image

    job = engine.submit(request, preview=preview is not None)
    try:
        for event in job.events():
            if not isinstance(event, Progress):
                return event
            display.update(event)
            if preview is not None and event.preview is not None:
                write_image(event.preview, preview)
    finally:
        job.cancel()
    raise AssertionError("a job ends with its result or an error")


def _write(
    engine: Engine,
    result: Result,
    target: Target,
    opening: Opening,
    asked: Asked,
    settings: Settings | None,
) -> list[tuple[Path, Image.Image | Clip]]:
    """Writes the outputs, each with its settings: all of them, or the one that the file of --like holds."""
    chosen = list(range(len(result.outputs)))
    if settings is not None and "num_outputs" not in asked.fields and settings.output in chosen:
        chosen = [settings.output]
    outputs = [result.outputs[index] for index in chosen]
    texts = [_metadata(engine, result, index, opening) if asked.metadata else None for index in chosen]
    paths = target.paths(len(chosen), engine.topology.makes, result.request.seed or 0)
    write(outputs, paths, texts)
    return list(zip(paths, outputs, strict=True))


def _metadata(engine: Engine, result: Result, index: int, opening: Opening) -> str | None:
    from triptych.decode import encode_settings, settings_of

    source = engine.topology.source
    try:
        settings = settings_of(
            result,
            version=__version__,
            source=source.kind,
            revision=source.revision,
            dtype=opening.dtype,
            output=index,
        )
        return encode_settings(settings)
    except InvalidRequest as error:
        # What was made is worth more than what it says of itself.
        warn(f"written without its settings: {error}")
        return None


def _tell(result: Result, paths: Sequence[Path], asked: Asked) -> None:
    for text in result.warnings:
        warn(text)
    if not asked.quiet:
        note(times_table(result.times))
    if not asked.as_json:
        for path in paths:
            print(path)
        return
    request = result.request.model_dump(mode="json", exclude={"images", "mask"}, exclude_none=True)
    made = {
        "outputs": [str(path) for path in paths],
        "model": result.model,
        "workflow": result.workflow,
        "seed": result.request.seed,
        "request": request,
        "times": [asdict(time) for time in result.times],
        "warnings": list(result.warnings),
    }
    print(json.dumps(made))


def _draw(outputs: Sequence[Image.Image | Clip]) -> None:
    """Draws pictures, and the first frame of clips, on standard output."""
    from PIL import Image
    from rich.console import Console

    from triptych.cli.show import show
    from triptych.request import Clip

    console = Console()
    for output in outputs:
        picture = Image.fromarray(output.frames[0]) if isinstance(output, Clip) else output
        problem = show(picture, console)
        if problem:
            note(f"cannot draw the picture here: {problem}")
            return

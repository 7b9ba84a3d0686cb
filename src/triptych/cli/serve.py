"""`triptych serve`: a model behind a URL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triptych import __version__
from triptych.cli.console import Display, note, warn
from triptych.cli.generation import DEFAULT_MODEL
from triptych.cli.options import (
    AllowPickle,
    AllowRemoteCode,
    Dtype,
    ModelPath,
    Offline,
    PreviewVae,
    Revision,
    Workflow,
    chosen_model,
)
from triptych.errors import InvalidRequest, Unsupported

if TYPE_CHECKING:
    from triptych.config import Layout
    from triptych.server import Door

__all__ = ["serve"]

_STOPPED = 1
_NEEDED = ("fastapi", "uvicorn")
DRAIN_SECONDS = 600.0
_LONGEST_DRAIN = 7 * 24 * 3600.0


def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="An embedded model, a diffusers folder or a hub id.", show_default=DEFAULT_MODEL),
    ] = None,
    model_path: ModelPath = None,
    workflow: Workflow = None,
    layout: Annotated[str, typer.Option(help="fused, split, or a layout file.")] = "fused",
    host: Annotated[str | None, typer.Option(help="Address to answer on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="0: any free one.", show_default="8000")] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep jobs and results here: a restarted server goes on with them.",
            show_default="forgotten at the end",
        ),
    ] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="tcp://HOST:PORT", help="Where workers of other hosts join.")
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keys for --listen, made by `triptych keys`.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a timeline that Perfetto opens.")] = None,
    device: Annotated[str | None, typer.Option(help="Of every worker, as in generate.", show_default="auto")] = None,
    dtype: Dtype = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of every worker.")] = None,
    capacity: Annotated[int | None, typer.Option(help="Jobs that a stage takes at once.", show_default="4")] = None,
    drain: Annotated[
        float, typer.Option(help="Seconds that running jobs may take once it is stopped.")
    ] = DRAIN_SECONDS,
    revision: Revision = None,
    offline: Offline = False,
    allow_pickle: AllowPickle = False,
    allow_remote_code: AllowRemoteCode = False,
    preview_vae: PreviewVae = None,
) -> None:
    """Serve a model over HTTP: jobs in, pictures and clips out.

    Prints its URL once it is ready. SIGTERM or Ctrl-C finishes what runs and ends; twice stops at once.
    """
    served = chosen_model(model, model_path, DEFAULT_MODEL)
    if not 0 <= drain <= _LONGEST_DRAIN:
        raise InvalidRequest.of("drain", drain, f"0 to {_LONGEST_DRAIN:.0f} seconds")
    from triptych.config import Layout

    wanted = Layout.of(layout).overridden(
        device=device, dtype=dtype, threads=threads, capacity=capacity, listen=listen, keys=keys, host=host, port=port
    )
    options: dict[str, Any] = {
        "workflow": workflow,
        "layout": wanted,
        "state": state,
        "listen": None if wanted.listen is None else wanted.listen.endpoint,
        "keys": None if wanted.listen is None else wanted.listen.keys,
        "trace": trace,
        "revision": revision,
        "offline": offline,
        "preview_vae": None if preview_vae is None else str(preview_vae),
    }
    with Display() as display:
        run(wanted, lambda: open_engine(served, display, allow_pickle, allow_remote_code, options), drain)


def open_engine(
    model: str, display: Display, allow_pickle: bool, allow_remote_code: bool, options: dict[str, Any]
) -> Door:
    """The engine of a server: no stage runs in its process. Raises TriptychError."""
    from triptych import Engine, Trust

    trust = Trust(pickle_weights=allow_pickle, remote_code=allow_remote_code)
    display.say(f"opening {model}")
    return Engine.open(model, isolate=True, trust=trust, report=display.loaded, **options)


def run(layout: Layout, opening: Callable[[], Door], drain: float) -> None:
    """Takes the port, opens the engine, and serves until a signal. Raises TriptychError; exits with 1 where it was
    stopped before it was drained."""
    import logging
    from importlib.util import find_spec

    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise Unsupported(f"serving needs {' and '.join(missing)}: pip install 'triptych[serve]'")
    from triptych.server import bind, create_app, on_signals, serve_app

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # its starting and ending are ours to tell
    door = layout.serve
    # What the layout says; where it says nothing, a client is better off knowing at once.
    refuses_missing = layout.limits.given().get("missing_worker", "fail") == "fail"
    with bind(door.host, door.port) as sock:
        _warn_if_public(door.host)
        with on_signals(_interrupt):
            engine = opening()
            try:
                drained = serve_app(
                    create_app(engine, door, version=__version__, refuses_missing=refuses_missing),
                    sock,
                    ready=lambda url: print(f"ready: {url}", flush=True),
                    drain=lambda: engine.drain(drain),
                    tell=note,
                )
            finally:
                with on_signals(lambda number, frame: None):  # closing is short, and what is half closed stays behind
                    engine.close()
    if not drained:
        raise typer.Exit(_STOPPED)


def _warn_if_public(host: str) -> None:
    from triptych.config import is_loopback

    if not is_loopback(host):
        warn(f"{host} is reachable from other machines, and whoever reaches it may submit, see and cancel jobs")


def _interrupt(number: int, frame: Any) -> None:
    """SIGTERM like Ctrl-C, so that what is half open is closed."""
    raise KeyboardInterrupt

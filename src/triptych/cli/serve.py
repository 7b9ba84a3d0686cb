"""`triptych serve`: a model behind a URL."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triptych import __version__
from triptych.cli.console import Display, note, warn
from triptych.cli.generation import DEFAULT_MODEL
from triptych.cli.interruption import interruptible
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
    from triptych.cluster import Observer
    from triptych.config import Layout, ServeSection
    from triptych.server import Door, KeyRing

__all__ = ["serve"]

_STOPPED = 1
_NEEDED = ("fastapi", "uvicorn", "prometheus_client")
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
    api_keys: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Who may use it, made by `triptych keys api`.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Answer on a public address without API keys.")] = False,
    artifacts: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Results and checkpoints lie there, as s3://…", show_default="in --state"),
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json.", show_default="text")] = None,
    otlp: Annotated[
        str | None, typer.Option(metavar="URL", help="Send traces to this OpenTelemetry collector.")
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
    _check_installed()
    if not 0 <= drain <= _LONGEST_DRAIN:
        raise InvalidRequest.of("drain", drain, f"0 to {_LONGEST_DRAIN:.0f} seconds")
    from triptych.config import Layout

    wanted = Layout.of(layout).overridden(
        device=device, dtype=dtype, threads=threads, capacity=capacity, listen=listen, keys=keys, host=host, port=port,
        api_keys=api_keys, insecure=insecure or None, artifacts=artifacts, log_format=log_format, otlp=otlp,
    )  # fmt: skip
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
        "artifacts": wanted.serve.artifacts,
        "signed": __version__ if wanted.serve.settings_in_files else None,
        "observers": _observers(wanted.serve, served),
    }
    with Display(quiet=wanted.serve.log_format == "json") as display:
        run(wanted, lambda: open_engine(served, display, allow_pickle, allow_remote_code, options), drain)


def open_engine(
    model: str, display: Display, allow_pickle: bool, allow_remote_code: bool, options: dict[str, Any]
) -> Door:
    """The engine of a server: no stage runs in its process. Raises TriptychError."""
    from triptych import Engine, Trust

    trust = Trust(pickle_weights=allow_pickle, remote_code=allow_remote_code)
    display.say(f"opening {model}")
    return Engine.open(model, isolate=True, trust=trust, report=display.loaded, meanwhile=_import_door, **options)


def _import_door() -> None:
    """While the workers start: it would take a tenth of their time afterwards."""
    from triptych.server import create_app, serve_app  # noqa: F401


def run(layout: Layout, opening: Callable[[], Door], drain: float) -> None:
    """Takes the port, opens the engine, and serves until a signal. Raises TriptychError, and KeyboardInterrupt where it
    was told to stop before it served; exits with 1 where it was stopped before it was drained."""
    from triptych.server import bind, on_signals

    door = layout.serve
    _log_as(door.log_format)
    # What the layout says; where it says nothing, a client is better off knowing at once.
    refuses_missing = layout.limits.given().get("missing_worker", "fail") == "fail"
    with bind(door.host, door.port) as sock:
        keys = _keys(door)
        _check_address(door, sock.getsockname()[0], keys)
        with interruptible(signal.SIGTERM, signal.SIGINT) as check:
            engine = opening()
            try:
                from triptych.server import create_app, serve_app

                app = create_app(engine, door, version=__version__, keys=keys, refuses_missing=refuses_missing)
                gc.freeze()  # what is here stays; to look through it would hold up requests for a tenth of a second
                check()
                drained = serve_app(
                    app,
                    sock,
                    ready=lambda url: print(f"ready: {url}", flush=True),
                    drain=lambda: engine.drain(drain),
                    tell=_teller(door, note),
                )
            finally:
                with on_signals(lambda number, frame: None):  # closing is short, and what is half closed stays behind
                    engine.close()
    if not drained:
        raise typer.Exit(_STOPPED)


def _check_installed() -> None:
    from importlib.util import find_spec

    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise Unsupported(f"serving needs {' and '.join(missing)}: pip install 'triptych[serve]'")


def _observers(door: ServeSection, model: str) -> list[Observer]:
    from triptych.server import JobLog

    log = JobLog(door.log_prompts)
    if door.otlp is None:
        return [log]
    try:
        from triptych.server import spans_to
    except ModuleNotFoundError as error:
        raise Unsupported(f"traces need {error.name}: pip install 'triptych[otel]'", field="otlp") from None
    return [log, spans_to(door.otlp, __version__, model, door.log_prompts)]


def _log_as(format: str) -> None:
    import logging

    from triptych.server import log_formatter

    handler = logging.StreamHandler()
    handler.setFormatter(log_formatter(format))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.captureWarnings(format == "json")
    # uvicorn's starting and ending are ours to tell, what is fetched may have secrets in its URL, and torch ends with
    # the figures of its own caches.
    for name in ("uvicorn.error", "httpx", "httpcore", "urllib3", "torch"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _teller(door: ServeSection, say: Callable[[str], None]) -> Callable[[str], None]:
    """How a person is told something: by `say`, or where a program reads along, by the log."""
    import logging

    return say if door.log_format == "text" else logging.getLogger("triptych.server").warning


def _keys(door: ServeSection) -> KeyRing | None:
    if door.api_keys is None and door.api_keys_env is None:
        return None
    from triptych.server import key_ring

    return key_ring(door)


def _check_address(door: ServeSection, address: str, keys: KeyRing | None) -> None:
    """Raises InvalidRequest for an address that others reach, where nobody asks them for a key."""
    from triptych.config import is_loopback

    if keys or is_loopback(address):
        return
    if not door.insecure:
        allowed = "127.0.0.1, or any with --api-keys FILE, or with --insecure, which lets everybody in who reaches it"
        raise InvalidRequest.of("host", door.host, allowed)
    text = f"{door.host} is reachable from other machines, and whoever reaches it may submit, see and cancel jobs"
    _teller(door, warn)(text)

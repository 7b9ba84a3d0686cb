"""The command line. Nothing heavy is imported before a command runs, so that --help answers at once."""

from __future__ import annotations

import atexit
import contextlib
import gc
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from triptych import __version__
from triptych.cli.check import check
from triptych.cli.doctor import doctor
from triptych.cli.generate import generate
from triptych.cli.inspect import inspect
from triptych.cli.interruption import interruptible
from triptych.cli.keys import keys
from triptych.cli.layout import layout
from triptych.cli.replay import replay
from triptych.cli.serve import serve
from triptych.cli.status import status
from triptych.cli.worker import worker
from triptych.errors import Cancelled, TriptychError
from triptych.noise import hush

__all__ = ["app", "main"]

app = typer.Typer(
    name="triptych",
    help="Runs image and video diffusion models as three stages: encode, denoise, decode.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate)
app.command()(inspect)
app.command()(serve)
app.command()(worker)
app.command()(status)
app.add_typer(layout, name="layout")
app.add_typer(keys, name="keys")
app.command()(replay)
app.command()(check)
app.command()(doctor)

_WRONG_INPUT = 2
_INTERRUPTED = 130
_INVALID_VALUE = re.compile("^Invalid value for '([^']*)': ")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"triptych {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show a traceback with an error. Works after a command too.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (by default this process') and returns its exit code: 0; 1 for a check that did not
    pass or an error of our own; 2 for wrong input, after one line on standard error; 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    ours = given.index("--") if "--" in given else len(given)
    debug = "--debug" in given[:ours]
    given = [word for at, word in enumerate(given) if at >= ours or word != "--debug"]
    hush()
    atexit.register(gc.freeze)  # or the interpreter spends a second of its end on looking through all of torch
    try:
        with _interruptible() as check:
            code = _run(given or ["--help"])
            if code:
                check()
            return code
    except (KeyboardInterrupt, Cancelled):
        typer.echo("cancelled", err=True)
        return _INTERRUPTED
    except typer.TyperException as error:
        text = _INVALID_VALUE.sub(r"\1: ", " ".join(error.format_message().split()))
        typer.echo(f"error: {text}", err=True)
        return error.exit_code
    except TriptychError as error:
        if debug:
            raise
        typer.echo(f"error: {_line(error)}", err=True)
        return _WRONG_INPUT
    except Exception as error:
        if debug:
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        typer.echo(f"error: internal: {text} (--debug shows where)", err=True)
        return 1


def _interruptible() -> contextlib.AbstractContextManager[Callable[[], None]]:
    """Ctrl-C for whatever command; what SIGTERM does, those say that have something to leave in order."""
    if threading.current_thread() is threading.main_thread():
        return interruptible(signal.SIGINT)
    return contextlib.nullcontext(lambda: None)


def _run(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    code = command.main(args=arguments, prog_name="triptych", standalone_mode=False)
    if code == _INTERRUPTED:
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


_FLAGS = {
    "images": "--image",
    "num_inference_steps": "--steps",
    "num_outputs": "-n",
}
"""Request fields whose flag has another name."""


def _line(error: TriptychError) -> str:
    """An error as one line: the field (and its flag, where that is called otherwise), then the message."""
    message = " ".join(error.message.split())
    if error.field is None:
        return message
    flag = _FLAGS.get(error.field)
    return f"{error.field} ({flag}): {message}" if flag else f"{error.field}: {message}"

"""Ctrl-C and SIGTERM, as a command hears them."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

__all__ = ["interruptible"]


@contextlib.contextmanager
def interruptible(*signals: signal.Signals) -> Iterator[Callable[[], None]]:
    """Within it these signals raise KeyboardInterrupt, so that what is half open is closed, and whatever it then fails
    with becomes that: raised inside of an extension module it comes out as that module's own error (pydantic's
    SchemaError, while a schema is built). Inside of a finalizer it does not come out at all; what is yielded raises it
    again, for whoever is about to go on. What was ignored before, as a shell has it for what it starts in the
    background, stays ignored. For the main thread; ValueError on any other."""
    asked: list[int] = []

    def hear(number: int, frame: object) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    from triptych.server import on_signals

    with on_signals(hear, [one for one in signals if signal.getsignal(one) is not signal.SIG_IGN]):
        try:
            yield check
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of an extension module is no Exception
            if asked:
                raise KeyboardInterrupt from error
            raise

"""Ctrl-C and SIGTERM, as a command hears them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

__all__ = ["interruptible"]


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Within it SIGINT and SIGTERM raise KeyboardInterrupt, so that what is half open is closed, and it ends with
    KeyboardInterrupt whatever became of the first one: raised inside of an extension module it comes out as that
    module's own error (pydantic's SchemaError, while a schema is built). Inside of a finalizer it does not come out at
    all; what it yields raises it again. Off the main thread, which hears no signals, it changes nothing."""
    asked: list[int] = []

    def hear(number: int, frame: object) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    from triptych.server import on_signals

    with on_signals(hear):
        try:
            yield check
        except Exception as error:
            if asked:
                raise KeyboardInterrupt from error
            raise

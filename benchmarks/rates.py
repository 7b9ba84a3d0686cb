"""How many requests a second something manages while so many are in flight."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

__all__ = ["completions", "rate_of"]


def completions(run: Callable[[], object], clients: int, count: int) -> list[float]:
    """The moments at which requests ended, in order: each of `clients` threads sends the next one when its last has
    come back, until `count` have been sent. Raises the first thing that one of them raised."""
    ended: list[float] = []
    errors: list[BaseException] = []
    left = threading.Semaphore(count)

    def work() -> None:
        while not errors and left.acquire(blocking=False):
            try:
                run()
            except BaseException as error:
                errors.append(error)
                return
            ended.append(time.perf_counter())

    threads = [threading.Thread(target=work, name=f"client-{number}") for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error
    return sorted(ended)


def rate_of(ended: Sequence[float], clients: int) -> float:
    """Requests per second between the one that ended when all clients had begun and the last."""
    steady = ended[clients:]
    return (len(steady) - 1) / (steady[-1] - steady[0])

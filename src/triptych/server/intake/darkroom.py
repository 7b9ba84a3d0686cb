"""How many decoded pixels there may be at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

from triptych.decode import MAX_PIXELS

__all__ = ["Darkroom"]


class Darkroom:
    """Room for so many decoded pixels at once in this process; whoever finds none waits in line."""

    def __init__(self, pixels: int = MAX_PIXELS) -> None:
        self._free = self._all = pixels
        self._line: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def room(self, pixels: int) -> AsyncIterator[None]:
        """A block that holds pictures of so many pixels, larger ones alone."""
        wanted = min(pixels, self._all)
        turn = asyncio.get_running_loop().create_future()
        self._line.append((wanted, turn))
        self._let_in()
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self._free += wanted
            self._line = deque(one for one in self._line if one[1] is not turn)
            self._let_in()
            raise
        try:
            yield
        finally:
            self._free += wanted
            self._let_in()

    def _let_in(self) -> None:
        while self._line and self._line[0][0] <= self._free:
            wanted, turn = self._line.popleft()
            if not turn.done():
                self._free -= wanted
                turn.set_result(None)

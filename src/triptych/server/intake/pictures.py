"""Pictures that a request brings: in its body, or by a URL that the server may fetch."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from PIL import Image
from starlette.concurrency import run_in_threadpool

from triptych.decode import MAX_PIXELS, count_pixels, read_image, read_mask
from triptych.errors import InvalidRequest, MediaError

if TYPE_CHECKING:
    from triptych.server.front import Front

__all__ = ["Darkroom", "Source", "mask", "pictures"]

Source = str | bytes
"""A data URL, an http(s) URL where the deployment fetches those, or a file's bytes."""

_AT_LEAST = MAX_PIXELS // 4
"""Pixels that a picture counts for at least, so that no more than four are decoded at once."""
_ALLOWED = "a picture as data:image/…;base64,…, or as a URL where the deployment allows that"


class Darkroom:
    """Room for so many pixels to be decoded at once in this process; whoever finds none waits in line."""

    def __init__(self, pixels: int = MAX_PIXELS) -> None:
        self._free = self._all = pixels
        self._line: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def room(self, pixels: int) -> AsyncIterator[None]:
        """A block that holds a picture of so many pixels, larger ones alone."""
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


async def pictures(front: Front, sources: Sequence[Source], field: str) -> tuple[Image.Image, ...]:
    """Upright 8-bit RGB pictures. Raises InvalidRequest or MediaError naming `field[index]`."""
    most = front.settings.bounds.images
    if len(sources) > most:
        raise InvalidRequest.of(field, f"{len(sources)} pictures", f"at most {most} here")
    left = MAX_PIXELS
    found = []
    for index, source in enumerate(sources):
        picture = await _read(front, source, f"{field}[{index}]", read_image, left)
        left -= picture.width * picture.height
        found.append(picture)
    return tuple(found)


async def mask(front: Front, source: Source, field: str, *, holes: bool = False) -> Image.Image:
    """An 8-bit grey mask; `holes`: see `read_mask`. Raises InvalidRequest or MediaError naming `field`."""
    return await _read(front, source, field, partial(read_mask, holes=holes), MAX_PIXELS)


async def _read(front: Front, source: Source, field: str, read: Callable[..., Image.Image], left: int) -> Image.Image:
    if isinstance(source, str) and source[:8].lower().startswith(("http://", "https://")):
        source = await front.fetcher.fetch(source, field)
    data, pixels = await run_in_threadpool(_look, source, field)
    if left < pixels <= MAX_PIXELS:  # a single one of more is refused when it is read
        raise MediaError(f"given {pixels} pixels more; allowed: at most {MAX_PIXELS} in all pictures", field=field)
    async with front.darkroom.room(max(pixels, _AT_LEAST)):
        return await run_in_threadpool(read, data, field=field)


def _look(source: Source, field: str) -> tuple[bytes, int]:
    """A picture's file, and how many pixels it says that it has."""
    data = source if isinstance(source, bytes) else _data_of(source, field)
    return data, count_pixels(data, field=field)


def _data_of(url: str, field: str) -> bytes:
    head, comma, body = url.partition(",")
    if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        raise InvalidRequest.of(field, url[:80], _ALLOWED)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest.of(field, url[:80], f"{_ALLOWED}, with valid base64") from None

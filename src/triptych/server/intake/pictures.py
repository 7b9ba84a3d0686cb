"""Pictures that a request brings: in its body, or by a URL that the server may fetch."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool

from triptych.decode import MAX_PIXELS, count_pixels, read_image, read_mask
from triptych.errors import InvalidRequest, MediaError

if TYPE_CHECKING:
    from triptych.server.front import Front
    from triptych.server.locks.keys import Caller

__all__ = ["Darkroom", "Source", "developed"]

Source = str | bytes
"""A data URL, an http(s) URL where the deployment fetches those, or a file's bytes."""

_AT_LEAST = MAX_PIXELS // 4
"""Pixels that a request's pictures count for at least, so that those of no more than four are held at once."""
_ALLOWED = "a picture as data:image/…;base64,…, or as a URL where the deployment allows that"


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


@contextlib.asynccontextmanager
async def developed(
    front: Front, caller: Caller, images: Sequence[Source], mask: Source | None = None, *, field: str = "images",
    mask_field: str = "mask", holes: bool = False,
) -> AsyncIterator[dict[str, Any]]:  # fmt: skip
    """A block that has a request's pictures as its `images`, upright and 8-bit RGB, and `mask`, 8-bit grey (`holes`:
    see `read_mask`). There is room for all of them before the first one is decoded, and until the block ends: it
    begins the job, and nothing of them may be kept behind it. Raises InvalidRequest or MediaError naming
    `field[index]` or `mask_field`."""
    most = front.settings.bounds.images
    if len(images) > most:
        raise InvalidRequest.of(field, f"{len(images)} pictures", f"at most {most} here")
    wanted = [(source, f"{field}[{index}]", read_image) for index, source in enumerate(images)]
    if mask is not None:
        wanted.append((mask, mask_field, partial(read_mask, holes=holes)))
    if not wanted:
        yield {"images": ()}
        return
    files, left = [], MAX_PIXELS
    for source, name, read in wanted:
        data, pixels = await _looked_at(front, caller, source, name)
        if pixels > left:
            if pixels > MAX_PIXELS:
                await run_in_threadpool(read, data, field=name)  # which refuses it
            raise MediaError(f"given {pixels} pixels more; allowed: at most {MAX_PIXELS} in all pictures", field=name)
        left -= pixels
        files.append((data, name, read))
    async with front.darkroom.room(max(MAX_PIXELS - left, _AT_LEAST)):
        found = [await run_in_threadpool(read, data, field=name) for data, name, read in files]
        brought: dict[str, Any] = {"images": tuple(found[: len(images)])}
        if mask is not None:
            brought["mask"] = found[-1]
        yield brought


async def _looked_at(front: Front, caller: Caller, source: Source, field: str) -> tuple[bytes, int]:
    if isinstance(source, str) and source[:8].lower().startswith(("http://", "https://")):
        source = await front.fetcher.fetch(source, field, caller.name)
    return await run_in_threadpool(_look, source, field)


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

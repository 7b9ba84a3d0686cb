"""Pictures that a request brings: in its body, or by a URL that the server may fetch."""

from __future__ import annotations

import base64
import binascii
import contextlib
import re
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from starlette.concurrency import run_in_threadpool

from triptych.decode import MAX_PIXELS, count_pixels, read_image, read_mask
from triptych.errors import InvalidRequest, MediaError
from triptych.server.errors import UploadNotFound
from triptych.server.front import Front
from triptych.server.locks.keys import Caller

__all__ = ["Source", "developed", "picture_sources"]

Source = str | bytes
"""A data URL, an http(s) URL where the deployment fetches those, or a file's bytes."""

_AT_LEAST = MAX_PIXELS // 4
"""Pixels that a request's pictures count for at least, so that those of no more than four are held at once."""
BARE_BASE64 = 100
"""Characters from which on a text that says nothing of itself is taken for base64, as other servers do."""
_ID = re.compile(r"file-[0-9a-f]{32}")
_KINDS = "data:image/…;base64,…, base64, the id of an upload, or a URL where the deployment allows that; never a path"
_ALLOWED = "a picture as data:image/…;base64,…, or as a URL where the deployment allows that"


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


def picture_sources(front: Front, caller: Caller, given: Sequence[str], field: str) -> list[Source]:
    """What `developed` reads, of texts that may also be ids of uploads or base64 alone. Raises InvalidRequest naming
    `field[index]`."""
    return [_source(front, caller, text, f"{field}[{index}]") for index, text in enumerate(given)]


def _source(front: Front, caller: Caller, text: str, field: str) -> Source:
    if _ID.fullmatch(text):
        try:
            return front.uploads.get(caller.name, text).data
        except UploadNotFound:
            raise InvalidRequest.of(field, text, "the id of an upload of this API key that has not expired") from None
    if text[:8].lower().startswith(("data:", "http://", "https://")):
        return text
    if len(text) > BARE_BASE64:
        return f"data:image/any;base64,{text}"  # what it is shows when it is read
    raise InvalidRequest.of(field, text, _KINDS)


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

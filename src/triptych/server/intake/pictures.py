"""Pictures that a request brings: in its body, or by a URL that the server may fetch."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence

from PIL import Image
from starlette.concurrency import run_in_threadpool

from triptych.decode import read_image, read_mask
from triptych.errors import InvalidRequest
from triptych.server.front import Front
from triptych.server.intake.fetch import fetch

__all__ = ["mask", "pictures"]

Source = str | bytes
"""A data URL, an http(s) URL where the deployment fetches those, or a file's bytes."""

_ALLOWED = "a picture as data:image/…;base64,…, or as a URL where the deployment allows that"


async def pictures(front: Front, sources: Sequence[Source], field: str) -> tuple[Image.Image, ...]:
    """Upright 8-bit RGB pictures. Raises InvalidRequest or MediaError naming `field[index]`."""
    return tuple([await _read(front, source, f"{field}[{index}]", read_image) for index, source in enumerate(sources)])


async def mask(front: Front, source: Source, field: str) -> Image.Image:
    """An 8-bit grey mask. Raises InvalidRequest or MediaError naming `field`."""
    return await _read(front, source, field, read_mask)


async def _read(front: Front, source: Source, field: str, read: Callable[..., Image.Image]) -> Image.Image:
    data = source if isinstance(source, bytes) else await _bytes(front, source, field)
    return await run_in_threadpool(read, data, field=field)


async def _bytes(front: Front, url: str, field: str) -> bytes:
    if url[:8].lower().startswith(("http://", "https://")):
        return await fetch(url, front.settings.image_urls, field)
    head, comma, body = url.partition(",")
    if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        raise InvalidRequest.of(field, url[:80], _ALLOWED)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest.of(field, url[:80], f"{_ALLOWED}, with valid base64") from None

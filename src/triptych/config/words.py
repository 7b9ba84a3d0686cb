"""How people write sizes, stages and lists."""

from __future__ import annotations

import ipaddress
import re
from typing import Any, get_args

from triptych.errors import InvalidRequest
from triptych.request import StageName

__all__ = [
    "STAGES",
    "is_loopback",
    "one_or_many",
    "parse_cpus",
    "parse_size",
    "parse_stages",
    "stage_words",
]

STAGE_ALIASES: dict[str, StageName] = {"encoder": "encode", "transformer": "denoise", "decoder": "decode"}
"""What the field calls the stages; taken wherever a person names one."""

STAGES: tuple[StageName, ...] = get_args(StageName)
_UNITS = {
    "": 1,
    "k": 1000,
    "m": 1000**2,
    "g": 1000**3,
    "t": 1000**4,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE | re.ASCII)


def parse_size(value: Any) -> Any:
    """Bytes from a text such as `256MiB`, `8GB` or `1024`; anything else as it is. Raises ValueError."""
    if not isinstance(value, str):
        return value
    found = _SIZE.fullmatch(value.strip())
    if found is None or len(found[1]) > 18:
        raise ValueError("bytes, such as 268435456, 256MiB or 8GB")
    return int(float(found[1]) * _UNITS[(found[2] or "").lower()])


def is_loopback(host: str) -> bool:
    """Whether an address leads nowhere but to its own host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_stages(text: str) -> tuple[StageName, ...]:
    """Stage names or their aliases, separated by commas. Raises InvalidRequest."""
    names = stage_words(text)
    if len(set(names)) != len(names) or not set(names) <= set(STAGES):
        aliases = ", ".join(STAGE_ALIASES)
        raise InvalidRequest.of("stages", text, f"{', '.join(STAGES)} (or {aliases}), each once, between commas")
    return tuple(name for name in STAGES if name in names)


def parse_cpus(text: str) -> tuple[int, ...]:
    """Processor numbers such as `0,2-3`. Raises InvalidRequest."""
    found: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part.strip(), re.ASCII)
        numbers = range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else range(0)
        if not numbers or set(numbers) & set(found):
            raise InvalidRequest.of("cpus", text, "processor numbers such as 0,2-3, each once")
        found += numbers
    return tuple(found)


def one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str | int) and not isinstance(value, bool) else value


def stage_words(value: Any) -> Any:
    words = value.split(",") if isinstance(value, str) else value
    if not isinstance(words, list | tuple):
        return words
    return tuple(STAGE_ALIASES.get(word.strip(), word.strip()) if isinstance(word, str) else word for word in words)

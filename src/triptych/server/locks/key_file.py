"""API keys as a file: a line for each, with its digest."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from triptych.errors import InvalidRequest, LoadError

__all__ = ["NAME", "NAMES", "ApiKey", "make_key", "read_keys", "remove_key", "stamp"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NAMES = "letters, digits, dots, hyphens and underscores, at most 64"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_BYTES = 2**20
_HEAD = "# API keys of `triptych serve`: NAME SHA256 [admin]\n"


@dataclass(frozen=True)
class ApiKey:
    """One key, as its SHA-256: what a file loses is no key."""

    name: str
    sha256: bytes
    admin: bool = False

    @classmethod
    def of(cls, name: str, key: str, admin: bool = False) -> ApiKey:
        """The key itself, which is as random as a digest: it needs no salt and no slow hash."""
        return cls(name, hashlib.sha256(key.encode()).digest(), admin)


def make_key(file: Path, name: str, *, admin: bool = False) -> str:
    """Makes a key, adds its digest to a file (0600), and returns the key itself, which is kept nowhere. Raises
    InvalidRequest for a name that is none or is taken, or a file that cannot be written; LoadError for one that is
    wrong."""
    if not NAME.fullmatch(name):
        raise InvalidRequest.of("name", name, NAMES)
    lines = _lines(file) if file.exists() else [_HEAD]
    if any(_name_of(line) == name for line in lines):
        raise InvalidRequest.of("name", name, f"one that is not in {file} yet; --remove takes it out")
    key = "tk_" + secrets.token_urlsafe(32)
    line = f"{name} {ApiKey.of(name, key).sha256.hex()}{' admin' if admin else ''}\n"
    _write(file, [*lines, line])
    return key


def remove_key(file: Path, name: str) -> None:
    """Takes a key out of a file; a running server refuses it from then on. Raises InvalidRequest if it is not there,
    LoadError if the file cannot be read."""
    lines = _lines(file)
    kept = [line for line in lines if _name_of(line) != name]
    if len(kept) == len(lines):
        raise InvalidRequest.of(
            "name", name, sorted(filter(None, map(_name_of, lines))) or "nothing: there are no keys"
        )
    _write(file, kept)


def stamp(file: Path) -> tuple[int, ...] | None:
    """What changes when a file does; None while there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size


def read_keys(file: Path) -> tuple[tuple[ApiKey, ...], list[str]]:
    """A file's keys, and what is wrong with its other lines. Raises LoadError."""
    keys: dict[str, ApiKey] = {}
    wrong = []
    for number, line in enumerate(_lines(file), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if problem := _problem(words, keys):  # never shows the line: it may be a key that should not be there
            wrong.append(f"line {number}: {problem}")
        else:
            keys[words[0]] = ApiKey(words[0], bytes.fromhex(words[1]), len(words) == 3)
    return tuple(keys.values()), wrong


def _problem(words: list[str], keys: Iterable[str]) -> str | None:
    if not 2 <= len(words) <= 3 or words[2:] not in ([], ["admin"]):
        return "allowed: NAME SHA256, or NAME SHA256 admin"
    if not NAME.fullmatch(words[0]):
        return f"allowed as a name: {NAMES}"
    if not _SHA256.fullmatch(words[1]):
        return "allowed after the name: the key's SHA-256, as 64 hexadecimal digits in lower case"
    return f"a second key named {words[0]}" if words[0] in keys else None


def _name_of(line: str) -> str | None:
    words = line.partition("#")[0].split()
    return words[0] if words else None


def _lines(file: Path) -> list[str]:
    """A file's lines with their ends. Raises LoadError if it cannot be read, or others can."""
    try:
        with open(file, "rb") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            data = opened.read(_MAX_BYTES + 1)
    except OSError as error:
        raise LoadError(f"{file} cannot be read: {error.strerror}", field="api_keys") from None
    if mode & 0o077:
        raise LoadError(f"{file} has open permissions ({mode & 0o777:04o}): chmod 600 {file}", field="api_keys")
    try:
        if len(data) > _MAX_BYTES:
            raise ValueError
        return data.decode().splitlines(keepends=True)
    except ValueError:
        raise LoadError(
            f"{file} is no file of API keys: no text, or more than a megabyte of it", field="api_keys"
        ) from None


def _write(file: Path, lines: Iterable[str]) -> None:
    """All of it or nothing, readable by its owner alone."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(6)}.tmp")
    text = "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(descriptor, "w", encoding="utf-8") as opened:
                opened.write(text)
            os.replace(temporary, file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be written: {error.strerror}", field="file") from None

"""API keys: who calls."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from triptych.config import ServeSection
from triptych.errors import InvalidRequest, LoadError
from triptych.server.errors import Forbidden, NotAuthenticated
from triptych.server.locks.key_file import NAME, NAMES, ApiKey, read_keys, stamp
from triptych.server.seeing.visits import Visit

__all__ = ["ApiKey", "Caller", "KeyRing", "key_ring"]

logger = logging.getLogger(__name__)

_GIVEN = re.compile(r"[A-Za-z0-9._~+/=-]{20,512}")
"""A key in the environment, which somebody else may have made."""


@dataclass(frozen=True)
class Caller:
    """Whoever calls: the name of its key; empty where there are no keys, and everybody is the same."""

    name: str
    admin: bool
    visit: Visit = field(default_factory=Visit, compare=False, repr=False)
    """the request that it calls by"""

    def as_admin(self) -> Caller:
        """Itself. Raises Forbidden if it is none."""
        if not self.admin:
            raise Forbidden("this needs an admin's API key")
        return self


class KeyRing:
    """The keys of a deployment. Without any, and without a file, it lets everybody in, as an admin. A file is read
    again when it has changed: the next request meets its keys."""

    def __init__(self, keys: Iterable[ApiKey] = (), file: Path | None = None) -> None:
        self._keys = tuple(keys)
        self._file = file
        self._seen = None if file is None else stamp(file)
        self._locked = file is not None or bool(self._keys)
        if file is not None:
            self._keys, wrong = read_keys(file)
            if wrong or not self._keys:
                problem = wrong[0] if wrong else "it has no keys; `triptych keys api` makes one"
                raise LoadError(f"{file}: {problem}", field="api_keys")

    def __bool__(self) -> bool:
        return self._locked

    def caller(self, authorization: str | None) -> Caller:
        """Who sends this `Authorization` header. Raises NotAuthenticated; which keys there are cannot be learnt from
        how long that takes."""
        if not self._locked:
            return Caller("", admin=True)
        self._refresh()
        scheme, _, given = (authorization or "").partition(" ")
        digest = hashlib.sha256(given.strip().encode()).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(digest, key.sha256):
                found = key
        if found is None or scheme.lower() != "bearer":
            problem = "none was given" if not authorization else "it is not known here"
            raise NotAuthenticated(f"an API key is needed, as `Authorization: Bearer KEY`; {problem}")
        return Caller(found.name, found.admin)

    def _refresh(self) -> None:
        """Reads the file anew if it has changed. Lines that are wrong give no key; a file that cannot be read, or is
        gone for now, changes nothing."""
        if self._file is None or (seen := stamp(self._file)) == self._seen:
            return
        self._seen = seen
        try:
            self._keys, wrong = read_keys(self._file)
        except LoadError as error:
            logger.error("the API keys stay as they were: %s", error)
            return
        for problem in wrong:
            logger.error("%s: %s", self._file, problem)
        logger.info("read %d API keys from %s", len(self._keys), self._file)


def key_ring(settings: ServeSection) -> KeyRing:
    """The keys that a deployment's settings ask for. A variable's value is taken out of the environment, which worker
    processes inherit. Raises LoadError, or InvalidRequest for two sources at once."""
    file, variable = settings.api_keys, settings.api_keys_env
    if variable is None:
        return KeyRing(file=file)
    if file is not None:
        raise InvalidRequest.of("api_keys_env", variable, f"nothing beside api_keys ({file})")
    entries = os.environ.pop(variable, "").replace(",", " ").split()
    if not entries:
        raise LoadError(f"the environment has no {variable}, or nothing in it", field="api_keys_env")
    keys: dict[str, ApiKey] = {}
    for number, entry in enumerate(entries, 1):
        name, _, rest = entry.partition(":")
        key, colon, role = rest.partition(":")
        if not (NAME.fullmatch(name) and _GIVEN.fullmatch(key) and role == ("admin" if colon else "")):
            allowed = f"NAME:KEY or NAME:KEY:admin (name: {NAMES}; key: 20 to 512 letters, digits and ._~+/=-)"
            raise LoadError(f"{variable}, entry {number}: allowed: {allowed}", field="api_keys_env")
        if name in keys:
            raise LoadError(f"{variable}, entry {number}: a second key named {name}", field="api_keys_env")
        keys[name] = ApiKey.of(name, key, bool(colon))
    return KeyRing(keys.values())

"""API keys: who calls."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass

from triptych.server.errors import Forbidden, NotAuthenticated

__all__ = ["ApiKey", "Caller", "KeyRing"]


@dataclass(frozen=True)
class Caller:
    """Whoever calls: the name of its key; empty where there are no keys, and everybody is the same."""

    name: str
    admin: bool

    def as_admin(self) -> Caller:
        """Itself. Raises Forbidden if it is none."""
        if not self.admin:
            raise Forbidden("this needs an admin's API key")
        return self


@dataclass(frozen=True)
class ApiKey:
    """One key, as its SHA-256: what a file loses is no key."""

    name: str
    sha256: bytes
    admin: bool = False


class KeyRing:
    """The keys of a deployment; an empty one lets everybody in, as an admin."""

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        self._keys = tuple(keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def caller(self, authorization: str | None) -> Caller:
        """Who sends this `Authorization` header. Raises NotAuthenticated; which keys there are cannot be learnt from
        how long that takes."""
        if not self._keys:
            return Caller("", admin=True)
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

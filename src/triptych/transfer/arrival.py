"""What arrives: looked at before memory is given to it, verified before it is handed on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from triptych.errors import WrongPayload
from triptych.messages import Descriptor, Route
from triptych.transfer.payload import Header, Payload, decode_header, fill_payload
from triptych.transfer.writing import unseal

Check = Callable[[Header], None]
MAX_HEAD = 64 * 2**20


class Arrival:
    """One fetch: what was announced, what the receiver allows, and the header once it is there. `spoil` flips a byte
    before verification."""

    def __init__(self, descriptor: Descriptor, limit: int | None, check: Check | None, spoil: bool) -> None:
        if limit is not None and descriptor.body > limit:
            raise WrongPayload(f"a payload of {descriptor.body} bytes, at most {limit} are taken here")
        if not 0 <= descriptor.head <= MAX_HEAD or descriptor.body < 0:
            raise WrongPayload(f"a header of {descriptor.head} bytes, at most {MAX_HEAD}")
        self.descriptor = descriptor
        self._check, self._spoil = check, spoil
        self._header: Header | None = None

    def look(self, head: bytes) -> None:
        """Takes the header. Raises WrongPayload (Damaged for its digest), or what the receiver's check raises."""
        if self._spoil and not self.descriptor.body:
            head = bytes([head[0] ^ 1]) + head[1:]
        self.approve(decode_header(unseal(head)))

    def approve(self, header: Header) -> None:
        """Takes a header that crossed no wire. Raises like `look`, but for the digest."""
        if header.body != self.descriptor.body:
            raise WrongPayload(f"a body of {header.body} bytes, {self.descriptor.body} were announced")
        if self._check is not None:
            self._check(header)
        self._header = header

    def fill(self, body: memoryview) -> Payload:
        """The payload over its body. Raises Damaged."""
        assert self._header is not None, "the header was looked at first"
        if self._spoil:
            for item in self._header.tensors:
                if item.nbytes:
                    body[item.offset + item.nbytes // 2] ^= 1
                    break
        return fill_payload(self._header, body)


@dataclass(eq=False)
class Fetched:
    """A fetched payload. Its tensors may be views of pooled memory: they may be written to, which nobody else sees,
    and may not be used after `close`, which gives the memory back. Use it as a context, or close it."""

    payload: Payload
    route: Route
    seconds: float
    bytes: int
    """of the body"""
    _give_back: Callable[[], None] | None

    def close(self) -> None:
        """Gives the memory back; again, it does nothing."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()

    def __enter__(self) -> Fetched:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

"""A topology as bytes: a worker tells its model's to a coordinator that holds no torch."""

from __future__ import annotations

import msgspec

from triptych.errors import WrongPayload
from triptych.model.topology import Topology

__all__ = ["topology_from_bytes", "topology_to_bytes"]


def topology_to_bytes(topology: Topology) -> bytes:
    """The topology as msgpack. Defaults of inputs that are not plain data cross as None."""
    return msgspec.msgpack.encode(topology, enc_hook=lambda _: None)


def topology_from_bytes(data: bytes) -> Topology:
    """What `topology_to_bytes` gave. Raises WrongPayload if it is something else."""
    try:
        return msgspec.msgpack.decode(data, type=Topology)
    except msgspec.DecodeError as error:
        raise WrongPayload(f"no topology ({error})", field="topology") from None

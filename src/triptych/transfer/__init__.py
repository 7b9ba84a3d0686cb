"""What crosses between stages, and how."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych.transfer.arrival import Fetched
    from triptych.transfer.counts import ExchangeStats
    from triptych.transfer.exchange import Exchange
    from triptych.transfer.neighbours import Neighbours
    from triptych.transfer.payload import (
        Header,
        Payload,
        TensorHeader,
        decode_payload,
        encode_payload,
        payload_of,
        payload_parts,
        tensors_in,
    )
    from triptych.transfer.settings import TransferSettings

# Imported on first use: who only says how payloads may travel must not pay for torch.
_FILES = {
    "arrival": ("Fetched",),
    "counts": ("ExchangeStats",),
    "exchange": ("Exchange",),
    "neighbours": ("Neighbours",),
    "payload": (
        "Header",
        "Payload",
        "TensorHeader",
        "decode_payload",
        "encode_payload",
        "payload_of",
        "payload_parts",
        "tensors_in",
    ),
    "settings": ("TransferSettings",),
}
_HOME = {name: file for file, names in _FILES.items() for name in names}

__all__ = [
    "Exchange",
    "ExchangeStats",
    "Fetched",
    "Header",
    "Neighbours",
    "Payload",
    "TensorHeader",
    "TransferSettings",
    "decode_payload",
    "encode_payload",
    "payload_of",
    "payload_parts",
    "tensors_in",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

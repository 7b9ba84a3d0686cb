"""What the operator allows beyond safetensors and installed code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Trust:
    """Both off unless told: each lets whoever made a model run code of theirs here."""

    pickle_weights: bool = False
    remote_code: bool = False


NO_TRUST = Trust()
"""What holds unless told."""

"""What third parties tell on standard error at import although nobody loses by it."""

from __future__ import annotations

import logging

__all__ = ["hush"]


def hush() -> None:
    """Keeps transformers from telling, at import, that torchvision is absent: nothing is lost by it, and
    `triptych doctor` lists it. For processes that are ours; costs no import of transformers."""
    logging.getLogger("transformers.utils.import_utils").addFilter(_worth_telling)


def _worth_telling(record: logging.LogRecord) -> bool:
    return "requires torchvision (not installed)" not in record.getMessage()

"""Tiny random models of every family, built offline once per machine and version.

`FAMILIES[name]` says what a small run of one is; `folder(name)` is its diffusers folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import diffusers
import torch
import transformers

from tests.families.base import Family, picture
from tests.families.modular import MODULAR
from tests.families.standard import STANDARD

__all__ = ["FAMILIES", "Family", "folder", "picture"]

FAMILIES: dict[str, Family] = {**MODULAR, **STANDARD}


def _key() -> str:
    """Changes with the builders' source and with the libraries that write the folders."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    for library in (diffusers, transformers, torch):
        digest.update(library.__version__.encode())
    return digest.hexdigest()[:12]


def folder(name: str) -> Path:
    """The family's diffusers folder, built now if no process of this user has built it before."""
    root = Path(tempfile.gettempdir()) / f"triptych-families-{os.getuid()}" / _key()
    target = root / name
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
    try:
        build(name, scratch / "model")
        os.replace(scratch / "model", target)
    except OSError:
        # Another process was faster; its folder is the same.
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def build(name: str, target: Path) -> None:
    """Builds and saves the family's pipeline."""
    pipeline = FAMILIES[name].builder()
    pipeline.save_pretrained(target, safe_serialization=True)

"""The decode stage: latents to pictures, previews, and media in and out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych.decode.media import (
        MAX_PIXELS,
        check_fps,
        clip_bytes,
        count_pixels,
        image_bytes,
        read_image,
        read_mask,
        to_clips,
        to_images,
        to_uint8,
        write_clip,
        write_image,
    )
    from triptych.decode.metadata import (
        Settings,
        digest,
        encode_settings,
        read_settings,
        repeat_settings,
        settings_of,
    )
    from triptych.decode.preview import LatentPreview, learn_preview, load_preview_vae
    from triptych.decode.stage import DecodeStage, FusedStage

# Imported on first use: reading and writing media needs no torch, and must not pay for it.
_FILES = {
    "media": (
        "MAX_PIXELS",
        "check_fps",
        "clip_bytes",
        "count_pixels",
        "image_bytes",
        "read_image",
        "read_mask",
        "to_clips",
        "to_images",
        "to_uint8",
        "write_clip",
        "write_image",
    ),
    "metadata": ("Settings", "digest", "encode_settings", "read_settings", "repeat_settings", "settings_of"),
    "preview": ("LatentPreview", "learn_preview", "load_preview_vae"),
    "stage": ("DecodeStage", "FusedStage"),
}
_HOME = {name: file for file, names in _FILES.items() for name in names}

__all__ = [
    "MAX_PIXELS",
    "DecodeStage",
    "FusedStage",
    "LatentPreview",
    "Settings",
    "check_fps",
    "clip_bytes",
    "count_pixels",
    "digest",
    "encode_settings",
    "image_bytes",
    "learn_preview",
    "load_preview_vae",
    "read_image",
    "read_mask",
    "read_settings",
    "repeat_settings",
    "settings_of",
    "to_clips",
    "to_images",
    "to_uint8",
    "write_clip",
    "write_image",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"triptych.decode.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Tokenizers, image processors and schedulers: components without weights, from their configurations."""

from __future__ import annotations

import functools
import importlib.util
import logging
from pathlib import Path
from typing import Any

from triptych.errors import LoadError

logger = logging.getLogger(__name__)


def renamed(class_name: str) -> type | None:
    """transformers' present class for an image processor's name of old (CLIPFeatureExtractor), None if it has none."""
    import transformers

    return getattr(transformers, class_name.replace("FeatureExtractor", "ImageProcessor"), None)


def load_plain(cls: Any, folder: Path) -> Any:
    """A component without weights, by its class's from_pretrained. Raises LoadError if the folder has no files."""
    if not folder.is_dir() or not any(folder.iterdir()):
        raise LoadError(f"no files in {folder}", field="model")
    if _needs_torchvision(cls):
        _say_once(cls.__name__)
        cls = _without_video(cls)
    return cls.from_pretrained(str(folder), local_files_only=True)


def _needs_torchvision(cls: Any) -> bool:
    """Whether it is a processor with a video half, which transformers has for torchvision only, and that is absent."""
    parts = cls.get_attributes() if hasattr(cls, "get_attributes") else ()
    return "video_processor" in parts and importlib.util.find_spec("torchvision") is None


@functools.cache
def _say_once(name: str) -> None:
    logger.info("torchvision is not installed: %s resizes images with Pillow", name)


def _without_video(cls: Any) -> Any:
    """That processor class without its video half; its images are resized by Pillow, which changes their embeddings
    by about .006. transformers takes a processor's parts from its constructor's signature."""

    class WithoutVideo(cls):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs) -> None:
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **kwargs)

    WithoutVideo.__name__, WithoutVideo.__qualname__ = cls.__name__, cls.__qualname__
    return WithoutVideo

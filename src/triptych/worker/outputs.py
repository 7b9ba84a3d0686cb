"""What leaves a worker besides tensors: files of pictures and clips, small previews, errors in words."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import save

from triptych.decode import Settings, clip_bytes, encode_settings, image_bytes, to_clips, to_images, to_uint8
from triptych.errors import Damaged, InvalidRequest, PayloadLost, StageFailed, TriptychError, WrongPayload
from triptych.messages import MEDIA_TYPES, Encoding, Failed, Picture, Task
from triptych.model import CHECKPOINT
from triptych.transfer import Payload
from triptych.worker.inputs import Input, InputFailed


def as_files(made: Payload, encoding: Encoding) -> Payload:
    """Decode's pictures or clips as files: `files` (uint8, one dimension each) and `media_types`; what a VAE's call
    made also as safetensors. Raises InvalidRequest for a format that does not fit what was made."""
    clips = "videos" in made.values
    kinds = "video/" if clips else "image/"
    allowed = [name for name, kind in MEDIA_TYPES.items() if kind.startswith(kinds)]
    if encoding.format not in (*allowed, "safetensors"):
        raise InvalidRequest.of("output_format", encoding.format, allowed)
    files: list[bytes] = []
    if encoding.format == "safetensors":
        files.append(_safetensors(made))
    elif clips:
        for index, clip in enumerate(to_clips(made.values["videos"], encoding.fps or 16.0)):
            files.append(clip_bytes(clip, _metadata(encoding, index)))
    else:
        for index, image in enumerate(to_images(made.values["images"])):
            files.append(image_bytes(image, encoding.format, _metadata(encoding, index)))
    tensors = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
    values: dict[str, Any] = {"files": tensors, "media_types": [MEDIA_TYPES[encoding.format]] * len(files)}
    return Payload(values, job=made.job, attempt=made.attempt, stage=made.stage)


def _safetensors(made: Payload) -> bytes:
    """One `tensor`: pictures as uint8 (…, height, width, channels)."""
    (made_of,) = made.values.values()
    pixels = "tensor" not in made.values and made_of.is_floating_point()
    return save({"tensor": to_uint8(made_of) if pixels else made_of.contiguous()})


def _metadata(encoding: Encoding, index: int) -> str | None:
    if encoding.metadata is None:
        return None
    return encode_settings(Settings.model_validate({**encoding.metadata, "output": index}))


def picture(preview: torch.Tensor | None) -> Picture | None:
    """A preview, uint8 (height, width, 3), as it crosses."""
    if preview is None:
        return None
    height, width = preview.shape[:2]
    return Picture(width=width, height=height, pixels=preview.contiguous().numpy().tobytes())


def failed(task: Task, error: Exception) -> Failed:
    """What a task ended with, in words; never a traceback. An input that can be had again is `lost`."""
    if isinstance(error, InputFailed):
        again = isinstance(error.error, PayloadLost | Damaged)
        # Without a checkpoint that does not fit, of another version, say, the task can start again.
        unfit = error.what == "checkpoint" and isinstance(error.error, WrongPayload)
        lost: Input | None = error.what if again or unfit else None
        return _failed(task, error.error, lost, isinstance(error.error, Damaged))
    if task.checkpoint is not None and isinstance(error, WrongPayload) and (error.field or "").startswith(CHECKPOINT):
        return _failed(task, error, "checkpoint")
    if not isinstance(error, TriptychError):
        kind = type(error).__name__
        message = f"{task.stage} failed with {kind}: {error}"
        error = StageFailed(message, stage=task.stage, job=task.job, original=kind)
    return _failed(task, error)


def _failed(
    task: Task,
    error: TriptychError,
    lost: Input | None = None,
    damaged: bool = False,
) -> Failed:
    original = error.original if isinstance(error, StageFailed) else type(error).__name__
    return Failed(
        job=task.job,
        stage=task.stage,
        attempt=task.attempt,
        code=error.code,
        message=error.message,
        field=error.field,
        original=original,
        lost=lost,
        damaged=damaged,
    )

"""Pictures and clips: reading them as hostile input, turning tensors into them, writing them to files."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)
from PIL.ImageFile import ImageFile

from triptych.decode import exif
from triptych.errors import InvalidRequest, MediaError, Unsupported
from triptych.request import Clip

if TYPE_CHECKING:
    import torch

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_BYTES",
    "MAX_FPS",
    "MAX_PIXELS",
    "MIN_FPS",
    "VIDEO_SUFFIXES",
    "check_fps",
    "clip_bytes",
    "count_pixels",
    "image_bytes",
    "open_image",
    "read_bytes",
    "read_image",
    "read_mask",
    "replacing",
    "to_clips",
    "to_images",
    "to_uint8",
    "write_clip",
    "write_image",
]

MAX_PIXELS = 2**26
"""Pixels of a picture that is read: 8192 × 8192."""
MAX_BYTES = 2**28
"""Bytes of a picture file that is read."""
MIN_FPS, MAX_FPS = 0.0001, 1000
"""Frames per second of a clip that is written: what plays as asked."""

ImageFormat = Literal["png", "webp", "jpeg"]
IMAGE_SUFFIXES: dict[str, ImageFormat] = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}
VIDEO_SUFFIXES: dict[str, Literal["mp4"]] = {".mp4": "mp4"}
IMAGE_FORMATS = tuple(dict.fromkeys(IMAGE_SUFFIXES.values()))

_ALLOWED = "a PNG, JPEG, WebP, GIF, BMP or AVIF picture, not animated"
_ASCII = b"ASCII\x00\x00\x00"
"""An EXIF user comment begins with its character code."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _refuse(given: str, problem: str, field: str, allowed: str = _ALLOWED) -> MediaError:
    return MediaError(f"given {given}, {problem}; allowed: {allowed}", field=field)


# Reading


def read_image(
    source: str | os.PathLike[str] | bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    field: str = "image",
) -> Image.Image:
    """Reads a picture from a file or from its bytes, trusting nothing.

    Returns an upright 8-bit RGB picture without metadata: EXIF orientation applied, 16-bit grey scaled to 8,
    transparency laid over white. Raises MediaError, naming `field`, if the file cannot be read, is empty,
    larger than `max_bytes`, truncated, animated, of more than `max_pixels` pixels, or not a picture of a
    format that is read.
    """
    return _decode(source, max_pixels, max_bytes, field, _to_rgb)


def read_mask(
    source: str | os.PathLike[str] | bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    field: str = "mask",
    holes: bool = False,
) -> Image.Image:
    """Reads a mask as `read_image` reads a picture, and returns it as 8-bit grey: white is painted anew; with `holes`,
    what is transparent is, whatever its colours, where anything is transparent."""
    return _decode(source, max_pixels, max_bytes, field, _holes if holes else _to_grey)


def _decode(
    source: str | os.PathLike[str] | bytes,
    max_pixels: int,
    max_bytes: int,
    field: str,
    convert: Callable[[Image.Image], Image.Image],
) -> Image.Image:
    data, given = read_bytes(source, max_bytes=max_bytes, field=field)
    image = open_image(data, given, field)
    with image:
        wide, high = image.size
        if wide * high > max_pixels:
            allowed = f"at most {max_pixels} pixels"
            raise _refuse(given, f"a picture of {wide} × {high} = {wide * high} pixels", field, allowed)
        try:
            # Pillow's decoders raise whatever a damaged file makes them stumble over.
            if getattr(image, "is_animated", False):
                raise _refuse(given, "an animated picture", field)
            turn = _TURNS.get(exif.orientation(image.info.get("exif", b"")))
            result = convert(image)
        except MediaError:
            raise
        except Exception as error:
            raise _refuse(given, f"a damaged picture ({_one_line(error)})", field) from error
    if turn is not None:
        result = result.transpose(turn)
    result.info = {}
    return result


def count_pixels(data: bytes, *, field: str = "image") -> int:
    """How many pixels a picture's file says that it has. Raises MediaError if it is none that is read."""
    with open_image(*read_bytes(data, max_bytes=MAX_BYTES, field=field), field) as image:
        return image.width * image.height


def read_bytes(
    source: str | os.PathLike[str] | bytes, *, max_bytes: int, field: str, allowed: str = _ALLOWED
) -> tuple[bytes, str]:
    """The content of a regular file (or the bytes themselves), and how to call it in a message. Raises
    MediaError."""
    if isinstance(source, bytes):
        data, given = source, f"{len(source)} bytes"
    else:
        path = Path(source)
        given = repr(os.fspath(source))
        try:
            # Opening a pipe or a device could block for ever.
            if not path.is_file():
                raise _refuse(given, "a folder" if path.is_dir() else "no such file", field, allowed)
            with path.open("rb") as file:
                data = file.read(max_bytes + 1)
        except (OSError, ValueError) as error:
            raise _refuse(given, f"a file that cannot be read ({_one_line(error)})", field, allowed) from error
    if not data:
        raise _refuse(given, "a file of 0 bytes", field, allowed)
    if len(data) > max_bytes:
        raise _refuse(given, "a file too large", field, f"at most {max_bytes} bytes")
    return data, given


def open_image(data: bytes, given: str, field: str) -> ImageFile:
    """Opens a picture's header. Raises MediaError.

    The plugin is chosen from the first bytes among the few formats that are read: Image.open would try dozens
    (one of them starts Ghostscript) and reports large sizes through process-wide warnings.
    """
    plugin = _plugin(data)
    if plugin is None:
        start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        drawing = start.startswith(b"<svg") or (start.startswith(b"<?xml") and b"<svg" in start)
        raise _refuse(given, "an SVG drawing" if drawing else "not a picture of a known format", field)
    try:
        return plugin(io.BytesIO(data))
    except Exception as error:
        raise _refuse(given, f"a damaged picture ({_one_line(error)})", field) from error


def _plugin(data: bytes) -> Callable[[io.BytesIO], ImageFile] | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImagePlugin.PngImageFile
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImagePlugin.JpegImageFile
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return GifImagePlugin.GifImageFile
    if data[:2] == b"BM":
        return BmpImagePlugin.BmpImageFile
    if data[4:12] in (b"ftypavif", b"ftypavis") or (data[4:12] == b"ftypmif1" and b"avif" in data[12:64]):
        return AvifImagePlugin.AvifImageFile
    return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _to_grey(image: Image.Image) -> Image.Image:
    return _to_rgb(image).convert("L")


def _holes(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        opacity = image.convert("RGBA").getchannel("A")
        if opacity.getextrema()[0] != 255:
            return ImageOps.invert(opacity)
    return _to_grey(image)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey, scaled: Pillow's own conversion clips at 255."""
    levels = np.asarray(image).astype(np.uint32).clip(0, 65535)
    return Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else text[:117] + "..."


# From tensors


def to_uint8(pictures: torch.Tensor) -> torch.Tensor:
    """Floating (…, channels, height, width) in 0…1 to uint8 (…, height, width, channels) on the CPU.

    Bit-equal to diffusers' VaeImageProcessor from "pt" to "pil" (scaled, rounded half to even), but done on
    the tensor, where it is several times faster. Raises Unsupported if a value is not finite.
    """
    levels = pictures.detach().float()
    if not levels.isfinite().all():
        raise Unsupported(
            "the decoder gave pixels that are not numbers: its weights are damaged, or its dtype is too "
            "narrow (float32 and bfloat16 are safe)",
            field="dtype",
        )
    # Out of place first: .float() is the caller's own tensor when that is float32 already.
    levels = levels.clamp(0, 1).mul_(255).round_()
    return levels.byte().movedim(-3, -1).contiguous().cpu()


def to_images(pictures: torch.Tensor) -> list[Image.Image]:
    """Pictures from a floating tensor (batch, channels, height, width) in 0…1, see `to_uint8`, or from what
    that returned. 1, 3 or 4 channels make grey, RGB or RGBA."""
    arrays = _levels(pictures, 4)
    return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]


def to_clips(videos: torch.Tensor, fps: float) -> list[Clip]:
    """Clips from a floating tensor (batch, frames, 3, height, width) in 0…1, see `to_uint8`, or from what
    that returned."""
    return [Clip(frames=frames, fps=fps) for frames in _levels(videos, 5)]


def _levels(pixels: torch.Tensor, ndim: int) -> np.ndarray:
    levels = (pixels.cpu() if pixels.element_size() == 1 else to_uint8(pixels)).numpy()
    channels = (1, 3, 4) if ndim == 4 else (3,)
    if levels.ndim != ndim or levels.shape[-1] not in channels:
        raise ValueError(f"pixels of shape {tuple(pixels.shape)}, expected {ndim} dimensions, {channels} channels")
    return levels


# Writing


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], field: str = "output") -> Iterator[Path]:
    """Gives a temporary path beside `path`, which takes its place when the block ends, and vanishes if it
    fails. Raises MediaError if the folder cannot be written to."""
    target = Path(path)
    # Not tempfile's: its files are private (0600) whatever the umask says.
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise MediaError(
            f"given {os.fspath(path)!r}, which cannot be written: {_one_line(error)}", field=field
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_image(
    image: Image.Image,
    path: str | os.PathLike[str],
    format: ImageFormat | None = None,
    metadata: str | None = None,
) -> None:
    """Writes a picture: all of it or nothing.

    `format` defaults to what the suffix says. PNG and WebP are lossless, JPEG has quality 95 without chroma
    subsampling. `metadata` is the text of `metadata.Settings`; it goes into a PNG's iTXt chunk named
    "triptych", or the EXIF user comment. Raises MediaError for an unknown suffix or a path that cannot be
    written.
    """
    format = format or IMAGE_SUFFIXES.get(Path(path).suffix.lower())
    if format is None:
        raise _refuse(repr(os.fspath(path)), "an unsupported suffix", "output", ", ".join(IMAGE_SUFFIXES))
    with replacing(path) as temporary:
        _save(image, temporary, format, metadata)


def image_bytes(image: Image.Image, format: str, metadata: str | None = None) -> bytes:
    """A picture's file as bytes, as `write_image` writes it. Raises InvalidRequest for a format that is not
    written."""
    if format not in IMAGE_FORMATS:
        raise InvalidRequest.of("output_format", format, IMAGE_FORMATS)
    file = io.BytesIO()
    _save(image, file, format, metadata)
    return file.getvalue()


def _save(image: Image.Image, file: Path | io.BytesIO, format: str, metadata: str | None) -> None:
    options: dict[str, Any] = {}
    if format == "png":
        if metadata is not None:
            options["pnginfo"] = text = PngImagePlugin.PngInfo()
            text.add_itxt("triptych", metadata)
    else:
        options = {"quality": 95, "subsampling": 0} if format == "jpeg" else {"lossless": True, "exact": True}
        if metadata is not None:
            options["exif"] = exif.with_user_comment(_ASCII + metadata.encode("ascii"))
    if format == "jpeg" and image.mode not in ("L", "RGB"):
        image = _to_rgb(image)
    image.save(file, format=format.upper(), **options)


def check_fps(fps: float) -> None:
    """Raises InvalidRequest for frames per second at which an MP4 file cannot play."""
    if not MIN_FPS <= fps <= MAX_FPS:
        raise InvalidRequest.of("fps", fps, f"{MIN_FPS} to {MAX_FPS} in an MP4 file")


def write_clip(clip: Clip, path: str | os.PathLike[str], metadata: str | None = None) -> None:
    """Writes a clip as MP4 (H.264, 4:2:0, BT.709, index first): all of it or nothing.

    H.264's 4:2:0 needs even sides, so an odd one repeats its last row or column. `metadata` goes into the
    file's comment. Raises MediaError if the path cannot be written, InvalidRequest for a rate outside MIN_FPS to
    MAX_FPS, Unsupported if this PyAV has no H.264 encoder.
    """
    with replacing(path) as temporary:
        _write_mp4(clip, temporary, metadata)


def clip_bytes(clip: Clip, metadata: str | None = None) -> bytes:
    """A clip's MP4 file as bytes, as `write_clip` writes it. Raises InvalidRequest or Unsupported."""
    # The index is moved to the front by reading the file again, so it has to be one.
    with tempfile.TemporaryDirectory(prefix="triptych-") as folder:
        path = Path(folder) / "clip.mp4"
        _write_mp4(clip, path, metadata)
        return path.read_bytes()


def _write_mp4(clip: Clip, path: Path, metadata: str | None) -> None:
    frames = clip.frames
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"frames of {frames.dtype} {frames.shape}, expected uint8 (frames, height, width, 3)")
    _, height, width, _ = frames.shape
    padding = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))
    if height % 2 or width % 2:
        frames = np.pad(frames, padding, mode="edge")
    _encode_mp4(frames, _frame_rate(clip.fps), path, metadata)


def _frame_rate(fps: float) -> Fraction:
    """Frames per second as a ratio of integers small enough for H.264."""
    check_fps(fps)
    # Below 1 it is the seconds per frame that must not be rounded to a small ratio: the rate would become 0.
    return Fraction(fps).limit_denominator(1001) if fps >= 1 else 1 / (1 / Fraction(fps)).limit_denominator(1001)


def _encode_mp4(frames: np.ndarray, rate: Fraction, path: Path, metadata: str | None) -> None:
    import av
    from av.error import FFmpegError
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        if metadata is not None:
            container.metadata["comment"] = metadata
        try:
            stream = container.add_stream("libx264", rate=rate)
        except (FFmpegError, ValueError) as error:
            raise Unsupported(f"this PyAV cannot encode H.264: {_one_line(error)}", field="output") from error
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "17", "preset": "medium"}
        context = stream.codec_context
        context.colorspace = Colorspace.ITU709
        context.color_primaries = ColorPrimaries.BT709
        context.color_trc = ColorTrc.BT709
        context.color_range = ColorRange.MPEG
        for array in frames:
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))

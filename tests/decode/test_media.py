"""Reading pictures that may be anything, and writing what was made."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from triptych.decode import exif, read_image, read_mask, to_clips, to_images, to_uint8, write_clip, write_image
from triptych.decode.media import replacing
from triptych.errors import InvalidRequest, MediaError, Unsupported
from triptych.request import Clip


def scene(mode: str = "RGB", size: tuple[int, int] = (7, 5)) -> Image.Image:
    """A picture whose every pixel is another."""
    levels = np.arange(size[0] * size[1] * 4, dtype=np.uint8).reshape(size[1], size[0], 4)
    return Image.fromarray(levels, "RGBA").convert(mode) if mode != "RGBA" else Image.fromarray(levels)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises any number of pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF", "WEBP", "JPEG", "AVIF"])
def test_reads_the_formats(format: str, tmp_path: Path) -> None:
    flat = Image.new("RGB", (20, 10), (250, 10, 30))
    path = tmp_path / "picture.bin"  # what a file is called says nothing
    path.write_bytes(encoded(flat, format))
    image = read_image(path)
    assert (image.mode, image.size, image.info) == ("RGB", (20, 10), {})
    assert np.abs(np.asarray(image, int) - np.asarray(flat, int)).max() <= 8


def test_bytes_read_as_files_do(tmp_path: Path) -> None:
    data = encoded(scene(), "PNG")
    assert np.array_equal(np.asarray(read_image(data)), np.asarray(scene()))


@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation_is_applied(turn: int) -> None:
    block = Image.Exif()
    block[0x0112] = turn
    image = read_image(encoded(scene(), "PNG", exif=block.tobytes()))
    from PIL import ImageOps

    with Image.open(io.BytesIO(encoded(scene(), "PNG", exif=block.tobytes()))) as reference:
        upright = ImageOps.exif_transpose(reference)
    assert np.array_equal(np.asarray(image), np.asarray(upright))


@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_in_both_byte_orders(order: str) -> None:
    mark = b"II*\0" if order == "<" else b"MM\0*"
    block = mark + struct.pack(order + "IHHHIHH", 8, 1, 0x0112, 3, 1, 6, 0)
    assert exif.orientation(block) == exif.orientation(b"Exif\0\0" + block) == 6


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"Exif\0\0",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0\xff\xff",
        b"II*\0" + struct.pack("<IHHHIHH", 8, 1, 0x0112, 3, 1, 99, 0),
        b"II*\0" + struct.pack("<IHHHII", 8, 1, 0x8769, 4, 1, 2**32 - 1),
    ],
)
def test_damaged_exif_is_no_exif(block: bytes) -> None:
    assert exif.orientation(block) == 1
    assert exif.user_comment(block) is None
    assert read_image(encoded(scene(), "PNG", exif=block or b"\0")).size == scene().size


def test_sixteen_bits_are_scaled() -> None:
    levels = np.array([[0, 128, 257, 32768, 65535]], np.uint16)
    image = read_image(encoded(Image.fromarray(levels), "PNG"))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_transparency_lies_over_white() -> None:
    clear = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    clear.putpixel((1, 0), (200, 0, 0, 255))
    assert np.asarray(read_image(encoded(clear, "PNG"))).tolist() == [[[255, 255, 255], [200, 0, 0]]]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    got = np.asarray(read_image(encoded(palette, "PNG", transparency=bytes([0, 255])))).tolist()
    assert got == [[[255, 255, 255], [10, 20, 30]]]
    assert np.asarray(read_image(encoded(palette, "PNG")))[0, 0].tolist() == [0, 0, 0]


def test_a_mask_is_grey() -> None:
    assert read_mask(encoded(scene(), "PNG")).mode == "L"


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>'
ANIMATED = encoded(
    Image.new("RGB", (4, 4), "red"), "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4), "blue")]
)
WRONG = {
    "empty": (b"", "0 bytes"),
    "text": (b"hello, this is no picture", "not a picture"),
    "svg": (SVG, "SVG"),
    "truncated png": (encoded(scene(size=(64, 64)), "PNG")[:-100], "damaged"),
    "truncated jpeg": (encoded(scene(size=(64, 64)), "JPEG")[:300], "damaged"),
    "truncated webp": (encoded(scene(size=(64, 64)), "WEBP")[:60], "damaged"),
    "header only": (b"\x89PNG\r\n\x1a\n", "damaged"),
    "flipped bytes": (encoded(scene(size=(64, 64)), "PNG").replace(b"IDAT", b"IDAT\xff\xff", 1), "damaged"),
    "bomb": (png_claiming(60_000, 60_000), "60000 × 60000"),
    "small bomb": (png_claiming(8193, 8192), "8193 × 8192"),
    "animated": (ANIMATED, "animated"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a picture"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refuses(name: str, tmp_path: Path) -> None:
    data, problem = WRONG[name]
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    with pytest.raises(MediaError) as caught:
        read_image(path)
    text = str(caught.value)
    assert text.startswith("image: given ") and "allowed: " in text and problem in text
    assert "\n" not in text


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "missing.png", tmp_path / "pipe", "a\0b.png"):
        with pytest.raises(MediaError):
            read_image(path)


def test_refuses_a_file_too_large() -> None:
    with pytest.raises(MediaError, match="at most 100 bytes"):
        read_image(encoded(scene(size=(64, 64)), "PNG"), max_bytes=100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_equal_diffusers(dtype: torch.dtype, channels: int) -> None:
    pixels = torch.rand(2, channels, 33, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    # Every level, and every point halfway between two of them.
    pixels[0, 0].view(-1)[:511] = (torch.arange(511) / 510).to(dtype)
    before = pixels.clone()
    expected = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pixels))
    for got in (to_images(pixels), to_images(to_uint8(pixels))):
        assert [image.mode for image in got] == [image.mode for image in expected]
        assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(got, expected, strict=True))
    assert torch.equal(pixels, before), "the caller's tensor is left alone"


def test_pixels_that_are_not_numbers_are_an_error() -> None:
    pixels = torch.zeros(1, 3, 4, 4)
    pixels[0, 0, 0, 0] = float("nan")
    with pytest.raises(Unsupported, match="not numbers"):
        to_images(pixels)


def test_pixels_of_a_wrong_shape_are_an_error() -> None:
    with pytest.raises(ValueError, match="expected 4 dimensions"):
        to_images(torch.zeros(3, 4, 4))


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg", ".jpeg", ".PNG"])
def test_writes_by_suffix(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture{suffix}"
    write_image(Image.new("RGB", (16, 8), "red"), path)
    with Image.open(path) as image:
        assert image.format == {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(suffix, "PNG")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_png_and_webp_lose_nothing(suffix: str, mode: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture{suffix}"
    write_image(scene(mode), path)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image.convert(mode)), np.asarray(scene(mode)))


def test_a_jpeg_of_a_transparent_picture_is_white_behind(tmp_path: Path) -> None:
    write_image(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), tmp_path / "a.jpg")
    assert np.asarray(read_image(tmp_path / "a.jpg")).min() >= 254


def test_an_unknown_suffix_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"output: .*allowed: \.png, \.webp, \.jpg, \.jpeg"):
        write_image(scene(), tmp_path / "a.tiff")


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("before")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"^output: given .*cannot be written"):
        write_image(scene(), tmp_path / "missing" / "a.png")


def test_files_are_as_public_as_others(tmp_path: Path) -> None:
    write_image(scene(), tmp_path / "a.png")
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("size", [(48, 32), (47, 33)])
def test_clips(size: tuple[int, int], tmp_path: Path) -> None:
    width, height = size
    ramp = np.linspace(0, 255, width, dtype=np.uint8)
    frames = np.stack(
        [
            np.stack(
                [np.full((height, width), 20 * i), np.tile(ramp, (height, 1)), np.tile(ramp[::-1], (height, 1))], -1
            )
            for i in range(9)
        ]
    ).astype(np.uint8)
    path = tmp_path / "clip.mp4"
    write_clip(Clip(frames, 23.976), path)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate or 0) == pytest.approx(23.976, abs=0.001)
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert decoded.shape == (9, height + height % 2, width + width % 2, 3)
    error = np.abs(decoded[:, :height, :width].astype(int) - frames)
    assert error.mean() < 4, "the colours survive"
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "the index comes first"


@pytest.mark.parametrize("fps", [0.0001, 0.013, 0.3, 1, 23.976, 60, 240])
def test_clips_play_at_the_rate_asked_for(fps: float, tmp_path: Path) -> None:
    write_clip(Clip(np.zeros((3, 16, 16, 3), np.uint8), fps), tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert float(stream.average_rate or 0) == pytest.approx(fps, rel=1e-4)
        times = [frame.time for frame in container.decode(stream)]
    assert times == pytest.approx([0, 1 / fps, 2 / fps], rel=1e-4)


@pytest.mark.parametrize("fps", [1e-5, 1e-300, 5e9])
def test_a_rate_that_no_file_can_hold_is_refused(fps: float, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"^fps: given .*; allowed: 0\.0001 to "):
        write_clip(Clip(np.zeros((3, 16, 16, 3), np.uint8), fps), tmp_path / "clip.mp4")
    assert list(tmp_path.iterdir()) == []


def test_clips_from_pixels() -> None:
    pixels = torch.rand(2, 5, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    clips = to_clips(pixels, 12.0)
    assert [clip.frames.shape for clip in clips] == [(5, 4, 6, 3)] * 2
    expected = [np.asarray(image) for image in to_images(pixels[1])]
    assert np.array_equal(clips[1].frames, np.stack(expected))

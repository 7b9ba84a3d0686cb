"""Files and forms that nobody should send: pictures, addresses of pictures, multipart bodies, tensors."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
from PIL import Image, PngImagePlugin

from tests.e2e.corpus import JSON, MAX_BODY, PROMPT, ROUTES, Case

__all__ = ["uploads"]


def uploads() -> Iterator[Case]:
    """Pictures, forms, tensors."""
    yield from _pictures()
    yield from _forms()
    yield from _tensors()


# Pictures


def _png(size: tuple[int, int] = (8, 8), mode: str = "RGB", **options: Any) -> bytes:
    made = io.BytesIO()
    Image.new(mode, size).save(made, "PNG", **options)
    return made.getvalue()


def _saved(format: str, mode: str = "RGB", **options: Any) -> bytes:
    made = io.BytesIO()
    Image.new(mode, (8, 8)).save(made, format, **options)
    return made.getvalue()


def _chunk(kind: bytes, data: bytes, checksum: int | None = None) -> bytes:
    found = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", found)


def _made_png(
    width: int, height: int, pixels: bytes = b"", *, depth: int = 8, colour: int = 2, crc: int | None = None
) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = _chunk(b"IDAT", zlib.compress(pixels)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header, crc) + body


def _text_bomb() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("bomb", "0" * 30_000_000, zip=True)
    return _png(pnginfo=info)


def _animated(format: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in (0, 255)]
    made = io.BytesIO()
    frames[0].save(made, format, save_all=True, append_images=frames[1:], duration=100)
    return made.getvalue()


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _saved("JPEG", exif=exif)


def pictures() -> dict[str, tuple[bytes, bool]]:
    """Files that claim to be pictures, and whether one must be refused."""
    png, jpeg = _png(), _saved("JPEG")
    return {
        "nothing": (b"", True),
        "a byte": (b"\x89", True),
        "text": (b"hello", True),
        "zeros": (bytes(1000), True),
        "a PNG's first half": (png[: len(png) // 2], True),
        "a PNG's signature": (png[:8], True),
        "a JPEG's first third": (jpeg[: len(jpeg) // 3], True),
        "a PNG with a wrong checksum": (_made_png(8, 8, bytes(200), crc=0), True),
        "a PNG of no pixels": (_made_png(0, 0), True),
        "a PNG of no width": (_made_png(0, 8), True),
        "a PNG without its pixels": (_made_png(64, 64), True),
        "a PNG that says it is huge": (_made_png(2**31 - 1, 2**31 - 1), True),
        "a PNG of a billion pixels": (_made_png(32_000, 32_000, bytes(1000)), True),
        "a PNG of an impossible depth": (_made_png(8, 8, bytes(200), depth=7), True),
        "a PNG of an impossible colour": (_made_png(8, 8, bytes(200), colour=5), True),
        "a PNG with a text bomb": (_text_bomb(), False),
        "an animated PNG": (_animated("PNG"), True),
        "an animated GIF": (_animated("GIF"), True),
        "an animated WebP": (_animated("WEBP"), True),
        "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><script>1</script></svg>', True),
        "an SVG with an entity": (b'<!DOCTYPE s [<!ENTITY x SYSTEM "/etc/passwd">]><svg>&x;</svg>', True),
        "HTML": (b"<html><img src=x onerror=alert(1)></html>", True),
        "a PDF": (b"%PDF-1.4\n1 0 obj<<>>endobj\ntrailer<<>>\n%%EOF", True),
        "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n", True),
        "a ZIP": (b"PK\x05\x06" + bytes(18), True),
        "an MP4": (b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00mp42isom" + bytes(64), True),
        "a TIFF": (_saved("TIFF"), True),
        "an ICO": (_saved("ICO"), True),
        "a PPM": (_saved("PPM"), True),
        "a TGA": (_saved("TGA"), True),
        "a PNG and a ZIP in one": (png + b"PK\x05\x06" + bytes(18), False),
        "a PNG and a script in one": (png + b"<script>alert(1)</script>", False),
        "a JPEG and a PNG in one": (jpeg + png, False),
        "a PNG of 16 bits": (_png(mode="I;16"), False),
        "a PNG of one bit": (_png(mode="1"), False),
        "a PNG with a palette": (_png(mode="P"), False),
        "a PNG with alpha": (_png(mode="LA"), False),
        "a CMYK JPEG": (_saved("JPEG", mode="CMYK"), False),
        "a JPEG that lies on its side": (_turned(), False),
        "a PNG of one pixel": (_png((1, 1)), False),
        "a line of pixels": (_png((4000, 1)), False),
    }


ADDRESSES = [
    "", "data:", "data:,", "data:image/png", "data:image/png;base64", "data:image/png;base64,", "data:image/png,abc",
    "data:image/png;base64,@@@@", "data:image/png;base64,AAA", "data:text/html;base64,PGI+", "data:;base64,AAAA",
    "DATA:IMAGE/PNG;BASE64,AAAA", "data:image/png;base64,A%41AA", "data:image/png;base64,AA\u0000AA",
    "/etc/passwd", "file:" + "///etc/passwd", "../../../../etc/passwd",
    "C:\\windows\\win.ini", "\\\\host\\share\\x.png",
    "ftp://127.0.0.1/x.png", "gopher://127.0.0.1:6379/_INFO", "http://", "http://127.0.0.1:1/x.png",
    "http://169.254.169.254/latest/meta-data/", "http://[::1]/x.png", "http://[::ffff:127.0.0.1]/x.png",
    "http://0x7f000001/", "http://2130706433/", "http://localhost:1/x", "https://user:pass@127.0.0.1/x.png",
    "http://127.0.0.1\r\nHost: evil/", "http://exa mple/x.png", "javascript:alert(1)", "x" * 100_000,
]  # fmt: skip


def _pictures() -> Iterator[Case]:
    asked: dict[str, Callable[[str], dict[str, Any]]] = {
        "/v1/jobs": lambda url: {"prompt": PROMPT, "images": [url]},
        "/generate": lambda url: {**ROUTES["/generate"], "image_urls": [url]},
        "/v1/tasks/image/": lambda url: {**ROUTES["/v1/tasks/image/"], "image_path": url},
    }
    for path, body in asked.items():
        for name, (data, refused) in pictures().items():
            url = "data:image/png;base64," + base64.b64encode(data).decode()
            yield Case(f"{path}: picture, {name}", "POST", path, json.dumps(body(url)).encode(), JSON, refused)
        for number, url in enumerate(ADDRESSES):
            # An empty path is how LightX2V says that there is no picture.
            refused = bool(url) or path != "/v1/tasks/image/"
            content = json.dumps(body(url)).encode()
            yield Case(f"{path}: picture at {url[:50]!r} ({number})", "POST", path, content, JSON, refused)
    for number, url in enumerate(ADDRESSES):
        content = json.dumps({"prompt": PROMPT, "images": ["data:image/png;base64," + "AAAA"], "mask": url}).encode()
        yield Case(f"/v1/jobs: mask at {url[:50]!r} ({number})", "POST", "/v1/jobs", content, JSON)


# Forms

BOUNDARY = "xxBOUNDARYxx"

HEADS = [
    "multipart/form-data", "multipart/form-data; boundary=", f"multipart/form-data; boundary={'b' * 300}",
    "multipart/mixed; boundary=x", 'multipart/form-data; boundary="', "text/plain", "",
]  # fmt: skip
"""Content types of which none says what bounds the parts."""


def part(head: str, data: bytes) -> bytes:
    return f"--{BOUNDARY}\r\n{head}\r\n\r\n".encode() + data + b"\r\n"


def _forms() -> Iterator[Case]:
    png = _png()
    prompt = part('Content-Disposition: form-data; name="prompt"', b"a red apple")
    image = part('Content-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png', png)
    end = f"--{BOUNDARY}--\r\n".encode()

    def named(name: str, filename: str = "a.png", data: bytes = png) -> bytes:
        head = f'Content-Disposition: form-data; name="{name}"; filename="{filename}"'
        return part(f"{head}\r\nContent-Type: image/png", data)

    forms: dict[str, tuple[bytes, bool]] = {
        "nothing": (b"", True),
        "only its end": (end, True),
        "no end": (prompt + image, True),
        "cut in a part": ((prompt + image)[:-40], True),
        "cut in a head": (prompt + f"--{BOUNDARY}\r\nContent-Dispo".encode(), True),
        "another boundary": ((prompt + image + end).replace(b"xxB", b"yyB"), True),
        "no names": (part("Content-Type: image/png", png) + end, True),
        "a part without a head": (prompt + f"--{BOUNDARY}\r\n\r\nx\r\n".encode() + end, True),
        "a head of 100 KB": (part("Content-Disposition: form-data; name=" + "a" * 100_000, b"x") + end, True),
        "a thousand fields": (prompt + named("image") + b"".join(part(
            f'Content-Disposition: form-data; name="f{number}"', b"x") for number in range(1000)) + end, True),
        "a thousand files": (prompt + named("image[]") * 1000 + end, True),
        "more than it takes": (prompt + named("image", data=bytes(MAX_BODY)) + end, True),
        "no picture": (prompt + end, True),
        "no prompt": (image + end, True),
        "two prompts": (prompt * 2 + image + end, False),
        "a picture as text": (prompt + part('Content-Disposition: form-data; name="image"', b"x") + end, True),
        "a prompt as a file": (named("prompt", data=b"a red apple") + image + end, False),
        "a prompt that is no UTF-8": (
            part('Content-Disposition: form-data; name="prompt"', b"\xff\xfe") + image + end, True),
        "a picture that is none": (prompt + named("image", data=b"hello") + end, True),
        "a path for a name": (prompt + named("image", "../../../etc/passwd", b"x") + end, True),
        "a NUL in a name": (prompt + named("image", "a\x00.png", b"x") + end, True),
        "a name of 10 KB": (prompt + named("image", "a" * 10_000, b"x") + end, True),
        "a mask alone": (prompt + named("mask") + end, True),
        "a mask that is none": (prompt + image + named("mask", data=b"x") + end, True),
        "base64 by name": (prompt + part(
            'Content-Disposition: form-data; name="image"\r\nContent-Transfer-Encoding: base64', b"iVBO") + end, True),
        "JSON": (b'{"prompt": "a"}', True),
        "bytes": (bytes(range(256)) * 8, True),
        "a number that is none": (
            prompt + image + part('Content-Disposition: form-data; name="n"', b"many") + end, True),
        "a size that is none": (
            prompt + image + part('Content-Disposition: form-data; name="size"', b"big") + end, True),
    }  # fmt: skip
    kind = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    for path in ("/v1/images/edits", "/v1/videos", "/v1/files"):
        for name, (content, refused) in forms.items():
            yield Case(f"{path}: form, {name}", "POST", path, content, kind, refused or path != "/v1/images/edits")
        for head in HEADS:
            yield Case(f"{path}: form as {head[:45]!r}", "POST", path, prompt + image + end, {"content-type": head})


# Tensors, for diffusers' remote VAE


def _tensors() -> Iterator[Case]:
    right = {"shape": "[1, 16, 8, 8]", "dtype": "float32"}
    size = 16 * 8 * 8 * 4
    numbers = bytes(size)
    nan = struct.pack("<f", float("nan")) * (size // 4)
    tensors: dict[str, tuple[dict[str, Any], bytes]] = {
        "nothing": (right, b""),
        "a byte short": (right, numbers[:-1]),
        "a byte long": (right, numbers + b"x"),
        "no numbers": (right, nan),
        "infinite": (right, struct.pack("<f", float("inf")) * (size // 4)),
        "no shape": ({"dtype": "float32"}, numbers),
        "no type": ({"shape": "[1, 16, 8, 8]"}, numbers),
        "a shape that is none": ({**right, "shape": "big"}, numbers),
        "a shape that is code": ({**right, "shape": "__import__('os')"}, numbers),
        "a shape of words": ({**right, "shape": '["a"]'}, numbers),
        "a shape of nothing": ({**right, "shape": "[]"}, numbers),
        "a shape below nothing": ({**right, "shape": "[1, -16, -8, 8]"}, numbers),
        "a shape with a zero": ({**right, "shape": "[1, 16, 0, 8]"}, b""),
        "a shape above all": ({**right, "shape": "[1, 16, 1000000000, 1000000000]"}, numbers),
        "a shape of many sides": ({**right, "shape": str([1] * 1000)}, numbers),
        "other channels": ({**right, "shape": "[1, 5, 8, 8]"}, bytes(5 * 8 * 8 * 4)),
        "a type that is none": ({**right, "dtype": "object"}, numbers),
        "a type of strings": ({**right, "dtype": "U8"}, numbers),
        "scaled by nothing": ({**right, "scaling_factor": "nan"}, numbers),
        "scaled by a word": ({**right, "scaling_factor": "much"}, numbers),
        "shifted without end": ({**right, "shift_factor": "inf"}, numbers),
        "to nothing": ({**right, "output_type": "exe"}, numbers),
        "to another picture": ({**right, "image_format": "svg"}, numbers),
        "of a height that is none": ({**right, "height": "tall", "width": "wide"}, numbers),
        "of a height below all": ({**right, "height": "-1", "width": "-1"}, numbers),
        "more than it takes": (right, bytes(MAX_BODY + 1)),
        "pickle": (right, b"\x80\x04" + bytes(size - 2) + b"."),
    }
    kind = {"content-type": "tensor/binary"}
    for name, (parameters, content) in tensors.items():
        query = str(httpx.QueryParams(parameters))
        yield Case(f"/v1/vae/decode: {name}", "POST", f"/v1/vae/decode?{query}", content, kind)
    for name, (data, refused) in pictures().items():
        yield Case(f"/v1/vae/encode: {name}", "POST", "/v1/vae/encode", data, {"content-type": "image/png"}, refused)
    for word in ("nan", "inf", "much", ""):
        path = f"/v1/vae/encode?scaling_factor={word}"
        yield Case(f"{path}, of a picture", "POST", path, _png(), {"content-type": "image/png"}, bool(word))

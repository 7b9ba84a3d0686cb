"""Forms as hostile clients send them: bounded, never a server error, never half of what was sent."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.server.conftest import LOCAL
from tests.server.fake import FakeEngine
from tests.server.test_openai_images import picture, refused
from triptych.config import ServeSection
from triptych.server import create_app

EDITS = "/v1/images/edits"


def part(name: str, value: bytes, more: str = "") -> bytes:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + value + b"\r\n"


def sent(client: TestClient, body: Any, kind: str = "multipart/form-data; boundary=b") -> Any:
    return client.post(EDITS, content=body, headers={"Content-Type": kind})


WHOLE = part("prompt", b"a hat") + part("image", picture(), '; filename="../../x.png"') + b"--b--\r\n"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"x", b"--b", b"--b\r\n", WHOLE[:-8], WHOLE[: len(WHOLE) // 2], b"--c" + WHOLE[3:], b"\x00" * 500,
        b"--b\r\n\r\nvalue\r\n--b--\r\n", b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
        b"--b\r\nContent-Disposition\r\n\r\nx\r\n--b--\r\n", b"--b\r\n" + b"A" * 90_000 + b": x\r\n\r\nx\r\n--b--\r\n",
        part("prompt", b"a") * 200 + b"--b--\r\n", part("image", b"a", '; filename="x"') * 40 + b"--b--\r\n",
        b"--b\r\n" + b"X-A: b\r\n" * 5000 + b"\r\nx\r\n--b--\r\n",
    ],
    ids=range(15),
)  # fmt: skip
def test_a_damaged_form_is_400(client: TestClient, engine: FakeEngine, body: bytes) -> None:
    message = refused(sent(client, body), 400, "invalid_request", "body")
    assert "not a valid form" in message and not engine.submitted


@pytest.mark.parametrize(
    "kind", ["multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "b" * 5000]
)
def test_a_form_without_a_proper_boundary_is_400(client: TestClient, kind: str) -> None:
    refused(sent(client, WHOLE, kind), 400, "invalid_request", "body")


@pytest.mark.parametrize(
    "kind", ["application/json", "application/x-www-form-urlencoded", "text/plain", "", "multipart"]
)
def test_other_bodies_are_415(client: TestClient, kind: str) -> None:
    refused(sent(client, WHOLE, kind), 415, "wrong_media_type", "content-type")


def test_a_large_form_is_413_whether_it_is_announced_or_not(client: TestClient, engine: FakeEngine) -> None:
    body = part("image", b"x" * 100_001, '; filename="x"') + b"--b--\r\n"
    refused(sent(client, body), 413, "body_too_large", "body")
    refused(sent(client, (body[at : at + 9_000] for at in range(0, len(body), 9_000))), 413, "body_too_large", "body")
    assert not engine.submitted


@pytest.mark.parametrize(
    ("name", "value", "param"),
    [
        ("n", b"9" * 5000, "n"), ("n", b"\xff", "n"), ("n", b"", "n"), ("guidance_scale", b"nan", "guidance_scale"),
        ("guidance_scale", b"1e999", "guidance_scale"), ("strength", b"nan", "strength"), ("shift", b"inf", "shift"),
        ("sigmas", b"nan", "sigmas"), ("seed", b"1_000.5", "seed"), ("deadline", b"inf", "deadline"),
        ("extra[a]", b"[" * 9000, None), ("extra[a][b]", b"1", "extra[a][b]"), ("[]", b"1", ""), ("", b"1", ""),
        ("__class__", b"1", "__class__"), ("model_config", b"1", "model_config"),
    ],
)  # fmt: skip
def test_odd_fields_are_no_server_errors(
    client: TestClient, engine: FakeEngine, name: str, value: bytes, param: Any
) -> None:
    engine.missing = ("denoise",)  # what is not refused as wrong is not begun either
    answer = sent(client, part(name, value) + WHOLE)
    if param is None:
        refused(answer, 503, "no_worker", None)
    else:
        refused(answer, 400, "invalid_request", param)


@pytest.mark.parametrize(
    "charset", ["undefined", "idna", "punycode", "utf-7", "utf-16", "rot13", "hex", "none", "", "x" * 99]
)
def test_text_is_utf_8_or_the_form_is_refused(client: TestClient, engine: FakeEngine, charset: str) -> None:
    answer = sent(client, WHOLE, f"multipart/form-data; boundary=b; charset={charset}")
    message = refused(answer, 415, "wrong_media_type", "content-type")
    assert "allowed: utf-8" in message and not engine.submitted


@pytest.mark.parametrize("charset", ["utf-8", "UTF-8", '"utf-8"', "us-ascii"])
def test_utf_8_may_be_said(client: TestClient, engine: FakeEngine, charset: str) -> None:
    engine.missing = ("denoise",)
    refused(sent(client, WHOLE, f"multipart/form-data; boundary=b; charset={charset}"), 503, "no_worker", None)


@pytest.mark.parametrize("value", [b"[" + b"[]," * 15_000 + b"1]", b"[" + b"1," * 100_001 + b"1]", b'{"a":' * 10_001])
def test_a_value_of_too_many_values_is_refused(client: TestClient, engine: FakeEngine, value: bytes) -> None:
    engine.missing = ("denoise",)
    if len(value) > 90_000:
        client = TestClient(create_app(engine, ServeSection(), version="1"), LOCAL)
    message = refused(sent(client, part("extra[a]", value) + WHOLE), 400, "invalid_request", "extra[a]")
    assert "at most 100000 commas" in message

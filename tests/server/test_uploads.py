"""Pictures sent ahead: kept for a while, within bounds, and seen by nobody else."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.server.conftest import LOCAL
from tests.server.fake import FakeEngine
from triptych.config import ServeSection
from triptych.errors import QueueFull
from triptych.server import create_app, uploads
from triptych.server.errors import UploadNotFound
from triptych.server.locks.keys import ApiKey, KeyRing
from triptych.server.uploads import KEPT_SECONDS, MAX_FILES, Uploads


def png(side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), "blue").save(buffer, "PNG")
    return buffer.getvalue()


def refused(answer: Any, status: int, code: str, param: str | None) -> None:
    assert answer.status_code == status, answer.text
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == (code, param)


def test_an_upload_is_kept_shown_and_deleted(client: TestClient) -> None:
    sent = client.post("/v1/files", files={"file": ("../../a.png", png())}, data={"purpose": "vision"})
    assert sent.status_code == 200, sent.text
    found = sent.json()
    assert found["id"].startswith("file-") and len(found["id"]) == 37 and found["filename"] == found["id"]
    assert (found["bytes"], found["purpose"], found["status"]) == (len(png()), "vision", "processed")
    assert found["expires_at"] - found["created_at"] == KEPT_SECONDS
    assert client.get(f"/v1/files/{found['id']}").json() == found
    gone = client.delete(f"/v1/files/{found['id']}")
    assert gone.json() == {"id": found["id"], "object": "file", "deleted": True}
    refused(client.get(f"/v1/files/{found['id']}"), 404, "upload_not_found", "file")
    refused(client.delete(f"/v1/files/{found['id']}"), 404, "upload_not_found", "file")


def test_what_is_no_picture_or_no_upload_is_refused(client: TestClient) -> None:
    refused(client.post("/v1/files", files={"file": b"not a picture"}), 400, "invalid_media", "file[0]")
    refused(client.post("/v1/files", data={"file": "text"}), 415, "wrong_media_type", "content-type")
    refused(client.post("/v1/files", files={"other": png()}), 400, "invalid_request", "body")
    refused(client.post("/v1/files", files=[("file", png()), ("file", png())]), 400, "invalid_request", "file")
    wrong = client.post("/v1/files", files={"file": png()}, data={"purpose": "x" * 65})
    refused(wrong, 400, "invalid_request", "purpose")
    refused(client.post("/v1/files", files={"file": b"x" * 100_000}), 413, "body_too_large", "body")


def test_another_key_cannot_use_see_or_delete_it() -> None:
    ring = KeyRing([ApiKey(name, hashlib.sha256(name.encode()).digest()) for name in ("one", "two")])
    engine = FakeEngine()
    one, two = ({"Authorization": f"Bearer {name}"} for name in ("one", "two"))
    with TestClient(create_app(engine, ServeSection(), version="1", keys=ring), LOCAL) as client:
        id = client.post("/v1/files", files={"file": png()}, headers=one).json()["id"]
        refused(client.get(f"/v1/files/{id}", headers=two), 404, "upload_not_found", "file")
        refused(client.delete(f"/v1/files/{id}", headers=two), 404, "upload_not_found", "file")
        answer = client.post("/generate", json={"prompt": "a", "image_urls": [id]}, headers=two)
        assert (answer.status_code, answer.json()["field"]) == (422, "image_urls[0]")
        assert client.get(f"/v1/files/{id}", headers=one).status_code == 200
        assert client.post("/v1/files", files={"file": png()}).status_code == 401
    assert not engine.submitted


def test_they_expire() -> None:
    now = [1000.0]
    kept = Uploads(wall=lambda: now[0])
    id = kept.add("me", b"x", "vision").id
    now[0] += KEPT_SECONDS - 1
    assert kept.get("me", id).data == b"x"
    now[0] += 1
    with pytest.raises(UploadNotFound):
        kept.get("me", id)


def test_each_caller_has_room_for_so_many_and_all_together_for_so_much(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    kept = Uploads(wall=lambda: now[0])
    ids = [kept.add("me", b"x", "").id for _ in range(MAX_FILES)]
    now[0] = KEPT_SECONDS - 10
    with pytest.raises(QueueFull, match="64 uploads") as caught:
        kept.add("me", b"x", "")
    assert caught.value.retry_after == 10
    kept.add("you", b"x", "")
    kept.remove("me", ids[0])
    kept.add("me", b"x", "")
    monkeypatch.setattr(uploads, "MAX_BYTES", 100)
    with pytest.raises(QueueFull, match="100 bytes of one API key"):
        kept.add("you", bytes(100), "")
    kept.add("you", bytes(99), "")
    monkeypatch.setattr(uploads, "MAX_ALL_BYTES", 200)
    with pytest.raises(QueueFull, match="200 bytes of uploads"):
        kept.add("they", bytes(50), "")
    now[0] = KEPT_SECONDS
    kept.add("they", bytes(50), "")

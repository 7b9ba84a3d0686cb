"""API keys: a file that is read again when it changes, a variable of the environment, and who is let in by them."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.server.conftest import LOCAL
from tests.server.fake import FakeEngine
from triptych.config import ServeSection
from triptych.errors import InvalidRequest, LoadError, TriptychError
from triptych.server import KeyRing, create_app, key_ring, make_key, remove_key
from triptych.server.errors import Forbidden, NotAuthenticated
from triptych.server.locks.keys import ApiKey, Caller


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "api.keys"


def test_without_keys_everybody_is_an_admin() -> None:
    ring = KeyRing()
    assert not ring and ring.caller(None) == ring.caller("Bearer anything") == Caller("", admin=True)


def test_a_key_is_its_holder_and_nothing_else_is(file: Path) -> None:
    alice, bob = make_key(file, "alice", admin=True), make_key(file, "bob")
    ring = KeyRing(file=file)
    assert ring and ring.caller(f"Bearer {alice}") == Caller("alice", admin=True)
    assert ring.caller(f"bearer  {bob} ") == Caller("bob", admin=False), "schemes have no case"
    digest = hashlib.sha256(alice.encode()).hexdigest()
    for wrong in (None, "", "Bearer", "Bearer ", alice, f"Basic {alice}", f"Bearer {alice[:-1]}", f"Bearer {alice} x",
                  f"Bearer {alice.upper()}", f"Bearer {digest}", "Bearer alice", f"Bearer {alice}\xff"):  # fmt: skip
        with pytest.raises(NotAuthenticated) as refused:
            ring.caller(wrong)
        assert alice not in str(refused.value) and digest not in str(refused.value)
    assert ring.caller(f"Bearer {alice}").as_admin().name == "alice"
    with pytest.raises(Forbidden):
        ring.caller(f"Bearer {bob}").as_admin()


def test_every_key_is_compared_whoever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = KeyRing(ApiKey.of(name, f"key-of-{name}") for name in "abc")
    compared: list[bytes] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert ring.caller("Bearer key-of-a").name == "a" and len(compared) == 3
    with pytest.raises(NotAuthenticated):
        ring.caller("Bearer nobody")
    assert len(compared) == 6


def test_the_file_is_private_and_holds_no_key(file: Path) -> None:
    key = make_key(file, "alice")
    assert file.stat().st_mode & 0o777 == 0o600 and key not in file.read_text()
    assert key.startswith("tk_") and len(key) == 46 and make_key(file, "bob") != key
    assert list(file.parent.iterdir()) == [file], "nothing is left beside it"
    file.chmod(0o640)
    with pytest.raises(LoadError, match=r"open permissions \(0640\): chmod 600"):
        KeyRing(file=file)


def test_added_and_removed_keys_count_from_the_next_request_on(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    alice = make_key(file, "alice")
    ring = KeyRing(file=file)
    bob = make_key(file, "bob", admin=True)
    assert ring.caller(f"Bearer {bob}").admin
    remove_key(file, "alice")
    with pytest.raises(NotAuthenticated):
        ring.caller(f"Bearer {alice}")
    remove_key(file, "bob")
    for _ in range(2):
        with pytest.raises(NotAuthenticated):
            ring.caller(f"Bearer {bob}")
    assert ring, "a file that was emptied lets nobody in, instead of everybody"
    assert alice not in caplog.text and bob not in caplog.text


def test_a_file_that_breaks_meanwhile_locks_nobody_out(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    alice = make_key(file, "alice")
    ring = KeyRing(file=file)
    whole = file.read_text()
    file.write_text(f"{whole}bob {alice}\n")
    with caplog.at_level(logging.ERROR):
        assert ring.caller(f"Bearer {alice}").name == "alice"
    assert "line 3: allowed after the name: the key's SHA-256" in caplog.text and alice not in caplog.text
    caplog.clear()
    file.unlink()
    for _ in range(3):
        assert ring.caller(f"Bearer {alice}").name == "alice"
    assert caplog.text.count("the API keys stay as they were") == 1, "said once, not at every request"
    file.write_text(whole)
    file.chmod(0o600)
    assert ring.caller(f"Bearer {alice}").name == "alice"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "it has no keys; `triptych keys api` makes one"),
        ("# only a remark\n\n", "it has no keys"),
        ("alice\n", "line 1: allowed: NAME SHA256"),
        (f"alice {'0' * 64} boss\n", "line 1: allowed: NAME SHA256"),
        (f"alice {'0' * 64} admin more\n", "line 1: allowed: NAME SHA256"),
        (f"# first\nal/ice {'0' * 64}\n", "line 2: allowed as a name"),
        (f"alice {'0' * 63}\n", "line 1: allowed after the name"),
        (f"alice {'A' * 64}\n", "line 1: allowed after the name"),
        (f"alice {'0' * 64}\nbob {'1' * 64} # a remark\nalice {'2' * 64}\n", "line 3: a second key named alice"),
        ("\udcff", "no text"),
        ("#" * 2**20 + "\n", "more than a megabyte"),
    ],
    ids=range(11),
)
def test_a_wrong_line_is_told_by_its_number(file: Path, text: str, problem: str) -> None:
    file.write_bytes(text.encode(errors="surrogateescape"))
    file.chmod(0o600)
    with pytest.raises(LoadError, match=problem) as wrong:
        KeyRing(file=file)
    assert wrong.value.field == "api_keys" and "0000" not in wrong.value.message


def test_a_file_that_is_not_there_or_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(LoadError, match="cannot be read"):
            KeyRing(file=path)
    with pytest.raises(InvalidRequest, match="cannot be written"):
        make_key(tmp_path / "no" / "folder", "alice")


def test_keys_from_the_environment_are_taken_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOOR", f"alice:{'a' * 20}:admin, bob:{'b' * 20}\ncarol:{'c' * 20}")
    ring = key_ring(ServeSection(api_keys_env="DOOR"))
    assert "DOOR" not in os.environ, "worker processes inherit it"
    assert ring.caller(f"Bearer {'a' * 20}") == Caller("alice", admin=True)
    assert ring.caller(f"Bearer {'c' * 20}") == Caller("carol", admin=False)
    assert not key_ring(ServeSection())


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "the environment has no DOOR, or nothing in it"),
        (" , ", "the environment has no DOOR"),
        ("a" * 20, "DOOR, entry 1: allowed: NAME:KEY"),
        (f"alice:{'a' * 20}, bob:short", "DOOR, entry 2: allowed: NAME:KEY"),
        (f"alice:{'a' * 20}:boss", "DOOR, entry 1: allowed"),
        (f"alice:{'a' * 20}:", "DOOR, entry 1: allowed"),
        (f":{'a' * 20}", "DOOR, entry 1: allowed"),
        (f"alice:{'a' * 20} alice:{'b' * 20}", "DOOR, entry 2: a second key named alice"),
    ],
)
def test_what_is_wrong_in_the_environment(monkeypatch: pytest.MonkeyPatch, value: str | None, problem: str) -> None:
    monkeypatch.delenv("DOOR", raising=False)
    if value is not None:
        monkeypatch.setenv("DOOR", value)
    with pytest.raises(LoadError, match=problem) as wrong:
        key_ring(ServeSection(api_keys_env="DOOR"))
    assert "aaaa" not in str(wrong.value) and wrong.value.field == "api_keys_env"


def test_one_source_of_keys_is_enough(file: Path) -> None:
    with pytest.raises(InvalidRequest, match="nothing beside api_keys"):
        key_ring(ServeSection(api_keys_env="DOOR", api_keys=file))


@pytest.mark.parametrize("name", ["", "a b", "../a", "é", "a" * 65, "-a", "#a"])
def test_a_name_is_plain(file: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match="letters, digits"):
        make_key(file, name)
    assert not file.exists()


def test_names_are_taken_once_and_removed_by_name(file: Path) -> None:
    make_key(file, "alice")
    before = file.read_bytes()
    wrong: list[tuple[Any, str]] = [(make_key, "alice"), (remove_key, "bob")]
    for change, name in wrong:
        with pytest.raises(TriptychError, match="alice"):
            change(file, name)
    assert file.read_bytes() == before
    file.write_bytes(before + b"# kept\n" + f"bob {'1' * 64}".encode())
    make_key(file, "carol")
    remove_key(file, "alice")
    assert [line.split()[0] for line in file.read_text().splitlines()] == ["#", "#", "bob", "carol"]


def test_over_http(file: Path, engine: FakeEngine) -> None:
    alice, bob = make_key(file, "alice", admin=True), make_key(file, "bob")
    app = create_app(engine, ServeSection(), version="1", keys=KeyRing(file=file))
    with TestClient(app, LOCAL) as client:
        for headers in ({}, bearer("nobody"), {"Authorization": alice}, {"X-Api-Key": alice}):
            answer = client.post("/v1/jobs", json={"prompt": "a cat"}, headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert answer.json()["error"]["code"] == "not_authenticated"
        assert client.post(f"/v1/jobs?api_key={alice}", json={"prompt": "a cat"}).status_code == 401
        assert client.post("/v1/jobs", json={"prompt": "a cat"}, headers=bearer(bob)).status_code == 202
        assert engine.submitted[0][1]["client"] == "bob" and len(engine.submitted) == 1
        assert client.get("/v1/cluster", headers=bearer(bob)).status_code == 403
        assert client.get("/v1/cluster").status_code == 401
        assert client.get("/v1/cluster", headers=bearer(alice)).status_code == 200
        assert client.get("/health").status_code == 200, "whoever watches a server needs no key"
        remove_key(file, "bob")
        assert client.post("/v1/jobs", json={"prompt": "a cat"}, headers=bearer(bob)).status_code == 401

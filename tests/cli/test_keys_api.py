"""`triptych keys api`, and `triptych serve` behind keys: who is let in, on which addresses, and what the log says."""

from __future__ import annotations

import importlib
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cli.test_serve import Server, start  # noqa: F401
from triptych.cli import main
from triptych.errors import Unsupported
from triptych.server import KeyRing


def made(file: Path, name: str, *words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """A key from the command line."""
    assert main(["keys", "api", name, "--file", str(file), *words]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1 and not printed.err
    return printed.out.strip()


def test_a_key_is_printed_once_and_kept_as_its_digest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "api.keys"
    alice = made(file, "alice", "--admin", capsys=capsys)
    bob = made(file, "bob", capsys=capsys)
    ring = KeyRing(file=file)
    assert ring.caller(f"Bearer {alice}").admin and not ring.caller(f"Bearer {bob}").admin
    assert alice not in file.read_text() and file.stat().st_mode & 0o777 == 0o600
    assert main(["keys", "api", "alice", "--file", str(file), "--remove"]) == 0
    assert capsys.readouterr().out == "" and "alice" not in file.read_text() and "bob" in file.read_text()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["alice", "--file", "{file}"], "name: given 'alice'; allowed: one that is not in {file} yet; --remove takes"),
        (["bob", "--file", "{file}", "--remove"], "name: given 'bob'; allowed: alice"),
        (["a b", "--file", "{file}"], "name: given 'a b'; allowed: letters, digits"),
        (["bob", "--file", "{file}", "--admin", "--remove"], "admin: given True; allowed: nothing beside --remove"),
        (["bob", "--file", "{folder}/none/x"], "file: {folder}/none/x cannot be written: No such file"),
        (["bob", "--file", "{folder}/none", "--remove"], "api_keys: {folder}/none cannot be read: No such file"),
        (["bob"], "Missing option '--file'"),
        ([], "Missing argument 'NAME'"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], line: str, short_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = short_path / "api.keys"
    made(file, "alice", capsys=capsys)
    before = file.read_text()
    words = [word.format(file=file, folder=short_path) for word in arguments]
    assert main(["keys", "api", *words]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {line.format(file=file, folder=short_path)}") and printed.count("\n") == 1
    assert file.read_text() == before


def test_a_folder_of_keys_for_workers_may_be_called_anything_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["one"], ["workers", "two"], ["./api"]):
        assert main(["keys", *words]) == 0
    assert capsys.readouterr().out.split() == ["one/server.key", "two/server.key", "api/server.key"]
    assert main(["keys", "--help"]) == 0
    assert "api" in capsys.readouterr().out


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that a server came to open; none is."""
    models: list[str] = []

    def opening(model: str, *rest: Any) -> None:
        models.append(model)
        raise Unsupported("opened")

    monkeypatch.setattr(importlib.import_module("triptych.cli.serve"), "open_engine", opening)
    return models


def test_a_public_address_wants_keys(tmp_path: Path, opened: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    layout = tmp_path / "layout.yaml"
    layout.write_text("workers: [{stages: all}]\nserve: {host: 0.0.0.0, port: 0}\n")
    refused = (
        "error: host: given '0.0.0.0'; allowed: 127.0.0.1, or any with --api-keys FILE, or with --insecure, which lets "
        "everybody in who reaches it\n"
    )
    for words in (["--host", "0.0.0.0", "--port", "0"], ["--layout", str(layout)]):
        assert main(["serve", "toy", *words]) == 2
        assert capsys.readouterr().err == refused and not opened
    file = tmp_path / "api.keys"
    made(file, "alice", capsys=capsys)
    assert main(["serve", "toy", "--layout", str(layout), "--api-keys", str(file)]) == 2
    assert opened == ["toy"] and capsys.readouterr().err == "error: opened\n"
    assert main(["serve", "toy", "--layout", str(layout), "--insecure"]) == 2
    assert opened == ["toy"] * 2
    assert capsys.readouterr().err.startswith("warning: 0.0.0.0 is reachable from other machines")
    assert main(["serve", "toy", "--port", "0"]) == 2
    assert capsys.readouterr().err == "error: opened\n", "on loopback nothing is needed"


def test_keys_that_cannot_be_had_are_told_before_anything_starts(
    tmp_path: Path, opened: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "api.keys"
    made(file, "alice", capsys=capsys)
    file.chmod(0o644)
    layout = tmp_path / "layout.yaml"
    layout.write_text("workers: [{stages: all}]\nserve: {port: 0, api_keys_env: NO_SUCH_KEYS}\n")
    for words, line in (
        (["--api-keys", str(file)], "open permissions (0644): chmod 600"),
        (["--api-keys", str(tmp_path / "none")], "cannot be read: No such file"),
        (["--layout", str(layout)], "api_keys_env: the environment has no NO_SUCH_KEYS"),
    ):
        assert main(["serve", "toy", "--port", "0", *words]) == 2
        printed = capsys.readouterr().err
        assert line in printed and printed.count("\n") == 1 and not opened


def said_over(port: int, *requests: bytes) -> None:
    """Bytes as they are, whatever they are."""
    for request in requests:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
            line.sendall(request)
            line.recv(1000)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_keys_are_asked_for_taken_up_and_never_logged(
    start: Callable[..., Server],  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    log_format: str,
) -> None:
    file = tmp_path / "api.keys"
    alice = made(file, "alice", capsys=capsys)
    server = start("--port", "0", "--api-keys", str(file), "--log-format", log_format)
    url = server.url()
    with httpx.Client(base_url=url, timeout=30) as client:

        def status(key: str, **more: Any) -> int:
            headers = {"Authorization": f"Bearer {key}"}
            return client.post("/v1/jobs", json={"prompt": "a"}, headers=headers, **more).status_code

        assert client.post("/v1/jobs", json={"prompt": "a"}).status_code == 401
        assert status(alice) == 202 and status("wrong-" + alice) == 401
        bob = made(file, "bob", capsys=capsys)
        assert status(bob) == 202, "added while it runs"
        assert main(["keys", "api", "bob", "--file", str(file), "--remove"]) == 0
        assert status(bob) == 401, "and removed"
        assert status(alice, params={"api_key": alice}) == 202
        assert client.get(f"/v1/nothing?key={alice}", headers={"Authorization": f"Bearer {alice}"}).status_code == 404
        assert client.get("/v1/jobs", headers={"Authorization": f"Bearer {alice}", "Host": "evil"}).status_code == 421
        client.delete("/v1/jobs/job1", headers={"Authorization": f"Bearer {alice}"})  # lets it drain
    said_over(
        int(url.rpartition(":")[2]),
        f"GET / HTTP/1.1\r\nHost: localhost\r\nAuthorization Bearer {alice}\r\n\r\n".encode(),
        f"{alice} / HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(),
        f"GET /{alice} HTTP/9.9\r\nAuthorization: Bearer {alice}\r\n\r\n".encode(),
        f"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: {alice}\r\n\r\n".encode(),
    )
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    said = "".join(server.errors)
    assert "401" in said and "read 2 API keys" in said, "there is a log"
    assert alice not in said and bob not in said and alice[3:20] not in said

"""`triptych keys`: files that only their owner reads, one per client, and a list of who may join."""

from __future__ import annotations

from pathlib import Path

import pytest

from triptych.cli import main
from triptych.cluster import load_client_keys, load_server_keys


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_keys_for_a_server_and_its_clients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "keys"
    assert main(["keys", str(folder), "--client", "two", "--client", "three"]) == 0
    made = [folder / name for name in ("server.key", "two.key", "three.key")]
    assert capsys.readouterr().out.split() == [str(path) for path in made]
    assert {mode(path) for path in made} == {0o600} and mode(folder) == 0o700
    client, server = load_client_keys(folder / "two.key"), load_server_keys(folder)
    assert client.server == server.public and client.secret != server.secret
    assert sorted(path.name for path in server.clients.iterdir()) == ["three.pub", "two.pub"]
    assert main(["keys", str(folder), "--client", "four", "--remove", "two"]) == 0
    assert load_server_keys(folder) == server, "the server's own stay"
    assert sorted(path.name for path in server.clients.iterdir()) == ["four.pub", "three.pub"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "keys: {folder}/server.key exists already and is not overwritten; give --client or --remove"),
        (["--client", "one"], "keys: {folder}/one.key exists already and is not overwritten"),
        (["--client", "../one"], "client: given '../one'; allowed: letters, digits"),
        (["--remove", "nobody"], "client: given 'nobody'; allowed: one"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", str(tmp_path), "--client", "one"]) == 0
    before = (tmp_path / "server.key").read_text()
    capsys.readouterr()
    assert main(["keys", str(tmp_path), *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {line.format(folder=tmp_path)}") and printed.count("\n") == 1
    assert (tmp_path / "server.key").read_text() == before


def test_a_folder_that_others_write_is_not_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", str(tmp_path), "--client", "one"]) == 0
    (tmp_path / "one.key").chmod(0o644)
    capsys.readouterr()
    assert main(["worker", "encode", "--join", "127.0.0.1:1", "--key", str(tmp_path / "one.key")]) == 2
    printed = capsys.readouterr().err
    assert "open permissions (0644): chmod 600" in printed and printed.count("\n") == 1

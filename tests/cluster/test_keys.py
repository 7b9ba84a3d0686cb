"""Keys as files: what is made, who can read it, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from triptych.cluster.lines.keys import (
    AllowList,
    load_client_keys,
    load_server_keys,
    make_client_keys,
    make_server_keys,
    remove_client,
)
from triptych.errors import InvalidRequest, LoadError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_server_keys(tmp_path / "keys")
    return tmp_path / "keys"


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_keys_come_back_as_they_were_made(folder: Path) -> None:
    server = load_server_keys(folder)
    client = load_client_keys(make_client_keys(folder, "gpu-1"))
    assert (client.name, client.server) == ("gpu-1", server.public)
    assert len({server.public, server.secret, client.public, client.secret}) == 4
    assert AllowList(server.clients).name_of(client.public) == "gpu-1"


def test_secrets_are_the_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_server_keys(tmp_path / "keys")
        secret = make_client_keys(tmp_path / "keys", "a")
    finally:
        os.umask(before)
    keys = tmp_path / "keys"
    assert [mode(path) for path in (keys, keys / "clients", keys / "server.key", secret)] == [
        0o700,
        0o700,
        0o600,
        0o600,
    ]
    assert mode(keys / "server.pub") == mode(keys / "clients" / "a.pub") == 0o644


def test_secrets_do_not_show_when_printed(folder: Path) -> None:
    server, client = load_server_keys(folder), load_client_keys(make_client_keys(folder, "a"))
    assert server.secret not in repr(server)
    assert client.secret not in repr(client)
    assert all(load_client_keys(folder / "a.key").secret not in file.read_text() for file in folder.rglob("*.pub"))


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o666])
def test_a_secret_that_others_can_read_is_refused_with_the_remedy(folder: Path, bits: int) -> None:
    client = make_client_keys(folder, "a")
    for path, load in ((folder / "server.key", lambda: load_server_keys(folder)), (client, None)):
        path.chmod(bits)
        with pytest.raises(LoadError, match=f"chmod 600 {path}") as caught:
            load() if load else load_client_keys(path)
        assert caught.value.field == "keys"


def test_nothing_is_overwritten(folder: Path) -> None:
    before = load_server_keys(folder)
    with pytest.raises(InvalidRequest, match="exists"):
        make_server_keys(folder)
    assert load_server_keys(folder) == before
    make_client_keys(folder, "a")
    with pytest.raises(InvalidRequest, match="exists"):
        make_client_keys(folder, "a")


@pytest.mark.parametrize("name", ["", "../a", "a/b", ".a", "server", "x" * 65, 'a"b', "a\nb"])
def test_a_client_needs_a_name_fit_for_a_file(folder: Path, name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make_client_keys(folder, name)
    assert caught.value.field == "client"


@pytest.mark.parametrize("text", ["", "public = 1", 'public = "short"\nsecret = "short"', "\x00\xff", "name = "])
def test_a_file_that_is_no_key_says_so(folder: Path, text: str) -> None:
    (folder / "server.key").write_text(text)
    with pytest.raises(LoadError, match=r"server\.key is no key file"):
        load_server_keys(folder)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="cannot be read"):
        load_server_keys(tmp_path)
    with pytest.raises(LoadError, match="cannot be read"):
        load_client_keys(tmp_path / "x.key")


def test_the_list_follows_its_folder(folder: Path) -> None:
    allowed = AllowList(folder / "clients")
    assert not allowed.refresh()
    first = load_client_keys(make_client_keys(folder, "a"))
    assert allowed.refresh()
    assert allowed.name_of(first.public) == "a"
    remove_client(folder, "a")
    assert allowed.refresh()
    assert allowed.name_of(first.public) is None
    assert not (folder / "a.key").exists()
    second = load_client_keys(make_client_keys(folder, "a"))
    assert allowed.refresh()
    assert (allowed.name_of(first.public), allowed.name_of(second.public)) == (None, "a")
    with pytest.raises(InvalidRequest, match="allowed: a"):
        remove_client(folder, "b")


def test_a_damaged_file_of_the_list_hurts_nobody_else(folder: Path) -> None:
    client = load_client_keys(make_client_keys(folder, "a"))
    (folder / "clients" / "b.pub").write_text("nonsense")
    allowed = AllowList(folder / "clients")
    assert allowed.name_of(client.public) == "a"
    assert list(allowed.ignored) == ["b.pub"]


def test_a_list_that_cannot_be_read_for_a_moment_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = load_client_keys(make_client_keys(folder, "a"))
    allowed = AllowList(folder / "clients")

    def fail(_: Path) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "scandir", fail)
    assert not allowed.refresh()
    assert allowed.name_of(client.public) == "a"


def test_a_missing_list_lets_nobody_in(tmp_path: Path) -> None:
    assert AllowList(tmp_path / "none").name_of("x" * 40) is None

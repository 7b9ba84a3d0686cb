"""Jobs that clients name: ids that nobody guesses, one job of a name."""

from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest

from triptych.engine.names import Names, kept_secret
from triptych.errors import InvalidRequest


def test_a_secret_is_made_once_and_is_nobody_elses(tmp_path: Path) -> None:
    secret = kept_secret(tmp_path)
    assert len(secret) == 32 and kept_secret(tmp_path) == secret
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    (tmp_path / "other").mkdir()
    assert kept_secret(tmp_path / "other") != secret


def test_a_secret_that_was_cut_short_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"short")
    (tmp_path / "secret.new").write_bytes(b"left by one that was killed")
    made = kept_secret(tmp_path)
    assert len(made) == 32 and kept_secret(tmp_path) == made


def test_a_name_leads_to_one_id_and_only_with_the_secret() -> None:
    names, others = Names(b"a" * 32, lambda job: False), Names(b"b" * 32, lambda job: False)
    assert names.id_of("client", "name") == names.id_of("client", "name") != others.id_of("client", "name")
    found = {names.id_of(client, name) for client, name in (("a", "bc"), ("ab", "c"), ("", "abc"), ("a", "1:bc"))}
    assert len(found) == 4 and all(len(id) == 32 and id.isalnum() for id in found)


def test_of_two_at_once_the_second_waits_and_finds_the_first() -> None:
    there: set[str] = set()
    names = Names(b"a" * 32, there.__contains__)
    inside, refused = threading.Event(), threading.Event()

    def second() -> None:
        inside.wait(10)
        with pytest.raises(InvalidRequest), names.entering("job"):
            raise AssertionError("there is one already")
        refused.set()

    waiting = threading.Thread(target=second)
    waiting.start()
    with names.entering("job"):
        inside.set()
        with names.entering("another"):
            assert not refused.wait(0.2), "it waits for the first"
        there.add("job")
    waiting.join(10)
    assert refused.is_set()


def test_a_submission_that_failed_leaves_its_name_free() -> None:
    names = Names(b"a" * 32, lambda job: False)
    with pytest.raises(ZeroDivisionError), names.entering("job"):
        raise ZeroDivisionError
    with names.entering("job"):
        pass

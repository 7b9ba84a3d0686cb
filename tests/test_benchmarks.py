"""The benchmarks' own arithmetic, and that a miss is told by the exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

import benchmarks
from benchmarks import Row, report
from benchmarks.first_picture import peak_bytes
from benchmarks.generate import Spent, Turns, middle


def test_a_miss_is_exit_code_one(capsys: pytest.CaptureFixture[str]) -> None:
    kept, missed = Row.at_most("memory", 1.04, 1.05), Row.at_most("steps", 1.03, 1.02)
    assert report("some", [kept, Row("told", "3")]) == 0
    assert report("some", [kept, missed]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "| what | figure | target | met |"
    assert "| memory | 1.040 | ≤ 1.05 | yes |" in printed
    assert "| steps | 1.030 | ≤ 1.02 | NO |" in printed


def test_saved_results_name_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "RESULTS", tmp_path / "results")
    report("some", [Row("told", "3")], save=True)
    text = (tmp_path / "results" / "some.md").read_text(encoding="utf-8")
    assert "torch" in text
    assert "| told | 3 |  |  |" in text


def test_steps_are_told_from_the_rest_of_a_request() -> None:
    # 10 ms a step and 50 ms beyond; the other 20 and 50.
    turns = Turns(8, 48, {"modular": [Spent(0.13, 0.53)] * 3, "triptych": [Spent(0.21, 1.01)] * 3})
    assert turns.ratio("triptych") == pytest.approx(2)
    assert turns.per_step() == "modular 10.00, triptych 20.00"
    assert turns.beyond() == "modular 50.00, triptych 50.00"


def test_an_interrupted_turn_does_not_move_its_round() -> None:
    assert middle([Spent(0.1, 0.5), Spent(0.9, 0.5), Spent(0.1, 3.0)]) == Spent(0.1, 0.5)


def test_peak_memory_is_bytes() -> None:
    assert 2**24 < peak_bytes() < 2**38

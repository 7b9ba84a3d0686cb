"""Progress in a terminal and in a log."""

from __future__ import annotations

import pytest

from triptych.cli.console import Display, human_bytes, times_table
from triptych.request import Progress, StageTime
from triptych.stage import LoadProgress


def steps(stage: str, total: int) -> list[Progress]:
    return [Progress("job", stage, step, total, step * 0.5) for step in range(1, total + 1)]  # type: ignore[arg-type]


@pytest.mark.parametrize(("total", "lines"), [(1, 1), (4, 4), (10, 10), (50, 10), (999, 10)])
def test_a_log_gets_few_lines(total: int, lines: int, capsys: pytest.CaptureFixture[str]) -> None:
    with Display() as display:
        for progress in steps("denoise", total):
            display.update(progress)
    printed = capsys.readouterr()
    assert not printed.out
    assert len(printed.err.splitlines()) == lines
    assert printed.err.splitlines()[-1] == f"denoise {total}/{total}, {total * 0.5:.2f} s"


def test_a_terminal_gets_bars(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Display() as display:
        for progress in [*steps("encode", 1), *steps("denoise", 20), *steps("decode", 1)]:
            display.update(progress)
    printed = capsys.readouterr().err
    assert all(text in printed for text in ("encode", "denoise", "decode", "20/20", "━"))
    assert "denoise 2/20," not in printed


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(quiet=True) as display:
        display.say("opening")
        display.loaded(LoadProgress("vae", 100, 0.1, 1, 1))
        for progress in steps("denoise", 3):
            display.update(progress)
    assert capsys.readouterr() == ("", "")


def test_shared_weights_are_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    with Display() as display:
        for component, size in (("tokenizer", 0), ("vae", 2048), ("vae", 2048)):
            display.loaded(LoadProgress(component, size, 0.25, 1, 3))
    assert capsys.readouterr().err == "loaded vae, 2 KiB in 0.25 s\n"


def test_times() -> None:
    table = times_table([StageTime("encode", 0.5, 1, 2**20), StageTime("denoise", 3.0, 6, 2**30)])
    rows = [line.split() for line in table.splitlines()]
    assert rows[1:] == [
        ["encode", "0.500", "1", "0.5000", "1", "MiB"],
        ["denoise", "3.000", "6", "0.5000", "1", "GiB"],
        ["total", "3.500"],
    ]


SIZES = {0: "0 B", 1023: "1023 B", 1536: "1.5 KiB", 1001 * 2**20: "1001 MiB", 2**41: "2 TiB", 2**51: "2048 TiB"}


@pytest.mark.parametrize(("count", "text"), SIZES.items())
def test_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text

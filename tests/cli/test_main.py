"""The command line as a person meets it: help, version, exit codes, one line for an error."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import triptych
from triptych import cli
from triptych.cli import main

SOURCE = Path(triptych.__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m triptych` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-m", "triptych", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["inspect", "-h"], ["check", "-h"]])
def test_help_answers_at_once(arguments: list[str]) -> None:
    run(*arguments)  # the first one writes byte code
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run(*arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time: that of the wall belongs to whatever else the machine does.
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0 and "Usage: triptych" in done.stdout and not done.stderr
    assert min(times) < 0.5


def test_no_arguments_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("generate", "inspect", "check", "doctor"))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"triptych {triptych.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["paint"], "error: No such command 'paint'."),
        (["generate", "x", "--stepz", "3"], "error: No such option: --stepz"),
        (["generate", "x", "--steps", "many"], "error: --steps: "),
        (["generate", "x", "--width"], "error: Option '--width' requires an argument."),
        (["generate", "x", "y"], "error: Got unexpected extra argument"),
        (["inspect"], "error: Missing argument 'model'"),
    ],
)
def test_wrong_words_are_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.startswith(line) and printed.err.count("\n") == 1


def failing(error: BaseException) -> object:
    def fail(arguments: list[str]) -> int:
        raise error

    return fail


def test_an_error_of_ours_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "_run", failing(ZeroDivisionError("two\nlines")))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == "error: internal: ZeroDivisionError: two lines (--debug shows where)\n"


@pytest.mark.parametrize("arguments", [["--debug", "doctor"], ["doctor", "--debug"]])
def test_debug_shows_a_traceback(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_run", failing(triptych.InvalidRequest("wrong", field="width")))
    with pytest.raises(triptych.InvalidRequest):
        main(arguments)


def test_debug_after_two_dashes_is_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(cli, "_run", lambda arguments: seen.append(arguments) or 0)
    assert main(["generate", "--", "--debug"]) == 0
    assert seen == [["generate", "--", "--debug"]]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), triptych.Cancelled("the job was cancelled")])
def test_interrupted(error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "_run", failing(error))
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "cancelled\n"


@pytest.mark.parametrize("then", ["raise", "turn", "return"])
def test_interrupted_whatever_becomes_of_it(
    then: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Extension modules turn it into errors of their own, and some code takes any error for an answer."""

    def command(arguments: list[str]) -> int:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            if then == "raise":
                raise
            if then == "turn":
                raise ValueError("a schema could not be built") from None
        return 1

    monkeypatch.setattr(cli, "_run", command)
    former = signal.getsignal(signal.SIGINT)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "cancelled\n"
    assert signal.getsignal(signal.SIGINT) is former


def test_off_the_main_thread_nothing_is_heard() -> None:
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(main, ["--version"]).result() == 0


def test_a_field_with_another_flag_names_both(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_run", failing(triptych.InvalidRequest("wrong", field="num_inference_steps")))
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "error: num_inference_steps (--steps): wrong\n"

"""The benchmarks' own arithmetic, and that a miss is told by the exit code."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import benchmarks
from benchmarks import Row, report
from benchmarks.first_picture import peak_bytes
from benchmarks.generate import Spent, Turns, middle
from benchmarks.layout import pinned
from benchmarks.rates import completions, rate_of
from benchmarks.serving import SIZES, Served, arrivals, compared, percentile
from benchmarks.waiting import CAPACITY, WaitingStage, alone
from triptych.stage import Admitted, Full, Output, StageTask


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


def test_so_many_are_in_flight_and_no_more() -> None:
    full, lock, now, most = threading.Barrier(4), threading.Lock(), 0, 0

    def run() -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        full.wait(30.0)  # passes only when four are here at once
        with lock:
            now -= 1

    ended = completions(run, 4, 12)
    assert len(ended) == 12 and ended == sorted(ended) and most == 4


def test_what_a_request_raises_is_raised() -> None:
    def run() -> None:
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        completions(run, 2, 8)


def test_a_rate_counts_from_when_all_have_begun() -> None:
    # Two clients; their first requests came late and do not count.
    assert rate_of([5.0, 5.0, 6.0, 6.5, 7.0, 7.5], 2) == pytest.approx(2.0)


def test_a_waiting_stage_takes_what_a_real_one_does_and_waits() -> None:
    stage = WaitingStage("denoise", 0.02)
    answers = [stage.admit(StageTask(str(number), {}, 0)) for number in range(CAPACITY + 1)]
    assert answers == [Admitted()] * CAPACITY + [Full()]
    ends = [event.job for _ in range(CAPACITY) for event in stage.step() if isinstance(event, Output)]
    assert ends == ["0", "1", "2", "3"] and stage.step() == []
    assert alone(0.02, 3) <= 50


def test_the_slowest_stage_has_a_processor_to_itself() -> None:
    layout, own = pinned()
    by_stage = {plan.stages[0]: plan.cpus for plan in layout.workers}
    assert by_stage["denoise"] == own and all(plan.threads == 1 for plan in layout.workers)
    assert by_stage["encode"] == by_stage["decode"]


def test_a_figure_that_falls_short_is_a_miss() -> None:
    assert Row.at_least("throughput", 0.97, 0.97).met and Row.at_least("throughput", 0.96, 0.97).met is False


def test_arrivals_are_the_same_for_all_and_as_many_a_second_as_were_asked_for() -> None:
    planned = arrivals(50.0, 2000, seed=1)
    assert planned == arrivals(50.0, 2000, seed=1) != arrivals(50.0, 2000, seed=2)
    assert [one.seconds for one in planned] == sorted(one.seconds for one in planned)
    assert 2000 / planned[-1].seconds == pytest.approx(50.0, rel=0.1)
    small = sum(one.size == (64, 64) for one in planned) / 2000
    assert small == pytest.approx(SIZES[64, 64] / sum(SIZES.values()), abs=0.05)


def test_a_percentile_is_a_value_that_was_measured() -> None:
    seconds = [float(number) for number in range(100, 0, -1)]
    assert [percentile(seconds, share) for share in (0.5, 0.99, 1.0)] == [50.0, 99.0, 100.0]
    assert percentile([3.0], 0.99) == 3.0


def test_a_server_is_compared_with_the_best_of_the_others_in_each_respect() -> None:
    done = {
        "ours": Served([10.0], [0.2] * 10, [0.3] * 10, in_time=10),
        "quick": Served([8.0], [0.1] * 10, [0.6] * 10, in_time=5),
        "busy": Served([12.0], [0.4] * 10, [0.4] * 10, in_time=8),
    }
    rows = compared("ours", done, rate=5.0)
    assert [(row.figure, row.met) for row in rows[:4]] == [
        ("0.833", False), ("2.000", False), ("0.750", True), ("1.250", True),
    ]  # fmt: skip
    assert rows[4].figure == "10.0 a second, p50 200 ms, p90 200 ms, p99 200 ms"
    assert rows[7].figure == "100.0 % in time, p50 300 ms, p90 300 ms, p99 300 ms"

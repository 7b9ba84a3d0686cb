"""`triptych layout check`: what a layout would start, and every wrong thing of it on a line of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.families import folder
from triptych.cli import main
from triptych.model import StageName, describe, open_model

TWO = """
workers:
  - stages: [encode, decode]
    devices: cpu
  - stages: denoise
    replicas: 2
    devices: cpu
    dtype: bfloat16
    threads: 1
"""


@pytest.fixture(scope="module")
def model() -> str:
    return str(folder("qwen-image"))


@pytest.fixture
def layout(tmp_path: Path) -> Any:
    def write(text: str) -> str:
        (tmp_path / "layout.yaml").write_text(text)
        return str(tmp_path / "layout.yaml")

    return write


def parameters(model: str, *stages: StageName) -> int:
    topology = describe(open_model(model))
    names = {name for stage in stages for name in topology.stage(stage).loads}
    return sum(topology.components[name].parameters for name in names if name in topology.components)


def test_it_shows_what_would_start_and_its_weights(model: str, layout: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layout", "check", layout(TWO), "-m", model, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(worker["name"], worker["stages"], worker["dtype"]) for worker in found["workers"]] == [
        ("encode-decode", ["encode", "decode"], None),
        ("denoise-0", ["denoise"], "bfloat16"),
        ("denoise-1", ["denoise"], "bfloat16"),
    ]
    weights = [worker["weights_bytes"] for worker in found["workers"]]
    both = parameters(model, "encode", "decode")
    assert weights == [4 * both, *[2 * parameters(model, "denoise")] * 2], "on a CPU, float32 unless told otherwise"
    assert both < parameters(model, "encode") + parameters(model, "decode"), "a component is held once"
    (total,) = found["totals"]
    assert (total["device"], total["workers"], total["weights_bytes"]) == ("cpu", 3, sum(weights))
    assert total["free_bytes"] > 0 and found["missing"] == []
    assert main(["layout", "check", layout(TWO), "-m", model]) == 0
    table = capsys.readouterr().out
    assert all(word in table for word in ("encode-decode", "denoise-1", "bfloat16", "free"))


@pytest.mark.parametrize(("name", "workers"), [("fused", 1), ("split", 3)])
def test_fused_and_split_need_no_file(name: str, workers: int, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layout", "check", name, "-m", model, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["workers"]) == workers


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["layout", "check", *arguments]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    return printed.err.splitlines()


def test_every_wrong_thing_has_a_line(model: str, layout: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = layout("workers:\n  - stages: paint\n    gpus: 1\nlimits: {max_queue: 0}\n")
    lines = refused([path, "-m", model], capsys)
    assert [line.split(";")[0] for line in lines] == [
        "error: workers[0].stages[0]: given 'paint'",
        "error: workers[0]: given 'gpus'",
        "error: limits.max_queue: given 0",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("workers: [{stages: [encode, decode]}]", "workers: given 'decode, encode'; allowed: one for denoise too"),
        ("workers: [{stages: all, devices: xpu:9}]", "device: given 'xpu:9'"),
        ("workers: [{stages: all, devices: tpu}]", "device: given 'tpu'; allowed: auto, cpu"),
        (
            "workers: [{stages: all, host: far, devices: tpu}]\nlisten: {endpoint: 'tcp://a:1', keys: k}\n"
            "transfer: {host: 10.0.0.1}",
            "device: ",
        ),
        ("workers: [{stages: all, devices: cpu, cpus: 40000}]", "cpus: given [40000]; allowed: processors of this"),
        ("workers: [{stages: all}]\ntransfer: {pool_bytes: 900TiB}", "transfer.pool_bytes: given "),
        ("workers: [{stages: all}]\ntransfer: {budget_bytes: 900TiB}", "transfer.budget_bytes: given "),
        ("workers: [{stages: all}]\ntransfer: {routes: [mooncake]}", "transfer.mooncake: given False; allowed: true"),
        (
            "workers: [{stages: all}]\nlimits: {lease_seconds: 0.5}",
            "limits.lease_seconds: given 0.5; allowed: more than",
        ),
    ],
)
def test_a_layout_that_does_not_fit(
    text: str, line: str, model: str, layout: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = refused([layout(text), "-m", model], capsys)
    assert lines[0].startswith(f"error: {line}"), lines


def test_workers_of_other_hosts_are_shown_without_their_memory(
    model: str, layout: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "workers: [{stages: all, host: far, devices: xpu:1}]\nlisten: {endpoint: 'tcp://127.0.0.1:7400', keys: k}"
    assert main(["layout", "check", layout(text), "-m", model, "--json"]) == 0
    (total,) = json.loads(capsys.readouterr().out)["totals"]
    assert (total["host"], total["device"], total["free_bytes"]) == ("far", "xpu:1", None)


def test_weights_beyond_memory_do_not_fit(
    model: str, layout: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triptych.device.free_bytes", lambda device: 1000)
    assert main(["layout", "check", layout("workers: [{stages: all, devices: cpu}]"), "-m", model]) == 1
    assert "does not fit: " in capsys.readouterr().err


def test_a_missing_stage_that_is_waited_for_is_said(
    model: str, layout: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = layout("workers: [{stages: encode, devices: cpu}]\nmissing: wait")
    assert main(["layout", "check", path, "-m", model]) == 0
    assert "waits for a worker to join with: denoise, decode" in capsys.readouterr().out

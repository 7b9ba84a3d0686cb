"""`triptych replay`: a kept task runs again, alone; what is wrong is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from triptych.cli import main
from triptych.messages import Task
from triptych.worker import keep_task


def keep(state: Path, **changes: Any) -> None:
    fields: dict[str, Any] = {"prompt": "a cat", **changes}
    keep_task(state / "artifacts" / "job1", Task(job="job1", stage="encode", attempt=2, fields=fields, seed=3), {})


def test_a_task_that_fails_no_more_says_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(tmp_path)
    base = ["replay", "job1", "--state", str(tmp_path), "--device", "cpu"]
    assert main([*base, "--stage", "encoder", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["job"], made["steps"]) == ("job1", 1)
    assert made["tensors"]["prompt_embeds"]["dtype"] == "float32"
    assert main(base) == 0
    out = capsys.readouterr().out
    assert out.startswith("job job1 went well: 1 steps in ") and "prompt_embeds: float32 1×" in out


def test_a_task_that_fails_again_fails_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(tmp_path, prompt=5)
    base = ["replay", "job1", "--state", str(tmp_path), "--device", "cpu"]
    assert main(base) == 2
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(Exception, match="encode"):
        main([*base, "--debug"])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["job2"], "job: given 'job2'; allowed: one that failed and has not expired; "),
        (["../job1"], "job: given '../job1'; allowed: a job's id"),
        (["job1", "--stage", "paint"], "stages: given 'paint'; allowed: encode, denoise, decode"),
        (["job1", "--stage", "encode,decode"], "stage: given 'encode,decode'; allowed: one stage"),
        (["job1", "--stage", "decode"], "stage: given 'decode'; allowed: encode, where this job failed"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(tmp_path)
    assert main(["replay", "--state", str(tmp_path), *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {line}") and printed.count("\n") == 1, printed


def test_a_state_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "job1", "--state", str(tmp_path / "none")]) == 2
    assert "the folder that was given to `triptych serve --state`" in capsys.readouterr().err


def test_a_task_that_was_kept_at_a_url(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(tmp_path)
    (tmp_path / "artifacts").chmod(0o700)
    base = ["replay", "--artifacts", (tmp_path / "artifacts").as_uri(), "--device", "cpu"]
    assert main([*base, "job1"]) == 0
    assert capsys.readouterr().out.startswith("job job1 went well")
    assert main([*base, "job2"]) == 2
    assert "job: given 'job2'; allowed: one that failed" in capsys.readouterr().err
    assert main(["replay", "job1"]) == 2
    assert "--state" in capsys.readouterr().err

"""A failed task, kept and run again: the same outcome, the whole traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.worker.jobs import alone, resolved, task_of, topology_of
from triptych.errors import Damaged, InvalidRequest, StageFailed, WrongPayload
from triptych.messages import Encoding
from triptych.transfer import Payload
from triptych.worker import WorkerSettings, keep_task, read_payload, replay_task, write_payload

EMOJI = WorkerSettings("emoji", device="cpu")


def test_a_kept_task_runs_again_stage_by_stage(tmp_path: Path) -> None:
    topology = topology_of("emoji")
    wanted = resolved(topology, prompt="a cat", width=64, height=64, num_inference_steps=2, seed=1)
    payload: Payload | None = None
    for part in topology.stages:
        folder = tmp_path / part.name
        keep_task(folder, task_of(topology, wanted, part.name), {} if payload is None else {"payload": payload})
        payload = replay_task(folder, EMOJI, part.name).payload
    assert payload is not None
    assert torch.equal(payload.values["images"], alone(topology, wanted).values["images"])
    keep_task(tmp_path / "decode", task_of(topology, wanted, "decode", encoding=Encoding(format="png")), {})
    assert not (tmp_path / "decode" / "failed.payload").exists(), "the former task's input is not this one's"


def test_the_original_error_and_where_it_came_from_are_behind_it(tmp_path: Path) -> None:
    topology = topology_of("emoji")
    wanted = resolved(topology, prompt="a cat", width=64, height=64, num_inference_steps=2, seed=1)
    wrong = Payload({"prompt_embeds": torch.zeros(1, 3, 7), "prompt_embeds_mask": torch.ones(1, 3, dtype=torch.int64)})
    keep_task(tmp_path, task_of(topology, wanted, "denoise"), {"payload": wrong})
    with pytest.raises(StageFailed) as caught:
        replay_task(tmp_path, EMOJI)
    cause = caught.value.__cause__
    assert cause is not None and cause.__traceback__ is not None
    names = []
    at = cause.__traceback__
    while at is not None:
        names.append(at.tb_frame.f_code.co_filename)
        at = at.tb_next
    assert any("torch" in name for name in names), "down to where it was raised"


def test_wrong_folders_are_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"failed\.task"):
        replay_task(tmp_path, EMOJI)
    topology = topology_of("emoji")
    wanted = resolved(topology, prompt="a cat", width=64, height=64, num_inference_steps=2, seed=1)
    keep_task(tmp_path, task_of(topology, wanted, "encode"), {})
    with pytest.raises(InvalidRequest, match="encode, where this job failed"):
        replay_task(tmp_path, EMOJI, "decode")
    (tmp_path / "failed.task").write_bytes(b"no")
    with pytest.raises(WrongPayload, match="no task"):
        replay_task(tmp_path, EMOJI)


def test_payload_files_are_checked(tmp_path: Path) -> None:
    payload = Payload({"a": torch.arange(6).reshape(2, 3), "b": [torch.ones(2, dtype=torch.bfloat16), "text", None]})
    write_payload(tmp_path / "p", payload)
    again = read_payload(tmp_path / "p").values
    assert torch.equal(again["a"], payload.values["a"]) and torch.equal(again["b"][0], payload.values["b"][0])
    data = bytearray((tmp_path / "p").read_bytes())
    data[-64] ^= 1
    (tmp_path / "p").write_bytes(data)
    with pytest.raises(Damaged):
        read_payload(tmp_path / "p")
    (tmp_path / "p").write_bytes(data[:10])
    with pytest.raises(WrongPayload):
        read_payload(tmp_path / "p")

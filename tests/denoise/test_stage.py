"""The denoise stage: what a task that goes on from a checkpoint shows, and how it ends early."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.families import folder
from tests.model.bench import Bench, case_of
from triptych.errors import InvalidRequest
from triptych.model import describe, open_model, resolve
from triptych.request import Request
from triptych.stage import StepDone, UsePreview


@pytest.mark.parametrize("family", ["flux", "stable-diffusion"])
def test_previews_and_cancelling_go_on_after_a_checkpoint(family: str) -> None:
    bench = Bench(case_of(family))
    checkpoint = bench.denoise(checkpoint_seconds=0.0).checkpoints[2]
    stage = bench.stage()
    seen: list[torch.Tensor] = []

    def preview(fields: dict[str, Any], latents: torch.Tensor) -> torch.Tensor:
        seen.append(latents)
        return torch.zeros(2, 2, 3, dtype=torch.uint8)

    stage.control(UsePreview(preview))
    stage.admit(bench.task("denoise", bench.encoded, checkpoint=checkpoint, preview=True))
    told: list[StepDone] = []
    with torch.no_grad():
        while not told:
            told += [event for event in stage.step() if isinstance(event, StepDone)]
        assert (told[0].step, told[0].steps) == (3, 5) and told[0].preview is not None
        assert len(seen) == 1 and seen[0].isfinite().all(), "nothing is shown of the steps that are not run again"
        stage.cancel("job")
        assert stage.step() == []


def test_a_schedule_that_cannot_be_one_step_long_is_refused_at_the_door() -> None:
    """Qwen-Image's ends at a noise level of its own; of one step diffusers makes NaN."""
    topology = describe(open_model(str(folder("qwen-image"))))
    with pytest.raises(InvalidRequest, match=r"num_inference_steps: given 1; allowed: 2 or more"):
        resolve(topology, Request.parse(prompt="a cat", width=64, height=64, num_inference_steps=1))
    assert resolve(topology, Request.parse(prompt="a cat", width=64, height=64, num_inference_steps=2))
    assert resolve(topology, Request.parse(prompt="a cat", width=64, height=64, sigmas=(0.9,)))
    assert resolve(describe(open_model(str(folder("flux")))), Request.parse(prompt="a cat", num_inference_steps=1))

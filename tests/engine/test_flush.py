"""A flush of an engine whose stages are in this process."""

from __future__ import annotations

from triptych import Engine, Progress, Request


def test_a_fused_engine_flushes_every_stage_and_makes_the_same_previews_again() -> None:
    request = Request.parse(prompt="a red apple on the left, blue background", seed=7, num_inference_steps=2)
    with Engine.open("emoji", device="cpu") as engine:

        def previews() -> list[bytes]:
            told = list(engine.stream(request, preview=True))
            return [one.preview.tobytes() for one in told if isinstance(one, Progress) and one.preview is not None]

        first = previews()
        (worker,) = engine.flush().workers
        assert worker.stages.keys() == {"encode", "denoise", "decode"} and not worker.failed
        assert worker.stages["denoise"]["previews"] > 0 and worker.process["transfer"] == 0
        report = engine.flush()
        assert report.workers[0].stages == {"encode": {}, "denoise": {"previews": 0}, "decode": {}}
        assert not report.unanswered and report.coordinator == {"transfer": 0}
        assert previews() == first and len(first) == 2

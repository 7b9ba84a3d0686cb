"""How much a deployment lets a request ask for, and how many jobs a caller begins."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.server.conftest import LOCAL
from tests.server.fake import TOPOLOGY, FakeEngine, Taken
from triptych import Engine, Request
from triptych.config import BoundsSection, RatesSection, ServeSection
from triptych.errors import InvalidRequest, QueueFull
from triptych.model import Defaults
from triptych.server import KeyRing, create_app
from triptych.server.locks.bounds import check_bounds
from triptych.server.locks.keys import ApiKey
from triptych.server.locks.rates import Rates

SIZED = replace(TOPOLOGY, defaults=Defaults(width=64, height=64, num_inference_steps=20))
HEADERS = {name: {"Authorization": f"Bearer key-of-{name}"} for name in ("alice", "bob")}


def keys() -> KeyRing:
    return KeyRing(ApiKey.of(name, f"key-of-{name}") for name in HEADERS)


def ask(client: TestClient, name: str = "alice", **fields: Any) -> Any:
    return client.post("/v1/jobs", json={"prompt": "a cat", **fields}, headers=HEADERS[name])


# --- what a request may ask for


@pytest.mark.parametrize(
    ("bounds", "given", "field"),
    [
        ({"width": 64}, {"width": 65}, "width"),
        ({"height": 64}, {"height": 65}, "height"),
        ({"pixels": 4096}, {"width": 64, "height": 72}, "width"),
        ({"pixels": 4095}, {}, "width"),
        ({"width": 63}, {}, "width"),
        ({"pixels": 4096}, {"images": (Image.new("RGB", (64, 65)),)}, "width"),
        ({"frames": 16}, {"num_frames": 17}, "num_frames"),
        ({"steps": 4}, {"num_inference_steps": 5}, "num_inference_steps"),
        ({"steps": 4}, {"sigmas": (1.0, 0.8, 0.6, 0.4, 0.2)}, "sigmas"),
        ({"steps": 4}, {"extra": {"timesteps": [5, 4, 3, 2, 1]}}, "extra.timesteps"),
        ({"outputs": 4}, {"num_outputs": 5}, "num_outputs"),
        ({"outputs": 4}, {"prompt": ("a", "b"), "num_outputs": 3}, "num_outputs"),
        ({"images": 0}, {"images": (Image.new("RGB", (8, 8)),)}, "images"),
    ],
)
def test_a_bound_names_the_field(bounds: dict[str, int], given: dict[str, Any], field: str) -> None:
    request = Request.parse(**{"prompt": "a", **given})
    with pytest.raises(InvalidRequest, match="allowed: at most") as wrong:
        check_bounds(BoundsSection(**bounds), SIZED, request)
    assert wrong.value.field == field
    check_bounds(BoundsSection(**{name: most + 4096 for name, most in bounds.items()}), SIZED, request)
    check_bounds(BoundsSection(), SIZED, request)


@pytest.fixture(scope="module")
def emoji() -> Iterator[Engine]:
    with Engine.open("emoji", device="cpu") as engine:
        yield engine


@pytest.mark.parametrize(
    ("bounds", "given", "field"),
    [
        ({"steps": 3}, {}, "num_inference_steps"),
        ({"width": 100}, {"aspect_ratio": "4:1"}, "width"),
        ({"height": 100}, {"aspect_ratio": "1:4"}, "height"),
        ({"pixels": 64 * 64}, {"height": 128}, "width"),
    ],
)
def test_what_the_model_fills_in_counts_too(
    emoji: Engine, bounds: dict[str, int], given: dict[str, Any], field: str
) -> None:
    settings = ServeSection.model_validate({"bounds": bounds})
    client = TestClient(create_app(emoji, settings, version="1"), LOCAL)
    answer = client.post("/v1/jobs", json={"prompt": "a cat", **given})
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["field"] == field
    assert not emoji.jobs(), "nothing has begun"


# --- how many jobs


def test_tokens_come_back_with_time() -> None:
    now = [100.0]
    rates = Rates(RatesSection(jobs_per_minute=6), clock=lambda: now[0])

    def take(caller: str = "alice") -> None:
        with rates.taking(caller, lambda: 0):
            pass

    for _ in range(6):
        take()
    with pytest.raises(QueueFull) as refused:
        take()
    assert refused.value.retry_after == pytest.approx(10)
    take("bob")
    now[0] += 9
    with pytest.raises(QueueFull) as refused:
        take()
    assert refused.value.retry_after == pytest.approx(1)
    now[0] += 1
    take()
    now[0] += 3600
    for _ in range(6):
        take()
    with pytest.raises(QueueFull):
        take()


def test_a_job_that_is_refused_costs_nothing() -> None:
    rates = Rates(RatesSection(jobs_per_minute=1), clock=lambda: 0.0)
    for _ in range(3):
        with pytest.raises(InvalidRequest), rates.taking("alice", lambda: 0):
            raise InvalidRequest("wrong")
    with rates.taking("alice", lambda: 0):
        pass
    with pytest.raises(QueueFull), rates.taking("alice", lambda: 0):
        pass


class Slow(FakeEngine):
    """Takes its time between looking and having a job."""

    def submit(self, request: Request, **options: Any) -> Taken:
        time.sleep(0.02)
        with LOCK:
            return super().submit(request, **options)


LOCK = threading.Lock()


def test_no_more_jobs_at_once_however_they_come() -> None:
    engine = Slow()
    settings = ServeSection(rates=RatesSection(jobs_at_once=3))
    app = create_app(engine, settings, version="1", keys=keys())
    with TestClient(app, LOCAL) as client, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda name: ask(client, name), ["alice", "bob"] * 8))
        codes = [answer.status_code for answer in answers]
        assert sorted(codes) == [202] * 6 + [429] * 10
        assert engine.under_way("alice") == engine.under_way("bob") == 3
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.json()["error"]["code"] == "queue_full" and int(refused.headers["retry-after"]) >= 1
        mine = next(answer for answer in answers[::2] if answer.status_code == 202).json()["id"]
        client.delete(f"/v1/jobs/{mine}", headers=HEADERS["alice"])
        assert (ask(client).status_code, ask(client).status_code) == (202, 429)


def test_a_rate_is_told_with_when_to_come_again(engine: FakeEngine) -> None:
    settings = ServeSection(rates=RatesSection(jobs_per_minute=2))
    with TestClient(create_app(engine, settings, version="1", keys=keys()), LOCAL) as client:
        assert ask(client, width=-1).status_code == 422
        assert [ask(client).status_code for _ in range(3)] == [202, 202, 429]
        assert 25 <= int(ask(client).headers["retry-after"]) <= 30
        assert ask(client, "bob").status_code == 202

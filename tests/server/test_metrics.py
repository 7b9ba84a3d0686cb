"""What Prometheus reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster.toy import ToyCluster
from tests.server.conftest import LOCAL
from tests.server.fake import FakeEngine
from triptych.cluster import Status
from triptych.config import ServeSection
from triptych.messages import CacheUse
from triptych.server import KeyRing, create_app
from triptych.server.locks.key_file import ApiKey

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "seeing.md"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(text: str) -> Samples:
    """Every sample of a scrape, by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(client: TestClient, **headers: str) -> Samples:
    answer = client.get("/metrics", headers=headers)
    assert answer.status_code == 200, answer.text
    return samples(answer.text)


def test_requests_are_counted_by_template_method_and_status(client: TestClient) -> None:
    job = client.post("/v1/jobs", json={"prompt": "a red apple", "seed": 7}).json()["id"]
    for name in (job, "0" * 32, "1" * 32):
        client.get(f"/v1/jobs/{name}?key=secret")
    for number in range(50):
        client.get(f"/{number}")
    client.request("BREW", "/health")
    found = scrape(client)

    def counted(method: str, route: str, status: int) -> float:
        return found["triptych_requests_total", (("method", method), ("route", route), ("status", str(status)))]

    assert counted("POST", "/v1/jobs", 202) == 1
    assert (counted("GET", "/v1/jobs/{job}", 200), counted("GET", "/v1/jobs/{job}", 404)) == (1, 2)
    assert counted("GET", "unknown", 404) == 50
    assert not {value for _, labels in found for _, value in labels} & {job, "/0", "/49", "BREW"}
    assert found["triptych_request_errors_total", (("code", "job_not_found"),)] == 2
    took = found["triptych_request_seconds_count", (("method", "GET"), ("route", "/v1/jobs/{job}"))]
    assert took == 3


def test_an_unforeseen_error_is_counted_as_500(client: TestClient, engine: FakeEngine) -> None:
    engine.refuse = ZeroDivisionError("a bug")
    assert client.post("/v1/jobs", json={"prompt": "a"}).status_code == 500
    engine.refuse = None
    found = scrape(client)
    labels = (("method", "POST"), ("route", "/v1/jobs"), ("status", "500"))
    assert found["triptych_requests_total", labels] == 1


class Cluster(FakeEngine):
    """A door onto a cluster without processes."""

    def __init__(self, cluster: ToyCluster) -> None:
        super().__init__()
        self.cluster = cluster

    def status(self) -> Status:
        return self.cluster.coordinator.status()


@pytest.fixture
def cluster() -> ToyCluster:
    return ToyCluster()


@pytest.fixture
def busy(cluster: ToyCluster) -> TestClient:
    """After one job, one that waits, one refused, and a worker's death."""
    worker = cluster.worker()
    cluster.submit("a", rows=2)
    for seconds in (0.3, 4.0, 0.02):
        cluster.clock.now += seconds
        worker.step("a", 1, seconds=0.25)
        worker.done("a", fetched_by="memfd", fetched_bytes=1000, fetched_seconds=0.01)
    previews = CacheUse(stage="denoise", cache="previews", hits=7, misses=1)
    worker.beat(caches=(previews, CacheUse(cache="transfer", hits=5, misses=2)))
    cluster.worker("decode").die()
    cluster.submit("b")
    return TestClient(create_app(Cluster(cluster), ServeSection(), version="1"), LOCAL)


def test_the_cluster_is_told_as_it_is(busy: TestClient, cluster: ToyCluster) -> None:
    found = scrape(busy)

    def value(name: str, **labels: str) -> float:
        return found[f"triptych_{name}", tuple(sorted(labels.items()))]

    assert value("jobs_submitted_total") == 2 and value("jobs_ended_total", state="done") == 1
    assert value("jobs", state="running") == 1 and value("tasks_running", stage="encode") == 1
    assert value("stage_seconds_sum", stage="denoise") == pytest.approx(4.0)
    assert value("stage_seconds_bucket", stage="encode", le="0.25") == 0
    assert value("stage_seconds_bucket", stage="encode", le="0.5") == 1
    assert value("stage_seconds_bucket", stage="encode", le="+Inf") == value("stage_seconds_count", stage="encode") == 1
    assert value("queue_wait_seconds_count", stage="encode") == 2
    assert value("step_rows_total") == 2 and value("steps_per_second", stage="denoise") == pytest.approx(4.0)
    assert value("transfer_bytes_total", route="memfd") == 3000
    assert value("transfer_seconds_sum", route="memfd") == pytest.approx(0.03)
    assert (
        value("worker_up", worker="w0", stage="denoise") == 1 and value("worker_up", worker="w1", stage="decode") == 0
    )
    assert value("workers_lost_total") == 1
    for use in ((7, "hits"), (1, "misses")):
        assert use[0] == value(f"cache_{use[1]}_total", worker="w0", stage="denoise", cache="previews")
    assert value("cache_hits_total", worker="w0", stage="", cache="transfer") == 5
    cluster.workers[0].die()
    found = scrape(busy)
    assert value("worker_up", worker="w0", stage="denoise") == 0
    assert value("queue_length", stage="encode") == 1


def test_openmetrics_for_who_asks(busy: TestClient) -> None:
    answer = busy.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text") and answer.text.endswith("# EOF\n")


def test_once_there_are_keys_an_admins_is_needed(engine: FakeEngine) -> None:
    secrets = {"ann": "k" * 40, "bob": "l" * 40}
    keys = KeyRing([ApiKey.of("ann", secrets["ann"], True), ApiKey.of("bob", secrets["bob"], False)])
    client = TestClient(create_app(engine, ServeSection(), version="1", keys=keys), LOCAL)
    statuses = {
        name: client.get("/metrics", headers={"authorization": f"Bearer {secret}"}).status_code
        for name, secret in secrets.items()
    }
    assert statuses == {"ann": 200, "bob": 403} and client.get("/metrics").status_code == 401


def test_two_applications_count_apart() -> None:
    one, two = (TestClient(create_app(FakeEngine(), ServeSection(), version="1"), LOCAL) for _ in range(2))
    one.get("/health")
    key: Any = ("triptych_requests_total", (("method", "GET"), ("route", "/health"), ("status", "200")))
    assert scrape(one)[key] == 1 and key not in scrape(two)


def test_every_metric_is_documented_and_every_documented_one_is_there(busy: TestClient) -> None:
    busy.get("/nowhere")
    families = text_string_to_metric_families(busy.get("/metrics").text)
    names = {family.name + "_total" * (family.type == "counter") for family in families}
    there = {name for name in names if not name.endswith("_created")}
    documented = set(re.findall(r"^\| (.*?) \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE))
    assert there == {name for cell in documented for name in re.findall(r"`((?:triptych|process)_\w+)`", cell)}


def test_a_registry_does_not_ask_the_cluster_before_it_is_read(engine: FakeEngine) -> None:
    def status() -> Status:
        raise AssertionError("asked")

    engine.status = status  # type: ignore[method-assign]
    app = create_app(engine, ServeSection(), version="1")
    assert isinstance(app.state.front.meters.registry, CollectorRegistry)

"""The application on an engine without a model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from tests.server.fake import FakeEngine
from triptych.config import ServeSection
from triptych.server import create_app

LOCAL = "http://localhost"
"""The base URL of a test's client: the server wants to be called by a name of its own."""


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[TestClient]:
    app = create_app(engine, ServeSection(max_body=100_000), version="1")
    with TestClient(app, LOCAL, raise_server_exceptions=False) as client:
        yield client

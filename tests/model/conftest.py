"""What the tests that compare bits share: one thread, and a table of what they found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As many threads as the stage processes use: the number of them decides how convolutions round."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Iterator[list[tuple[str, ...]]]:
    """Collects a table's rows and prints it at the end, under the module's `HEADER`."""
    found: list[tuple[str, ...]] = []
    yield found
    capture: Any = request.config.pluginmanager.getplugin("capturemanager")
    widths = [len(title) for title in request.module.HEADER.split(" | ")]
    with capture.global_and_fixture_disabled():
        print(f"\n\n{request.module.HEADER}")
        for row in found:
            print(" | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)))

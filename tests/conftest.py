"""What holds for every test: one torch thread per parallel worker, no other machine, no user's cache."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1", "0.0.0.0", "::", ""}


def _refuse_network(event: str, args: tuple[object, ...]) -> None:
    """Audit hook: a test that reaches for another machine fails with its address instead of hanging on it."""
    host: object = None
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event == "socket.connect" and isinstance(args[1], tuple):
        host = args[1][0]
    text = host.decode() if isinstance(host, bytes) else host
    if isinstance(text, str) and text not in LOCAL_HOSTS:
        raise ConnectionRefusedError(f"tests use no network, but something wanted {text}")


def pytest_configure() -> None:
    """Sets the process up before anything imports torch or huggingface_hub, which read these then."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    cache = Path(tempfile.gettempdir()) / f"triptych-tests-{os.getuid()}" / "hub"
    os.environ["HF_HOME"] = str(cache)
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    sys.addaudithook(_refuse_network)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Like `tmp_path`, for what has to fit into a Unix socket's path or an error's line."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        yield Path(folder)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the documented commands that no test runs."""
    from tests.test_docs import EXCEPTIONS

    for command, reason in EXCEPTIONS.items():
        terminalreporter.write_line(f"documented but not run: {command} ({reason})")

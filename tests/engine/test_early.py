"""Workers that are started before their model is known: what they say of it, and what is told where they cannot."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.families import folder
from tests.stage.toy import topology
from triptych import Engine, InvalidRequest, LoadError, Unsupported
from triptych.cluster import WorkerSlot
from triptych.engine.early import TOPOLOGY, Early
from triptych.model import topology_to_bytes

PATIENCE = 60.0


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose name leaves room for a socket's."""
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        yield Path(made)


@pytest.fixture
def start(short: Path) -> Iterator[Callable[..., Early]]:
    """Starts processes of these Python sources, one in a slot each."""
    started: list[Early] = []

    def start(*codes: str, folder: Path = short) -> Early:
        slots = [WorkerSlot(f"slot-{at}", [sys.executable, "-c", code]) for at, code in enumerate(codes)]
        early = Early(slots, {slot.name: ("denoise",) for slot in slots}, folder)
        started.append(early)
        early.start()
        return early

    yield start
    for early in started:
        early.stop()


def test_the_first_worker_that_knows_the_model_tells_it(start: Callable[..., Early], short: Path) -> None:
    (short / "said").write_bytes(topology_to_bytes(topology()))
    (short / TOPOLOGY).write_bytes(b"of a model that was served here before")
    write = f"import os, time; time.sleep(0.3); os.replace({str(short / 'said')!r}, {str(short / TOPOLOGY)!r})"
    early = start(f"{write}; time.sleep(60)", "import time; time.sleep(60)")
    assert early.topology() == topology()


def test_a_worker_that_cannot_start_leaves_it_to_the_engine_and_its_crew_hears_of_it(
    start: Callable[..., Early],
) -> None:
    early = start("import time; time.sleep(60)", "import sys; sys.exit(2)")
    assert early.topology() is None
    ends: list[tuple[str, int | None]] = []
    early.supervise(lambda slot, pid, code: ends.append((slot, code)), lambda slot, last: None)
    assert ends == [("slot-1", 2)]


def test_a_worker_that_ends_later_is_told_of_once(start: Callable[..., Early], short: Path) -> None:
    early = start(f"import time, pathlib\nwhile not pathlib.Path({str(short / 'go')!r}).exists(): time.sleep(0.01)")
    ends: list[str] = []
    early.supervise(lambda slot, pid, code: ends.append(f"{slot} {code}"), lambda slot, last: None)
    (short / "go").touch()
    give_up = time.monotonic() + PATIENCE
    while not ends and time.monotonic() < give_up:
        time.sleep(0.01)
    assert ends == ["slot-0 0"]


@pytest.mark.slow
def test_what_is_wrong_is_said_as_if_nothing_had_been_started() -> None:
    with pytest.raises(Unsupported, match="given 'nonsense'; allowed: text2image") as caught:
        Engine.open("emoji", device="cpu", isolate=True, workflow="nonsense")
    assert caught.value.field == "workflow"
    with pytest.raises(LoadError, match="worker encode-denoise-decode did not start: device: given 'xpu'"):
        Engine.open("emoji", device="xpu", isolate=True)


@pytest.mark.slow
def test_a_model_without_all_the_stages_is_served_in_those_that_it_has() -> None:
    with Engine.open(str(folder("ddpm")), device="cpu", isolate=True) as engine:
        assert [part.name for part in engine.topology.stages] == ["denoise"]
        assert [worker.name for worker in engine.status().workers] == ["denoise"]


def test_the_engines_process_needs_no_diffusers() -> None:
    """Nor transformers: it takes them as long to import as the model to load."""
    code = (
        "import sys\n"
        "from triptych import Engine, Request\n"
        "with Engine.open('emoji', device='cpu', isolate=True) as engine:\n"
        "    request = Request.parse(prompt='a cat', num_inference_steps=2)\n"
        "    job = engine.submit(request)\n"
        "    job.result()\n"
        "    assert engine.result_files(job.id)\n"
        "    print([name for name in ('diffusers', 'transformers') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=2 * PATIENCE)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_a_layout_that_does_not_fit_is_refused(short: Path) -> None:
    path = short / "layout.yaml"
    path.write_text("name: odd\nworkers:\n  - stages: [encode]\n")
    with pytest.raises(InvalidRequest, match="one for denoise, decode too") as caught:
        Engine.open("emoji", device="cpu", layout=path)
    assert caught.value.field == "workers"

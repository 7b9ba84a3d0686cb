"""The digest that tells whether two hosts hold the same model, and the topology that crosses as bytes."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from tests.families import FAMILIES, folder
from triptych.errors import WrongPayload
from triptych.model import Source, describe, model_digest, open_model, topology_from_bytes, topology_to_bytes


def digest(path: Path, workflow: str = "text2image") -> str:
    return model_digest(Source("any name", str(path), "folder"), workflow)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder("flux"), tmp_path / "elsewhere"))


def test_equal_folders_give_equal_digests(copy: Path) -> None:
    (copy / ".cache").mkdir()
    (copy / ".cache" / "note").write_text("not the model's")
    assert digest(copy) == digest(folder("flux")) != digest(folder("flux"), "image2image")


def test_any_change_gives_another(copy: Path) -> None:
    before = digest(copy)
    weights = next(copy.glob("transformer/*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    changed = digest(copy)
    (copy / "vae" / "config.json").write_text("{}")
    assert len({before, changed, digest(copy)}) == 3


def test_large_weights_are_sampled(tmp_path: Path) -> None:
    big = tmp_path / "model.safetensors"
    header = b'{"a":1}'
    size = 1 << 40
    with big.open("wb") as file:  # sparse: nothing could read it whole
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(size)
    began = time.perf_counter()
    before = digest(tmp_path)
    assert time.perf_counter() - began < 5
    for place in (10, size - 1):
        with big.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        assert digest(tmp_path) != before, f"byte {place}"
        before = digest(tmp_path)


def test_a_hubs_model_is_its_commit() -> None:
    def of(commit: str, at: str) -> str:
        return model_digest(Source("owner/name", at, "hub", revision=commit), "text2image")

    assert of("abc", "/one") == of("abc", "/two") != of("abd", "/one")


def test_the_embedded_model_is_told_quickly() -> None:
    source = open_model("emoji")
    times = []
    for _ in range(3):
        began = time.perf_counter()
        model_digest(source, "text2image")
        times.append(time.perf_counter() - began)
    assert min(times) < 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_topologies_cross_as_bytes(name: str) -> None:
    topology = describe(open_model(str(folder(name))))
    data = topology_to_bytes(topology)
    assert topology_from_bytes(data) == topology and len(data) < 1 << 16


def test_other_bytes_are_refused() -> None:
    with pytest.raises(WrongPayload, match="no topology"):
        topology_from_bytes(b"\x80")

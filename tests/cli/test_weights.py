"""What `inspect` says of weights that `generate` will refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.families import FAMILIES, folder
from triptych.cli import main
from triptych.cli.weights import refused_weights
from triptych.model import Trust, describe, open_model, processors


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of a model's folder, to be damaged."""
    return Path(shutil.copytree(folder("flux"), tmp_path / "model"))


def weights(model: Path, component: str) -> Path:
    return next((model / component).glob("*.safetensors"))


def pickle(path: Path) -> None:
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()


def test_missing_and_pickled_weights_are_notes(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights(model, "vae").unlink()
    pickle(weights(model, "transformer"))
    assert main(["inspect", str(model), "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert len(notes) == 2
    assert any(note.startswith("component 'vae': no weights in ") for note in notes)
    assert any("'transformer'" in note and "pickle" in note and "--allow-pickle" in note for note in notes)
    assert main(["inspect", str(model)]) == 0
    assert "Unsupported" in capsys.readouterr().out


def test_trust_allows_pickles(model: Path) -> None:
    pickle(weights(model, "transformer"))
    topology = describe(open_model(str(model)))
    assert refused_weights(topology, Trust()) and not refused_weights(topology, Trust(pickle_weights=True))


def test_a_missing_shard_is_named(model: Path) -> None:
    path = weights(model, "transformer")
    index = {"weight_map": dict.fromkeys(load_file(path), "gone-00001-of-00001.safetensors")}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))
    path.unlink()
    (problem,) = refused_weights(describe(open_model(str(model))), Trust())
    assert problem.startswith("component 'transformer': the file gone-00001-of-00001.safetensors is missing in ")


@pytest.mark.parametrize("name", FAMILIES)
def test_whole_models_have_no_such_notes(name: str) -> None:
    assert refused_weights(describe(open_model(str(folder(name)))), Trust()) == []


def test_what_is_only_worth_knowing_is_not_told(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    processors._say_once.cache_clear()
    assert main(["inspect", str(folder("qwen-image-edit-plus"))]) == 0
    assert not capsys.readouterr().err
    assert [record.getMessage() for record in caplog.records if record.levelname != "INFO"] == []

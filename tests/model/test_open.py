"""Where models come from: names, folders and hubs; what is asked of a hub, and what a wrong name is answered."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from tests.model import hub_server, tiny
from triptych.errors import InvalidRequest, LoadError, ModelNotFound, Unsupported
from triptych.model import StageName, describe, program
from triptych.model.files import fetch_weights
from triptych.model.infos import component_infos
from triptych.model.load import Components, Placement
from triptych.model.open import embedded_models, open_model
from triptych.model.topology import Source
from triptych.model.trust import Trust

CPU = Placement(torch.device("cpu"))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, not to be changed."""
    return tiny.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(made, tmp_path / "model"))


@pytest.fixture
def hub(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    """A hub with the tiny model as me/tiny, an older revision of it, and an empty cache."""
    old = Path(shutil.copytree(made, tmp_path / "old"))
    tiny.edit_json(old / "scheduler" / "scheduler_config.json", shift=7.0)
    with hub_server.serve(me__tiny={"main": made, "v1": old}) as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            running.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield running


def test_a_folder_opens_under_its_own_name(folder: Path) -> None:
    assert open_model(str(folder)) == Source(str(folder), str(folder), "folder")


def test_embedded_names_come_first_and_have_a_pipeline() -> None:
    for name in embedded_models():
        source = open_model(name)
        assert source.kind == "embedded"
        assert component_infos(source)["transformer"].parameters > 1000


@pytest.mark.parametrize(
    "name", ["no-such-model", "./no/such/folder", "a/b/c", "", "/nowhere", "../x", "\0", "x" * 5000]
)
def test_an_unknown_name_lists_the_embedded_ones(name: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        open_model(name)
    assert caught.value.field == "model" and repr(name)[:60] in caught.value.message
    assert all(known in caught.value.message for known in embedded_models())


def test_a_folder_without_an_index_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"has no model_index\.json or modular_model_index\.json"):
        open_model(str(tmp_path))


def test_a_file_is_no_model(folder: Path) -> None:
    with pytest.raises(ModelNotFound, match="is a file"):
        open_model(str(folder / "model_index.json"))


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\x00", "[" * 100_000])
def test_a_malformed_index_is_named(folder: Path, text: str) -> None:
    (folder / "model_index.json").write_text(text)
    with pytest.raises(LoadError, match=r"model_index\.json"):
        open_model(str(folder))


def test_a_revision_belongs_to_a_hub(folder: Path) -> None:
    with pytest.raises(InvalidRequest) as caught:
        open_model(str(folder), revision="main")
    assert caught.value.field == "revision"


@pytest.mark.parametrize(
    "index",
    [
        {"vae": ["my_vae", "MyVAE"]},
        {"vae": ["os", "system"]},
        {"vae": ["../evil", "MyVAE"]},
        {"_class_name": ["pipeline", "MyPipeline"]},
    ],
)
def test_code_of_the_models_own_needs_permission(folder: Path, index: dict[str, Any]) -> None:
    tiny.write_index(folder, **index)
    with pytest.raises(LoadError, match="allow-remote-code"):
        open_model(str(folder))
    assert open_model(str(folder), trust=Trust(remote_code=True)).kind == "folder"


@pytest.mark.parametrize("file", ["transformer/config.json", "text_encoder/config.json"])
def test_auto_map_needs_permission(folder: Path, file: str) -> None:
    tiny.edit_json(folder / file, auto_map={"AutoModel": "modeling.Mine"})
    with pytest.raises(LoadError, match="auto_map"):
        open_model(str(folder))


def test_packages_of_diffusers_pipelines_are_no_remote_code(folder: Path) -> None:
    tiny.write_index(folder, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    assert open_model(str(folder))


def test_entries_that_are_no_components_are_left_out(folder: Path) -> None:
    tiny.write_index(folder, boundary_ratio=0.875, expand_timesteps=True, transformer_2=[None, None], sizes=[1, 2, 3])
    infos = component_infos(open_model(str(folder)))
    assert sorted(infos) == sorted(tiny.COMPONENTS)


def test_infos_measure_what_the_headers_say(folder: Path) -> None:
    tiny.vae().half().save_pretrained(folder / "vae")
    infos = component_infos(open_model(str(folder)))
    expected = sum(parameter.numel() for parameter in tiny.vae().parameters())
    vae = infos["vae"]
    assert (vae.parameters, vae.bytes, vae.dtype) == (expected, 2 * expected, "float16")
    assert vae.files == ("vae/diffusion_pytorch_model.safetensors",)
    assert infos["scheduler"].parameters == 0 and infos["scheduler"].files == ()


def test_modular_index_alone_is_enough(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    content: dict[str, Any] = {"_class_name": "FluxModularPipeline"}
    for name, (library, cls) in tiny.COMPONENTS.items():
        content[name] = [
            None,
            None,
            {"type_hint": [library, cls], "subfolder": name, "pretrained_model_name_or_path": "x/y"},
        ]
    (folder / "modular_model_index.json").write_text("{}")
    tiny.edit_json(folder / "modular_model_index.json", **content)
    assert component_infos(open_model(str(folder)))["transformer"].class_name == "FluxTransformer2DModel"
    shutil.rmtree(folder / "vae")
    with pytest.raises(Unsupported, match="another repository"):
        open_model(str(folder))


# --- hubs


def test_opening_and_describing_asks_for_no_weights(hub: hub_server.Hub, made: Path) -> None:
    infos = component_infos(open_model("me/tiny"))
    local = component_infos(open_model(str(made)))
    assert hub.weight_requests() == []
    for name, info in infos.items():
        assert (info.parameters, info.files, info.causal) == (
            local[name].parameters,
            local[name].files,
            local[name].causal,
        )
        assert 0 <= info.bytes - local[name].bytes < 40_000  # the hub's sizes count the header


@pytest.mark.parametrize(
    ("stage", "expected"),
    [("encode", {"text_encoder", "text_encoder_2"}), ("denoise", {"transformer"}), ("decode", {"vae"})],
)
def test_loading_a_stage_fetches_its_weights_alone(hub: hub_server.Hub, stage: StageName, expected: set[str]) -> None:
    topology = describe(open_model("me/tiny"), "text2image")
    assert hub.weight_requests() == []
    program(topology, stage).load(Components(topology.source), CPU)
    assert {file.split("/")[0] for file in hub.weight_requests()} == expected
    seen = len(hub.weight_requests())
    program(topology, stage).load(Components(topology.source), CPU)
    fetch_weights(topology.source, topology.components[min(expected)])
    assert len(hub.weight_requests()) == seen  # now in the cache


def test_the_revision_is_respected_and_pinned(hub: hub_server.Hub) -> None:
    main, old = open_model("me/tiny"), open_model("me/tiny", revision="v1")
    shifts = [Components(source).get(component_infos(source)["scheduler"], CPU).config.shift for source in (main, old)]
    assert shifts == [3.0, 7.0]
    assert old.revision == hub.commit("me/tiny", "v1") != main.revision
    assert open_model("me/tiny", revision=old.revision).folder == old.folder


def test_offline_uses_the_cache_and_says_what_is_missing(hub: hub_server.Hub) -> None:
    online = open_model("me/tiny")
    fetch_weights(online, component_infos(online)["vae"])
    hub.requests.clear()
    source = open_model("me/tiny", offline=True)
    infos = component_infos(source)
    assert Components(source).get(infos["vae"], CPU) is not None
    with pytest.raises(LoadError, match=r"offline.*transformer/diffusion_pytorch_model\.safetensors"):
        Components(source).get(infos["transformer"], CPU)
    assert hub.requests == []


def test_offline_without_a_cache(hub: hub_server.Hub) -> None:
    with pytest.raises(ModelNotFound, match=r"offline.*not in the cache"):
        open_model("me/tiny", offline=True)
    assert hub.requests == []


def test_the_hub_librarys_own_offline_mode(hub: hub_server.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_model("me/tiny")
    hub.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert open_model("me/tiny") == source
    with pytest.raises(LoadError, match=r"cannot fetch vae/diffusion_pytorch_model\.safetensors"):
        Components(source).get(component_infos(source)["vae"], CPU)
    with pytest.raises(ModelNotFound, match=r"offline.*not in the cache"):
        open_model("me/other")
    assert hub.requests == []


def test_unknown_ids_and_revisions(hub: hub_server.Hub) -> None:
    with pytest.raises(ModelNotFound, match=r"no repository 'me/huge'"):
        open_model("me/huge")
    with pytest.raises(ModelNotFound, match="no revision 'v9'") as caught:
        open_model("me/tiny", revision="v9")
    assert caught.value.field == "revision"


def test_a_hub_that_cannot_be_reached(hub: hub_server.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelNotFound, match=r"cannot reach http://127\.0\.0\.1:9"):
        open_model("me/tiny")


def test_a_hub_that_refuses_the_token(hub: hub_server.Hub) -> None:
    hub.refuse = 401
    with pytest.raises(ModelNotFound, match="me/tiny"):
        open_model("me/tiny")


def test_pickles_are_refused_before_they_are_fetched(hub: hub_server.Hub, folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "diffusion_pytorch_model.bin")
    hub.repositories["me/pickle"] = {"main": folder}
    source = open_model("me/pickle")
    with pytest.raises(LoadError, match="pickle"):
        Components(source).get(component_infos(source)["vae"], CPU)
    assert hub.weight_requests() == []

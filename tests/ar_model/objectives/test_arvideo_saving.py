"""ARVideo models load as they were saved, including models of older versions. Damaged folders are refused."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ar_model.objectives import ARVideo, Objective, load_objective
from tests.helpers.small_arvideo import build, random_batch, same_outputs, spec

SAVED = [
    pytest.param("digits", {}, id="joint over digits"),
    pytest.param("digits", {"likelihood": "digits", "code_input": "rows", "rope": False}, id="digits"),
    pytest.param("codebook", {"code_patch": (2, 1, 1)}, id="codebook"),
    pytest.param("none", {"causal": False, "order": "spatial-first"}, id="rows"),
    pytest.param("none", {"input": "pixels", "target": "pixels", "decoder_self": True, "ranks": 0.5}, id="pixels"),
]


def saved(folder: Path, geometry: str, settings: dict[str, Any]) -> ARVideo:
    """Write a model whose weights differ from the initial ones, and return it."""
    model = build(spec(geometry=geometry), **settings)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save(folder)
    return model.eval()


def assert_same_outputs(a: Objective, b: Objective) -> None:
    assert same_outputs(a, b, random_batch(3))


@pytest.mark.parametrize("geometry, settings", SAVED)
def test_a_saved_model_loads_bit_equal(tmp_path: Path, geometry: str, settings: dict[str, Any]) -> None:
    model = saved(tmp_path / "model", geometry, settings)
    loaded = load_objective(tmp_path / "model")
    assert isinstance(loaded, ARVideo) and not loaded.training
    assert_same_outputs(model, loaded)
    loaded.save(tmp_path / "again")
    assert_same_outputs(model, load_objective(tmp_path / "again"))
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (tmp_path / "model" / "config.json").read_text()
    )


def test_a_loaded_model_has_the_settings_of_the_saved_one(tmp_path: Path) -> None:
    model = saved(tmp_path, "digits", {"code_patch": (2, 1, 1), "target": "pixels", "ranks": 0.5})
    loaded = load_objective(tmp_path)
    assert isinstance(loaded, ARVideo)
    assert loaded.clusters == model.clusters
    assert (loaded.input, loaded.predicts, loaded.ranks) == (model.input, model.predicts, model.ranks)


def test_a_model_of_an_older_version_loads(tmp_path: Path) -> None:
    """Older versions saved neither `clip` nor some of the settings."""
    model = saved(tmp_path, "digits", {})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["codes"].pop("clip") == [4, 8, 8]
    for setting in ("input", "target", "ranks", "decoder_self"):
        del config[setting]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_outputs(model, load_objective(tmp_path))


@pytest.mark.parametrize("geometry", ["digits", "codebook", "none"])
def test_loading_untrained_gives_the_same_network_with_new_weights(tmp_path: Path, geometry: str) -> None:
    model = saved(tmp_path, geometry, {})
    torch.manual_seed(0)
    fresh = load_objective(tmp_path, trained=False)
    assert not fresh.training
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    for (name, new), (_, old) in itertools.product(fresh.named_parameters(), model.named_parameters()):
        assert new.shape != old.shape or not torch.equal(new, old), name
    torch.manual_seed(1)
    other = load_objective(tmp_path, trained=False)
    assert not torch.equal(fresh.features(random_batch(2))[-1], other.features(random_batch(2))[-1])


@pytest.mark.parametrize("geometry", ["digits", "codebook", "none"])
def test_features_of_an_untrained_network_depend_on_the_codes(tmp_path: Path, geometry: str) -> None:
    """The untrained network is the baseline of the probes. With equal embeddings of all codes it would be too weak."""
    saved(tmp_path, geometry, {})
    fresh = load_objective(tmp_path, trained=False)
    features = fresh.features(random_batch(2))[-1]
    assert (features[0] - features[1]).abs().max() > 1e-3


@pytest.mark.parametrize("geometry, settings", SAVED)
def test_saved_names_have_no_prefix_of_a_wrapper(tmp_path: Path, geometry: str, settings: dict[str, Any]) -> None:
    saved(tmp_path, geometry, settings)
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
    assert {name.split(".")[0] for name in names} == {"query_D", "embedding", "encoder", "decoder", "target"}
    assert not [name for name in names if "_orig_mod" in name or "module." in name]


def test_weights_that_lack_a_tensor_do_not_load(tmp_path: Path) -> None:
    saved(tmp_path, "digits", {})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "depth": 3}))
    with pytest.raises((ValueError, RuntimeError), match="blocks.2"):
        load_objective(tmp_path)


@pytest.mark.parametrize(
    "damage",
    ["no folder", "no config", "a list", "cut config", "another model", "no codes", "no weights", "cut weights"],
)
def test_a_folder_without_a_model_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    saved(folder, "digits", {})
    config, weights = folder / "config.json", folder / "model.safetensors"
    if damage == "no folder":
        folder = tmp_path / "elsewhere"
    elif damage == "no config":
        config.unlink()
    elif damage == "a list":
        config.write_text("[]")
    elif damage == "cut config":
        config.write_text(config.read_text()[:50])
    elif damage == "another model":
        config.write_text('{"objective": "GPT"}')
    elif damage == "no codes":
        config.write_text('{"objective": "ARVideo"}')
    elif damage == "no weights":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=folder.name):
        load_objective(folder)

"""What is saved is what is loaded, and a short training run gives the losses that it always gave."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from ar_model.attention import set_backend
from ar_model.objectives import ARVideo, Objective, load_objective

from .test_arvideo import build, random_batch, spec

SAVED = [
    pytest.param("digits", {}, id="joint over digits"),
    pytest.param("digits", {"likelihood": "digits", "code_input": "rows", "rope": False}, id="digits"),
    pytest.param("codebook", {"code_patch": (2, 1, 1)}, id="codebook"),
    pytest.param("none", {"causal": False, "order": "spatial-first"}, id="rows"),
]


def saved(folder: Path, geometry: str, settings: dict[str, Any]) -> ARVideo:
    """A model with weights unlike its initial ones, written to the folder."""
    model = build(spec(geometry=geometry), **settings)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save(folder)
    return model.eval()


def assert_same_outputs(a: Objective, b: Objective) -> None:
    batch = random_batch(3)
    with torch.no_grad():
        assert torch.equal(a(batch)["loss"], b(batch)["loss"])
        assert all(torch.equal(x, y) for x, y in zip(a.features(batch), b.features(batch), strict=True))


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
    model = saved(tmp_path, "digits", {"code_patch": (2, 1, 1)})
    loaded = load_objective(tmp_path)
    assert isinstance(loaded, ARVideo)
    assert loaded.clusters == model.clusters
    assert loaded.patch == model.patch


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
def test_an_untrained_network_sees_the_codes(tmp_path: Path, geometry: str) -> None:
    """It is the baseline of the probes: all codes looking alike would make it a straw man."""
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


def train(model: ARVideo, batches: list[dict[str, Tensor]]) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for batch in batches:
        loss = model(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
@pytest.mark.parametrize("name", ["paper", "digits", "masked"])
def test_five_steps_of_training_give_the_losses_they_always_gave(name: str, backend: str) -> None:
    settings: dict[str, dict[str, Any]] = {
        "paper": {"targets": 1.0},
        "digits": {"likelihood": "digits", "code_patch": (2, 1, 1), "rope": False},
        "masked": {"causal": False},
    }
    model = build(**settings[name]).train()
    set_backend(model, backend)
    losses = train(model, [random_batch(4, seed=step) for step in range(5)])
    assert losses == pytest.approx(GOLDEN_LOSSES[name], abs=1e-4)


@pytest.mark.parametrize("likelihood", ["joint", "digits"])
def test_bits_per_code_fall_when_one_batch_is_learned_by_heart(likelihood: str) -> None:
    model = build(width=24, decoder_width=24, likelihood=likelihood, targets=1.0).train()
    batch = random_batch(2)
    losses = train(model, [batch] * 80)
    assert losses[-1] < math.log(64) / 4 < losses[0]


GOLDEN_LOSSES = {
    "paper": [4.290641, 4.212691, 4.260903, 4.219848, 4.146101],
    "digits": [4.178598, 4.145455, 4.152743, 4.182336, 4.170885],
    "masked": [4.269790, 4.280424, 4.277666, 4.365913, 4.263793],
}

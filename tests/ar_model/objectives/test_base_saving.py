"""Every objective saves all its settings, loads bit-equal, and computes the same with every attention kernel."""

import functools
import inspect
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from ar_model.attention import set_backend
from ar_model.objectives import MAM2, VIMPAC, Objective, VideoMAE, load_objective
from ar_model.transformer import compile_blocks
from tests.helpers.small_arvideo import same_outputs
from tests.helpers.small_objectives import CODES, MODELS, SIZE, batch_of


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_loads_bit_equal(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save(tmp_path)
    loaded = load_objective(tmp_path)
    assert type(loaded) is type(model)
    assert same(model.eval(), loaded)
    assert not same(model, load_objective(tmp_path, trained=False))


@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_model_saves_the_same_names_and_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Blocks are traced and run with the `eager` backend, which compiles nothing."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.save(tmp_path / "plain")
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))
    compile_blocks(model)
    model(batch_of(2))["loss"].backward()
    model.save(tmp_path / "compiled")
    assert same(model, load_objective(tmp_path / "plain"))
    files = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("plain", "compiled")]
    assert files[0] == files[1]
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_every_kernel_gives_the_loss_and_gradients_of_the_reference(name: str, backend: str) -> None:
    torch.manual_seed(0)
    model, losses, gradients = MODELS[name](), [], []
    for kernel in ("reference", backend):
        set_backend(model, kernel)
        model.zero_grad()
        loss = model(batch_of(3))["loss"]
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert (gradients[1] - gradients[0]).norm() <= 1e-5 * gradients[0].norm()


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_configuration_has_all_settings(tmp_path: Path, name: str) -> None:
    """A later version with other defaults must build the same model."""
    MODELS[name]().save(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    settings = {
        *inspect.signature(Objective.__init__).parameters,
        *inspect.signature(type(MODELS[name]()).__init__).parameters,
    }
    assert settings - {"self", "trunk", "input", "target"} <= set(saved)
    assert saved["width"] == SIZE["width"] and saved["rope"] is True


def test_a_class_does_not_load_the_model_of_another_class(tmp_path: Path) -> None:
    MODELS["MAM2"]().save(tmp_path)
    assert same(MAM2.from_pretrained(tmp_path), load_objective(tmp_path))
    with pytest.raises(ValueError, match="MAM2.*VideoMAE"):
        VideoMAE.from_pretrained(tmp_path)


def test_a_run_folder_or_a_model_folder_loads_as_path_or_text(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS["MAM2"]().eval()
    model.save(tmp_path / "run" / "model")
    for folder in (tmp_path / "run", tmp_path / "run" / "model"):
        assert same(load_objective(folder), model)
        assert same(load_objective(str(folder)), model)


def same(a: Objective, b: Objective) -> bool:
    return same_outputs(a, b, batch_of(3))


def test_vimpac_shares_its_output_vectors_with_the_input_embedding() -> None:
    """The table is saved once and gets gradients from both uses."""
    model = VIMPAC(CODES, **SIZE, contrast=0.0)
    names = [name for name in model.state_dict() if "table" in name]
    assert names and all(name.startswith("embedding.") for name in names)
    model(batch_of(2))["loss"].backward()
    shared = model.embedding.table  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in shared.parameters())  # type: ignore[union-attr, operator]

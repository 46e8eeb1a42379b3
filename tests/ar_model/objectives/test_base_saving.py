"""Every objective saves what it is, loads as it was, and computes the same with every kernel."""

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
def test_compiled_it_saves_the_same_names_and_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """R31. The compiler traces the blocks and runs what it traced as it is."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.save(tmp_path / "plain")
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))
    compile_blocks(model)
    model(batch_of(2))["loss"].backward()
    model.save(tmp_path / "other")
    assert same(model, load_objective(tmp_path / "plain"))
    files = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("plain", "other")]
    assert files[0] == files[1]
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_every_kernel_gives_the_loss_and_gradients_of_the_definition(name: str, backend: str) -> None:
    """R20, for the attention of each objective."""
    torch.manual_seed(0)
    model, found = MODELS[name](), {}
    for kernel in ("reference", backend):
        set_backend(model, kernel)
        model.zero_grad()
        loss = model(batch_of(3))["loss"]
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found[kernel] = loss.item(), gradients
    (wanted, slope), (got, its_slope) = found.values()
    assert got == pytest.approx(wanted, rel=1e-5)
    assert (its_slope - slope).norm() <= 1e-5 * slope.norm()


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_says_all_settings_those_of_the_trunk_too(tmp_path: Path, name: str) -> None:
    """A later version whose defaults are others builds the same network."""
    MODELS[name]().save(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    settings = {
        *inspect.signature(Objective.__init__).parameters,
        *inspect.signature(type(MODELS[name]()).__init__).parameters,
    }
    assert settings - {"self", "trunk", "input", "target"} <= set(saved)
    assert saved["width"] == SIZE["width"] and saved["rope"] is True


def test_a_class_does_not_load_the_model_of_another(tmp_path: Path) -> None:
    MODELS["MAM2"]().save(tmp_path)
    assert same(MAM2.from_pretrained(tmp_path), load_objective(tmp_path))
    with pytest.raises(ValueError, match="holds a MAM2, not a VideoMAE"):
        VideoMAE.from_pretrained(tmp_path)


def same(a: Objective, b: Objective) -> bool:
    batch = batch_of(3)
    with torch.no_grad():
        losses = torch.equal(a(batch)["loss"], b(batch)["loss"])
        return losses and all(torch.equal(x, y) for x, y in zip(a.features(batch), b.features(batch), strict=True))


def test_what_vimpac_predicts_with_is_what_it_embeds_with() -> None:
    """One owner in the state dictionary, gradients from both sides."""
    model = VIMPAC(CODES, **SIZE, contrast=0.0)
    names = [name for name in model.state_dict() if "table" in name]
    assert names and all(name.startswith("embedding.") for name in names)
    model(batch_of(2))["loss"].backward()
    shared = model.embedding.table  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in shared.parameters())  # type: ignore[union-attr, operator]

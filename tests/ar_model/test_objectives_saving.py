"""Every objective saves what it is and loads as it was."""

from pathlib import Path

import pytest
import torch

from ar_model.objectives import VIMPAC, Objective, load_objective

from .siblings import CODES, MODELS, SIZE, batch_of


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

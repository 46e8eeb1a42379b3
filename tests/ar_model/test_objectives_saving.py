"""Every objective saves what it is and loads as it was."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ar_model.inputs import CodeSpec
from ar_model.objectives import MAM2, VIMPAC, Objective, VideoMAE, load_objective

CODES = CodeSpec(shape=(4, 4, 4), vocab_size=40, levels=(8, 5), clip=(8, 16, 16))
SIZE = {"width": 24, "depth": 2, "heads": 2}
MODELS = {
    "VideoMAE": lambda: VideoMAE(CODES, **SIZE, ratio=0.75, decoder_width=24, decoder_depth=1),
    "VIMPAC": lambda: VIMPAC(CODES, **SIZE, head_width=16),
    "VIMPAC, one row per code": lambda: VIMPAC(CODES, **SIZE, head_width=16, code_input="rows"),
    "MAM2": lambda: MAM2(CODES, **SIZE, ratio=0.75, align=1.0),
}


def batch_of(clips: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "codes_BTHW": torch.randint(40, (clips, 4, 4, 4), generator=draw),
        "pair_BTHW": torch.randint(40, (clips, 4, 4, 4), generator=draw),
        "pixels_BTHWC": torch.randint(256, (clips, 8, 16, 16, 3), generator=draw, dtype=torch.uint8),
        "seed_B": torch.arange(clips),
    }


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

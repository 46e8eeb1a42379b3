"""VIMPAC hides the share of tokens that its paper states, and its losses do not depend on the number of processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ar_model.contrastive import nt_xent
from ar_model.inputs import CodeSpec
from ar_model.objectives import VIMPAC
from ar_model.token_masking import block_mask
from tests.helpers.processes import in_processes

GRID = (4, 6, 6)


def build(**changes: Any) -> VIMPAC:
    torch.manual_seed(0)
    small: dict[str, Any] = {"width": 12, "depth": 2, "heads": 2, "head_width": 16}
    return VIMPAC(CodeSpec(shape=GRID, vocab_size=64, levels=((8, 8),)), **{**small, **changes})


def batch(samples: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(64, (2, samples, *GRID), generator=generator)
    return {"codes_BTHW": codes[0], "pair_BTHW": codes[1], "seed_B": torch.arange(samples) * 7919 + 3}


@pytest.mark.parametrize(
    "grid, blocks, percent",
    [((5, 16, 16), 5, 14.5), ((5, 32, 32), 6, 15.2), ((10, 16, 16), 6, 15.0), ((10, 32, 32), 7, 15.4)],
)
def test_blocks_hide_the_share_in_the_papers_table(grid: Any, blocks: int, percent: float) -> None:
    shares = block_mask(grid, blocks, torch.arange(4000)).float().mean(dim=(1, 2, 3))
    assert 100 * shares.mean() == pytest.approx(percent, abs=0.3)


def test_one_block_is_a_cuboid_within_the_papers_bounds() -> None:
    mask = block_mask((6, 8, 4), 1, torch.arange(3000))
    for axis, (side, longest) in enumerate(((6, 4), (8, 4), (4, 2)), start=1):
        along = mask.any(dim=[d for d in (1, 2, 3) if d != axis])
        lengths = along.sum(1)
        assert set(lengths.tolist()) == set(range(1, longest + 1))
        assert ((along[:, 1:] != along[:, :-1]).sum(1) + along[:, 0] + along[:, -1] == 2).all()  # one interval
        assert along.any(0).all() and along.shape[1] == side
    areas = torch.stack([mask.any(dim=d).sum((1, 2)) for d in (1, 2, 3)]).prod(0)
    assert (areas == mask.sum((1, 2, 3)) ** 2).all()  # the product of a cuboid's three faces is its squared volume


def test_the_encoder_sees_visible_tokens_only() -> None:
    model, data = build(contrast=0.0), batch(6)
    hidden = block_mask(GRID, 5, data["seed_B"])
    before = model(data)["loss"]
    other = {**data, "codes_BTHW": torch.where(hidden, data["codes_BTHW"], (data["codes_BTHW"] + 1) % 64)}
    assert model(other)["loss"] != before
    inputs: list[Tensor] = []
    model.encoder.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    model(data)
    model({**data, "codes_BTHW": torch.where(hidden, (data["codes_BTHW"] + 1) % 64, data["codes_BTHW"])})
    assert torch.equal(inputs[0], inputs[1])


def test_tokens_after_the_end_of_a_video_are_neither_seen_nor_predicted() -> None:
    model, data = build(), batch(6)
    ends = {"slices_B": torch.tensor([1, 2, 3, 4, 1, 2]), "pair_slices_B": torch.tensor([4, 4, 2, 1, 1, 3])}
    absent = torch.arange(4)[None, :, None, None] >= ends["slices_B"][:, None, None, None]
    other = {**data, "codes_BTHW": torch.where(absent, (data["codes_BTHW"] + 1) % 64, data["codes_BTHW"])}
    assert model(data)["loss"] != model(other)["loss"]
    assert model({**data, **ends})["loss"] == model({**other, **ends})["loss"] != model(data)["loss"]
    assert torch.equal(model.features({**data, **ends})[-1], model.features({**other, **ends})[-1])
    full_length = {"slices_B": torch.full((6,), 4), "pair_slices_B": torch.full((6,), 4)}
    assert model({**data, **full_length})["loss"] == model(data)["loss"]


@pytest.mark.parametrize("changes", [{"mask": "block"}, {"mask": "random", "ratio": 0.01}])
def test_some_valid_tokens_of_a_short_video_are_hidden(changes: dict[str, Any]) -> None:
    model, seed_B = build(contrast=0.0, **changes), torch.arange(2000)

    def hidden(slices: int) -> Tensor:
        batch = {"codes_BTHW": torch.zeros(2000, *GRID), "slices_B": torch.full((2000,), slices)}
        return model._hidden(seed_B, model._absent(batch))

    full, short = hidden(4), hidden(1)
    assert short.any(1).all() and not short[:, 36:].any()
    if model.mask == "block":
        assert torch.equal(full, block_mask(GRID, 5, seed_B).flatten(1)) and short.sum(1).float().mean() < 0.5 * 36
    else:
        assert (short.sum(1) == 1).all() and (full.sum(1) == 1).all()


@pytest.mark.parametrize("slices", [[4, 4, 4], [1, 4, 2]])
def test_all_clips_have_the_same_weight_including_short_ones(slices: list[int]) -> None:
    model, data = build(contrast=0.0).eval(), {**batch(3), "slices_B": torch.tensor(slices)}
    losses = [model({key: value[i : i + 1] for key, value in data.items()})["loss"] for i in range(3)]
    assert min(losses) > 1 and model(data)["loss"].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_the_loss_of_a_clip_is_the_mean_over_its_hidden_tokens() -> None:
    model, data = build(contrast=0.0).eval(), batch(1)
    loss = model(data)["loss"]
    hidden = block_mask(GRID, 5, data["seed_B"]).flatten(1)
    x = torch.where(hidden[..., None], model.mask_D, model.embedding(model.input.tokens(data)))
    tokens = model._with_clip_token(x, model.positions)
    h = model.encoder.norm(model.encoder(tokens.x_BLD, rotation=tokens.rotation())[-1][:, 1:])[0, hidden[0]]
    logits = model.target.split(h) @ (model.embedding.table.matrix() * 12**-0.5).T + model.target.bias
    assert loss.item() == pytest.approx(F.cross_entropy(logits, data["codes_BTHW"][0].flatten()[hidden[0]]).item())


def test_features_start_with_the_clip_token() -> None:
    model, data = build().eval(), batch(2)
    layers = model.features(data)
    assert model.grid_of(data) == GRID and layers[-1].shape == (2, 1 + 4 * 6 * 6, 12)
    tokens: list[Tensor] = []
    model.encoder.blocks[0].register_forward_pre_hook(lambda _, args: tokens.append(args[0]))
    model.features(data)
    assert torch.equal(tokens[0][:, 0], model.clip_D.expand(2, -1))


def test_nt_xent_equals_its_formula() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 7)
    z = F.normalize(torch.cat([a, b]), dim=1)
    logits = (z @ z.T / 0.2).fill_diagonal_(float("-inf"))
    expected = F.cross_entropy(logits, torch.arange(10).roll(5))
    assert nt_xent(a, b, 0.2).item() == pytest.approx(2 * expected.item(), rel=1e-6)  # the sum over both directions


def test_clips_of_the_same_video_are_not_negatives() -> None:
    """A video can be in a batch twice, because batches run across the end of an epoch."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 7)
    twice = [torch.cat([x, x[:1]]) for x in (a, b)]
    z = F.normalize(torch.cat(twice), dim=1)
    video = torch.tensor([5, 6, 7, 5, 5, 6, 7, 5])
    partner = torch.arange(8).roll(4)
    excluded = (video[:, None] == video[None]).scatter(1, partner[:, None], False)
    expected = F.cross_entropy((z @ z.T / 0.2).masked_fill(excluded, float("-inf")), partner)
    loss = nt_xent(*twice, 0.2, video[:4])
    assert loss.item() == pytest.approx(2 * expected.item(), rel=1e-6)
    assert loss < nt_xent(*twice, 0.2)


def test_a_batch_of_one_video_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 2"):
        nt_xent(torch.randn(1, 3), torch.randn(1, 3), 0.2)


def _step(rank: int, count: int) -> dict[str, Any]:
    model, data = build(), batch(8)
    share = 8 // count
    local = {key: value[rank * share : (rank + 1) * share] for key, value in data.items()}
    model = DistributedDataParallel(model)
    loss = model(local)["loss"]
    loss.backward()
    gradients = {name: p.grad for name, p in model.module.named_parameters()}
    return {"loss": loss.item(), "gradients": gradients, "buffers": dict(model.module.named_buffers())}


def test_two_processes_have_the_loss_and_gradients_of_one_process(tmp_path: Path) -> None:
    """The two processes share one batch. The contrastive loss and batch normalisation span processes."""
    model = build()
    loss = model(batch(8))["loss"]
    loss.backward()
    results = in_processes(_step, 2, tmp_path)
    assert sum(result["loss"] for result in results) / 2 == pytest.approx(loss.item(), rel=1e-5)
    for result in results:
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(result["gradients"][name], parameter.grad, rtol=1e-4, atol=1e-5)
        for name, buffer in model.named_buffers():
            if "running" in name:
                torch.testing.assert_close(result["buffers"][name], buffer, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"blocks": 0},
        {"contrast": -1.0},
        {"mask": "random", "ratio": 0.0},
        {"mask": "block", "ratio": 0.3},
        {"mask": "random", "blocks": 6},
        {"mask": "tube"},
    ],
)
def test_invalid_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="objective."):
        build(**changes)

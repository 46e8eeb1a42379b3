"""VIMPAC hides the share that its paper prints, ties its output, and contrasts clips over all processes as over one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ar_model.contrastive import nt_xent
from ar_model.inputs import CodeSpec
from ar_model.masking import block_mask
from ar_model.objectives import VIMPAC
from tests.helpers.processes import in_processes

GRID = (4, 6, 6)


def build(**changes: Any) -> VIMPAC:
    torch.manual_seed(0)
    small: dict[str, Any] = {"width": 12, "depth": 2, "heads": 2, "head_width": 16}
    return VIMPAC(CodeSpec(shape=GRID, vocab_size=64, levels=(8, 8)), **{**small, **changes})


def batch(samples: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(64, (2, samples, *GRID), generator=generator)
    return {"codes_BTHW": codes[0], "pair_BTHW": codes[1], "seed_B": torch.arange(samples) * 7919 + 3}


@pytest.mark.parametrize(
    "grid, blocks, percent",
    [((5, 16, 16), 5, 14.5), ((5, 32, 32), 6, 15.2), ((10, 16, 16), 6, 15.0), ((10, 32, 32), 7, 15.4)],
)
def test_blocks_hide_the_share_of_the_papers_table(grid: Any, blocks: int, percent: float) -> None:
    shares = block_mask(grid, blocks, torch.arange(4000)).float().mean(dim=(1, 2, 3))
    assert 100 * shares.mean() == pytest.approx(percent, abs=0.3)


def test_one_block_is_a_cuboid_within_the_papers_bounds() -> None:
    mask = block_mask((6, 8, 4), 1, torch.arange(3000))
    for axis, (side, longest) in enumerate(((6, 4), (8, 4), (4, 2)), start=1):
        along = mask.any(dim=[d for d in (1, 2, 3) if d != axis])
        lengths = along.sum(1)
        assert set(lengths.tolist()) == set(range(1, longest + 1))
        assert ((along[:, 1:] != along[:, :-1]).sum(1) + along[:, 0] + along[:, -1] == 2).all()  # in one piece
        assert along.any(0).all() and along.shape[1] == side
    volume = torch.stack([mask.any(dim=d).sum((1, 2)) for d in (1, 2, 3)]).prod(0)
    assert (volume == mask.sum((1, 2, 3)) ** 2).all()  # a cuboid's three shadows


def test_what_is_hidden_is_not_seen_and_is_all_that_is_predicted() -> None:
    model, data = build(contrast=0.0), batch(6)
    hidden = block_mask(GRID, 5, data["seed_B"])
    before = model(data)["loss"]
    other = {**data, "codes_BTHW": torch.where(hidden, data["codes_BTHW"], (data["codes_BTHW"] + 1) % 64)}
    assert model(other)["loss"] != before  # what is seen tells
    seen: list[Tensor] = []
    model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    model(data)
    model({**data, "codes_BTHW": torch.where(hidden, (data["codes_BTHW"] + 1) % 64, data["codes_BTHW"])})
    assert torch.equal(seen[0], seen[1])


def test_what_is_behind_the_end_of_a_video_is_neither_seen_nor_predicted() -> None:
    model, data = build(), batch(6)
    ends = {"slices_B": torch.tensor([1, 2, 3, 4, 1, 2]), "pair_slices_B": torch.tensor([4, 4, 2, 1, 1, 3])}
    behind = torch.arange(4)[None, :, None, None] >= ends["slices_B"][:, None, None, None]
    other = {**data, "codes_BTHW": torch.where(behind, (data["codes_BTHW"] + 1) % 64, data["codes_BTHW"])}
    assert model(data)["loss"] != model(other)["loss"]
    assert model({**data, **ends})["loss"] == model({**other, **ends})["loss"] != model(data)["loss"]
    pairs = [layer for batch_ in (data, other) for layer in model.features({**batch_, **ends})]
    assert torch.equal(pairs[1], pairs[3])
    whole = {"slices_B": torch.full((6,), 4), "pair_slices_B": torch.full((6,), 4)}
    assert model({**data, **whole})["loss"] == model(data)["loss"]


@pytest.mark.parametrize("changes", [{"mask": "block"}, {"mask": "random", "ratio": 0.01}])
def test_of_a_short_video_something_is_hidden_that_is_there(changes: dict[str, Any]) -> None:
    model, seed_B = build(contrast=0.0, **changes), torch.arange(2000)
    whole, short = (
        model._hidden(
            seed_B, model._absent({"codes_BTHW": torch.zeros(2000, *GRID), "slices_B": torch.full((2000,), n)})
        )
        for n in (4, 1)
    )
    assert short.any(1).all() and not short[:, 36:].any()
    if model.mask == "block":
        assert torch.equal(whole, block_mask(GRID, 5, seed_B).flatten(1)) and short.sum(1).float().mean() < 0.5 * 36
    else:
        assert (short.sum(1) == 1).all() and (whole.sum(1) == 1).all()


def test_all_of_a_short_videos_hidden_tokens_count() -> None:
    model, data = build(contrast=0.0).eval(), batch(3)
    data |= {"slices_B": torch.tensor([1, 4, 2])}
    losses = [model({key: value[i : i + 1] for key, value in data.items()})["loss"] for i in range(3)]
    assert min(losses) > 1 and model(data)["loss"].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_every_clip_counts_the_same_and_every_hidden_token_of_it() -> None:
    model, data = build(contrast=0.0).eval(), batch(3)
    losses = [model({key: value[i : i + 1] for key, value in data.items()})["loss"] for i in range(3)]
    assert model(data)["loss"].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    hidden = block_mask(GRID, 5, data["seed_B"]).flatten(1)
    x = torch.where(hidden[..., None], model.mask_D, model.embedding(model.input.tokens(data)))
    h = model.encoder.norm(model._layers(x, model.positions)[-1][1])[0, hidden[0]]
    logits = model.target.split(h) @ (model.embedding.table.matrix() * 12**-0.5).T + model.target.bias
    assert losses[0].item() == pytest.approx(F.cross_entropy(logits, data["codes_BTHW"][0].flatten()[hidden[0]]).item())


def test_nt_xent_is_the_formula() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 7)
    z = F.normalize(torch.cat([a, b]), dim=1)
    likeness = (z @ z.T / 0.2).fill_diagonal_(float("-inf"))
    wanted = F.cross_entropy(likeness, torch.arange(10).roll(5))
    assert nt_xent(a, b, 0.2).item() == pytest.approx(2 * wanted.item(), rel=1e-6)  # both ways added up


def test_a_video_that_comes_twice_is_not_told_from_itself() -> None:
    """Batches run across the end of an epoch. Its other clips are left out of the sum, not counted as others."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 7)
    twice = [torch.cat([x, x[:1]]) for x in (a, b)]
    z = F.normalize(torch.cat(twice), dim=1)
    likeness = z @ z.T / 0.2
    video = torch.tensor([5, 6, 7, 5, 5, 6, 7, 5])
    partner = torch.arange(8).roll(4)
    hidden = (video[:, None] == video[None]).scatter(1, partner[:, None], False)
    wanted = F.cross_entropy(likeness.masked_fill(hidden, float("-inf")), partner)
    found = nt_xent(*twice, 0.2, video[:4])
    assert found.item() == pytest.approx(2 * wanted.item(), rel=1e-6)
    assert found < nt_xent(*twice, 0.2)


def test_a_batch_of_one_video_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 2"):
        nt_xent(torch.randn(1, 3), torch.randn(1, 3), 0.2)


def _step(rank: int, count: int) -> dict[str, Any]:
    model, data = build(), batch(8)
    share = 8 // count
    mine = {key: value[rank * share : (rank + 1) * share] for key, value in data.items()}
    model = DistributedDataParallel(model)
    loss = model(mine)["loss"]
    loss.backward()
    gradients = {name: p.grad for name, p in model.module.named_parameters()}
    return {"loss": loss.item(), "gradients": gradients, "buffers": dict(model.module.named_buffers())}


def test_two_processes_have_the_loss_and_gradients_of_one_with_the_whole_batch(tmp_path: Path) -> None:
    """The contrast and its normalisation included."""
    model = build()
    loss = model(batch(8))["loss"]
    loss.backward()
    both = in_processes(_step, 2, tmp_path)
    assert sum(found["loss"] for found in both) / 2 == pytest.approx(loss.item(), rel=1e-5)
    for found in both:
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found["gradients"][name], parameter.grad, rtol=1e-4, atol=1e-5)
        for name, buffer in model.named_buffers():
            if "running" in name:
                torch.testing.assert_close(found["buffers"][name], buffer, rtol=1e-4, atol=1e-6)


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
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="objective."):
        build(**changes)

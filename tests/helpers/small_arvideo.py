"""Small ARVideo models, batches whose content identifies its position, and traces of a model's forward pass.

Legend: B samples, S visible and M predicted tokens, P codes or pixels of one token, C colour channels, D width.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ar_model.inputs import CodeSpec, digits_of
from ar_model.objectives import ARVideo, Objective
from ar_model.targets import CodeTarget, PixelTarget

Grid = tuple[int, int, int]
Batch = dict[str, Tensor]


def spec(shape: Grid = (2, 4, 4), geometry: str = "digits") -> CodeSpec:
    """Return a spec of 64 codes, enough for all codes of a small clip to differ. A code covers 2 x 2 x 2 pixels."""
    t, h, w = shape
    clip = (2 * t, 2 * h, 2 * w)
    if geometry == "digits":
        return CodeSpec(shape=shape, vocab_size=64, levels=((8, 8),), clip=clip)
    if geometry == "codebook":
        vectors = torch.randn(64, 5, generator=torch.Generator().manual_seed(9))
        return CodeSpec(shape=shape, vocab_size=64, codebook_VC=vectors, clip=clip)
    return CodeSpec(shape=shape, vocab_size=64, clip=clip)


def build(codes: CodeSpec | None = None, **changes: Any) -> ARVideo:
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "clusters": (1, 2, 2),
        "width": 12,
        "depth": 2,
        "heads": 2,
        "decoder_width": 16,
        "decoder_depth": 2,
        "decoder_heads": 2,
    }
    return ARVideo(spec() if codes is None else codes, **{**small, **changes})


def spread(codes_BTHW: Tensor) -> Tensor:
    """Repeat every code over the 2 x 2 x 2 pixels that it covers."""
    for axis in (1, 2, 3):
        codes_BTHW = codes_BTHW.repeat_interleave(2, axis)
    return codes_BTHW


def distinct_batch(samples: int, shape: Grid) -> Batch:
    """Put code i, and red value i, at position i of every sample, so that content identifies its position."""
    codes = torch.arange(math.prod(shape)).view(shape).expand(samples, *shape).clone()
    red = spread(codes)
    pixels = torch.randint(0, 256, (*red.shape, 3), generator=torch.Generator().manual_seed(1))
    pixels[..., 0] = red
    return {"codes_BTHW": codes, "seed_B": torch.arange(samples) * 7919 + 3, "pixels_BTHWC": pixels.to(torch.uint8)}


def with_changed_positions(batch: Batch, position_B: Tensor) -> Batch:
    """Change the code and the green and blue pixels at one position of each sample."""
    sample_B = torch.arange(len(position_B))
    changed = torch.zeros_like(batch["codes_BTHW"]).flatten(1)
    changed[sample_B, position_B] = 1
    changed = changed.view_as(batch["codes_BTHW"])
    codes = (batch["codes_BTHW"] + changed * (1 + sample_B % 5)[:, None, None, None]) % 64
    step = torch.tensor([0, 90, 110], dtype=torch.uint8)
    pixels = torch.where(spread(changed)[..., None] == 1, batch["pixels_BTHWC"] // 2 + step, batch["pixels_BTHWC"])
    pixels[..., 0] = batch["pixels_BTHWC"][..., 0]
    return {**batch, "codes_BTHW": codes, "pixels_BTHWC": pixels}


def random_batch(samples: int, shape: Grid = (2, 4, 4), seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    t, h, w = shape
    return {
        "codes_BTHW": torch.randint(0, 64, (samples, *shape), generator=generator),
        "seed_B": torch.randint(0, 2**62, (samples,), generator=generator),
        "pixels_BTHWC": torch.randint(
            0, 256, (samples, 2 * t, 2 * h, 2 * w, 3), generator=generator, dtype=torch.uint8
        ),
    }


class Traced(NamedTuple):
    """Intermediate values of one forward pass."""

    visible: Tensor
    """Codes (B, S, P) or pixels (B, S, P, C) that entered the encoder."""
    layers: list[Tensor]
    """Output of every encoder block, (B, S, D)."""
    decoded_BMD: Tensor
    """Output of the decoder."""
    predicted: Tensor
    """Codes (B, M, P) or pixels (B, M, P, C) that are predicted."""
    losses_BMP: Tensor
    """Loss of every code, or of every number of a pixel; their mean is the loss."""
    loss: Tensor


@torch.no_grad()
def trace(model: ARVideo, batch: Batch) -> Traced:
    values: dict[str, Any] = {}
    hooks = [
        model.embedding.register_forward_hook(lambda m, args, out: values.update(visible=args[0])),
        model.encoder.register_forward_hook(lambda m, args, out: values.update(layers=out)),
        model.target.register_forward_hook(lambda m, args, out: values.update(decoded_BMD=args[0], predicted=args[1])),
    ]
    try:
        loss = model(batch)["loss"]
    finally:
        for hook in hooks:
            hook.remove()
    losses_BMP = losses_of(model.target, values["decoded_BMD"], values["predicted"])
    assert abs(loss - losses_BMP.mean()) <= 1e-5 * loss, "the loss is not the mean over the predictions"
    return Traced(**values, losses_BMP=losses_BMP, loss=loss)


def losses_of(target: CodeTarget | PixelTarget, h_BMD: Tensor, predicted: Tensor) -> Tensor:
    """Return the loss of every single code or pixel by its definition, (B, M, P)."""
    if isinstance(target, PixelTarget):
        pixels = predicted.double() / 255
        pixels = (pixels - pixels.mean(2, keepdim=True)) / (pixels.std(2, keepdim=True) + 1e-6)
        return (target.head(h_BMD).double() - pixels.flatten(2)).square()
    h_BMPD = target.split(h_BMD).unflatten(-1, (predicted.shape[-1], -1))
    if target.levels is None:
        logits = [h_BMPD @ target.table.matrix().T * target.scale + target.bias]
        values = predicted[..., None]
    else:
        (levels,) = target.levels
        logits = list(target.digits(h_BMPD).split(levels, dim=-1))
        values = digits_of(predicted, levels)
    nats = [F.cross_entropy(x.flatten(0, -2), values[..., i].flatten(), reduction="none") for i, x in enumerate(logits)]
    return torch.stack(nats).sum(0).view(predicted.shape)


class Places(NamedTuple):
    """Positions of tokens and ranks of clusters in a pass with distinct content, derived from the content itself."""

    token_of_code: Tensor
    cluster_of_token: Tensor
    visible_BS: Tensor
    predicted_BM: Tensor
    rank_BC: Tensor
    """Rank of every cluster in the order of every sample; the number of clusters for those that take no part."""


def locate(traced: Traced, shape: Grid, patch: Grid, box: Grid, ranks: int | None = None) -> Places:
    """Reconstruct tokens and orders from the definition of patches and boxes only. If `ranks` is None, all clusters take part."""
    place = torch.cartesian_prod(*(torch.arange(n) for n in shape)).view(-1, 3)
    grid = torch.tensor([n // p for n, p in zip(shape, patch, strict=True)])
    token_THW = place // torch.tensor(patch)
    counts = grid // torch.tensor(box)
    token_of_code = (token_THW[:, 0] * grid[1] + token_THW[:, 1]) * grid[2] + token_THW[:, 2]
    cluster_THW = token_THW // torch.tensor(box)
    cluster_of_code = (cluster_THW[:, 0] * counts[1] + cluster_THW[:, 1]) * counts[2] + cluster_THW[:, 2]
    cluster_of_token = torch.empty(int(grid.prod()), dtype=torch.long)
    cluster_of_token[token_of_code] = cluster_of_code
    visible_BS, predicted_BM = (token_of_code[x.flatten(2)[..., 0].long()] for x in (traced.visible, traced.predicted))
    n = int(counts.prod())
    ranks = n - 1 if ranks is None else ranks
    visible_blocks = cluster_of_token[visible_BS].unflatten(1, (ranks, -1))
    predicted_blocks = cluster_of_token[predicted_BM].unflatten(1, (ranks, -1))
    assert (visible_blocks == visible_blocks[..., :1]).all() and (predicted_blocks == predicted_blocks[..., :1]).all()
    # Block i of the queries has rank i + 1.
    assert torch.equal(visible_blocks[:, 1:, 0], predicted_blocks[:, :-1, 0])
    order_BR = torch.cat([visible_blocks[:, :, 0], predicted_blocks[:, -1:, 0]], dim=1)
    assert all(len(set(order)) == ranks + 1 for order in order_BR.tolist()), "a cluster has two ranks"
    rank_BC = torch.full((len(order_BR), n), n)
    rank_BC.scatter_(1, order_BR, torch.arange(ranks + 1).expand_as(order_BR))
    return Places(token_of_code, cluster_of_token, visible_BS, predicted_BM, rank_BC)


def same_outputs(a: Objective, b: Objective, batch: Batch) -> bool:
    """Return whether two models have bit-equal losses and features."""
    with torch.no_grad():
        losses = torch.equal(a(batch)["loss"], b(batch)["loss"])
        return losses and all(torch.equal(x, y) for x, y in zip(a.features(batch), b.features(batch), strict=True))


def train(model: Objective, batches: list[Batch], lr: float = 3e-3) -> list[float]:
    """Train by one AdamW step on each batch and return the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for batch in batches:
        loss = model(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses

"""Cross-entropy of a linear head in chunks, without materialising all logits.

Legend: N predictions, D width, V vocabulary, C predictions of a chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_LOGITS = {"cpu": 2**22, "cuda": 2**28}
"""Maximum number of logits of a chunk by device type: 16 MiB in fp32 on a CPU, whose caches are small, and 1 GiB on a GPU, which
needs large matrix products. Other devices use the number of the CPU."""


def linear_cross_entropy(
    h_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    target_N: Tensor,
    share_N: Tensor | None = None,
    *,
    max_logits: int | None = None,
) -> Tensor:
    """Return the mean cross-entropy in nats (fp32 scalar) between the logits `h @ weight.T + bias` and int64 targets.

    The forward pass also computes the gradients, one chunk of predictions at a time. Logits are neither kept for the backward
    pass nor computed again there. Matrix products run in the autocast dtype if autocast is enabled. Softmax and sums run in
    fp32. `share_N` gives the weight of each prediction, with a sum of 1. Without it, all predictions have equal weights.
    `max_logits` is the largest number of logits of a chunk, by default that of MAX_LOGITS.
    """
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (h_ND, weight_VD, bias_V))
    rows = max(1, (max_logits or MAX_LOGITS.get(h_ND.device.type, MAX_LOGITS["cpu"])) // len(weight_VD))
    return _LinearCrossEntropy.apply(h_ND, weight_VD, bias_V, target_N, share_N, needs_grad, rows)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor,
        target_N: Tensor,
        share_N: Tensor | None,
        needs_grad: bool,
        rows: int,
    ) -> Tensor:
        device = h_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_ND.dtype
        total = torch.zeros((), device=h_ND.device)
        # Without gradients, these tensors stay empty.
        dh_ND = torch.empty_like(h_ND if needs_grad else h_ND[:0])
        dweight_VD, dbias_V = (
            torch.zeros_like(x if needs_grad else x[:0], dtype=torch.float32) for x in (weight_VD, bias_V)
        )
        with torch.autocast(device, enabled=False):
            weight, bias = weight_VD.to(dtype), bias_V.to(dtype)
            for first in range(0, len(h_ND), rows):
                h_CD, target_C1 = h_ND[first : first + rows].to(dtype), target_N[first : first + rows, None]
                logits_CV = F.linear(h_CD, weight, bias).float()
                norm_C1 = logits_CV.logsumexp(1, keepdim=True)
                nats_C1 = norm_C1 - logits_CV.gather(1, target_C1)
                share_C1 = None if share_N is None else share_N[first : first + rows, None].float()
                total += (nats_C1 if share_C1 is None else nats_C1 * share_C1).sum()
                if not needs_grad:
                    continue
                # Gradient of the cross-entropy with respect to the logits: softmax minus one-hot target, in place.
                d_CV = logits_CV.sub_(norm_C1).exp_()
                d_CV.scatter_add_(1, target_C1, torch.full_like(norm_C1, -1.0))
                if share_C1 is not None:
                    d_CV *= share_C1
                dbias_V += d_CV.sum(0)
                d = d_CV.to(dtype)
                dh_ND[first : first + rows] = d @ weight
                dweight_VD += d.T @ h_CD
        ctx.save_for_backward(dh_ND, dweight_VD, dbias_V)
        ctx.dtypes = h_ND.dtype, weight_VD.dtype, bias_V.dtype
        ctx.count = 1 if share_N is not None else len(h_ND)
        return total / ctx.count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scale = g / ctx.count
        dh, dweight, dbias = ((d * scale).to(dtype) for d, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return dh, dweight, dbias, None, None, None, None

"""ARVideo: predict space-time clusters of tokens, one after another, in a random order (arXiv 2405.15160).

What is seen  clusters of tokens in a random order; of each the encoder gets a random share `keep`, of the last nothing
              (sections 3.2, 3.3). A share `ranks` of the clusters takes part in a step (the paper: all).
Input         the codes of a tokenizer, or pixels as in the paper.
Trunk         a ViT under a block-triangular mask; a decoder of cross-attention only, whose queries of a cluster see
              lower ranks (section 3.4).
Target        cross-entropy of the codes, or the squared error of pixels as in the paper, in a random share `targets` of
              each next cluster.

Legend: B batch, L tokens, M seen and Q predicted ones, N clusters, R ranks of a step, K tokens of a cluster, k kept and m
predicted ones, D width.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ar_model.backends import BlockMask
from ar_model.clusters import ClusterGrid, Order, cluster_order, some_ranks, tokens_by_rank
from ar_model.inputs import CodeSpec, Content, Grid, take
from ar_model.objectives.base import Objective, as_grid, check_choices, check_shares
from ar_model.targets import CodeLikelihood, make_target
from ar_model.transformer import AttentionContext, CrossDecoder, init_weights


class ARVideo(Objective):
    """Autoregressive prediction of space-time clusters in a random order (arXiv 2405.15160).

    The cluster that comes first in an order has nothing before it and is not predicted, as in the paper.

    Args:
        clusters: tokens of a cluster along (t, h, w).
        order: order of prediction.
        keep: share of each cluster's tokens that the encoder sees.
        targets: share of each next cluster's tokens that is predicted in a step; all of them in validation.
        ranks: share of the predicted clusters that a step has; the others are not seen either. All of them in validation.
        causal: false is the control of the same boxes, dropping and decoder without the causal mask: masked prediction
            of tokens that were dropped.
        input: what the encoder gets; pixels need a cache that keeps them.
        target: what is predicted.
        likelihood: predict a code at once, or digit by digit.
        decoder_width: width of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_heads: attention heads of the decoder.
        decoder_self: self-attention in the decoder: queries see queries of their own and of lower ranks.

    Raises:
        ValueError: for clusters that do not divide the grid or shares that are not in (0, 1].
    """

    def __init__(
        self,
        codes: CodeSpec,
        *,
        clusters: Grid = (2, 4, 4),
        order: Order = "random",
        keep: float = 0.25,
        targets: float = 0.25,
        ranks: float = 1.0,
        causal: bool = True,
        input: Content = "codes",  # noqa: A002
        target: Content = "codes",
        likelihood: CodeLikelihood = "joint",
        decoder_width: int = 128,
        decoder_depth: int = 2,
        decoder_heads: int = 4,
        decoder_self: bool = False,
        **trunk: Any,
    ) -> None:
        super().__init__(codes, input=input, target=target, **trunk)
        check_choices({"order": Order, "likelihood": CodeLikelihood}, order=order, likelihood=likelihood)
        check_shares(keep=keep, targets=targets, ranks=ranks)
        if min(decoder_width, decoder_depth) < 1:
            raise ValueError("objective.decoder_width and decoder_depth must be at least 1")
        clusters = as_grid(clusters=clusters)
        self.clusters, self.order, self.causal = ClusterGrid(self.grid, clusters), order, causal
        self.members_NK: Tensor
        self.register_buffer("members_NK", self.clusters.members(), persistent=False)
        n, size = self.members_NK.shape
        if n < 2:
            raise ValueError("objective.clusters: one covers the whole clip, nothing is left to predict")
        self.kept, self.predicted, self.ranks = _count(keep, size), _count(targets, size), _count(ranks, n - 1)
        if not causal and self.kept == size:
            raise ValueError("without the causal mask only dropped tokens are predicted: keep must leave some")

        self.query_D = nn.Parameter(torch.randn(decoder_width) * 0.02)
        self.decoder = CrossDecoder(decoder_width, decoder_depth, decoder_heads, self.width, with_self=decoder_self)
        self.target = make_target(self.predicts, codes, decoder_width, likelihood)
        for part in (self.embedding, self.encoder, self.decoder):
            part.apply(init_weights)
        self.query_positions = self.positions.for_width(decoder_width, decoder_heads)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Predict the next clusters of a clip, in the order that `seed_B` draws."""
        ranks, predicted = self._asked()
        seen_BM, wanted_BQ = self._draw(batch["seed_B"], ranks, predicted)

        def mask(queries: int, keys: int) -> BlockMask | None:
            return BlockMask(ranks, queries, keys) if self.causal else None

        # Encoder: run i of the tokens is the cluster of rank i. Decoder: run i of the queries is rank i + 1, and sees ranks 0..i.
        x_BMD = self.encode(batch, seen_BM, mask(self.kept, self.kept))
        query_BQD, rotation = self.query_positions(wanted_BQ)
        sight = AttentionContext(
            mask(predicted, self.kept), rotation, self.query_positions(seen_BM)[1], self_mask=mask(predicted, predicted)
        )
        h_BQD = self.decoder(self.query_D + query_BQD, x_BMD, sight)
        loss = self.target(h_BQD, take(self.predicts.tokens(batch), wanted_BQ))
        return {"loss": loss, **self.target.numbers(loss.detach())}

    def _asked(self) -> tuple[int, int]:
        """Clusters of a step and tokens of each to predict: as configured in training, all that there are in evaluation."""
        n, size = self.members_NK.shape
        most = size if self.causal else size - self.kept
        return (self.ranks, min(self.predicted, most)) if self.training else (n - 1, most)

    def _draw(self, seed_B: Tensor, ranks: int, predicted: int) -> tuple[Tensor, Tensor]:
        """Tokens that the encoder sees, (B, R * k), and tokens to predict, (B, R * m), both sorted by rank."""
        order_BN = cluster_order(self.clusters, self.order, seed_B)
        if ranks + 1 < order_BN.shape[1]:
            order_BN = some_ranks(order_BN, ranks + 1, seed_B)
        tokens_BRK = tokens_by_rank(self.members_NK, order_BN, seed_B)
        return tokens_BRK[:, :-1, : self.kept].flatten(1), tokens_BRK[:, 1:, -predicted:].flatten(1)


def _count(share: float, of: int) -> int:
    """At least one; 0.28 of 25 is 7, not the 7 + 1e-15 that floats make of it."""
    return math.ceil(share * of - 1e-9)

"""ARVideo: predict space-time clusters of tokens, one after another, in a random order (arXiv 2405.15160).

Visible  The encoder gets a random share `keep` of the tokens of every cluster except the last (sections 3.2 and 3.3). A share
         `ranks` of the clusters takes part in a step (in the paper: all).
Input    Codes of a tokenizer, or pixels as in the paper.
Model    A ViT with a block-triangular mask, and a decoder with cross-attention only. A query of a cluster sees clusters of lower
         rank (section 3.4).
Target   A random share `targets` of the tokens of each next cluster: cross-entropy of codes, or squared error of pixels as in
         the paper.

Legend: B batch, N clusters, R ranks of a step, K tokens of a cluster, k of them visible, m of them predicted, M = R * k visible
tokens, Q = R * m predicted tokens, P codes or pixels of a token, D width.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ar_model.attention_mask import BlockMask
from ar_model.clusters import ClusterGrid, Order, choose_clusters, cluster_order, tokens_by_rank
from ar_model.inputs import CodeSpec, Content, Grid, take
from ar_model.objectives.base import Objective, as_grid, check_choices, check_positive, check_shares
from ar_model.targets import CodeLikelihood, make_target
from ar_model.transformer import AttentionContext, CrossDecoder, init_weights


class ARVideo(Objective):
    """Autoregressive prediction of space-time clusters in a random order (arXiv 2405.15160).

    The first cluster of an order has no context and is not predicted, as in the paper.

    Args:
        clusters: tokens of a cluster along (t, h, w).
        order: order of prediction.
        keep: share of each cluster's tokens that the encoder sees.
        targets: share of each next cluster's tokens that is predicted in a training step. Validation predicts all.
        ranks: share of the clusters that a training step predicts; the other clusters are omitted. Validation predicts all.
        causal: false removes the causal mask and predicts the tokens that the encoder does not see, as a control experiment.
        dropped_only: predict only tokens that the encoder does not see, so that the control differs in the mask only.
        input: input of the encoder; pixels need a cache made with --keep_pixels.
        target: what is predicted.
        likelihood: one softmax per code, or one per digit of a code; auto: per digit if a place has several codes with digits.
        decoder_width: width of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_heads: attention heads of the decoder.
        decoder_self: add self-attention to the decoder, in which queries see queries of the same and of lower ranks.

    Raises a ValueError if clusters do not divide the grid, a share is not in (0, 1], or nothing is left to predict.
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
        dropped_only: bool = False,
        input: Content = "codes",  # noqa: A002
        target: Content = "codes",
        likelihood: CodeLikelihood = "auto",
        decoder_width: int = 128,
        decoder_depth: int = 2,
        decoder_heads: int = 4,
        decoder_self: bool = False,
        **trunk: Any,
    ) -> None:
        super().__init__(codes, input=input, target=target, **trunk)
        check_choices(order=(order, Order), likelihood=(likelihood, CodeLikelihood))
        check_shares(keep=keep, targets=targets, ranks=ranks)
        check_positive(decoder_width=decoder_width, decoder_depth=decoder_depth)
        self.clusters, self.order, self.causal = ClusterGrid(self.grid, as_grid("clusters", clusters)), order, causal
        self.dropped_only = dropped_only or not causal
        self.members_NK = nn.Buffer(self.clusters.members(), persistent=False)
        n, size = self.members_NK.shape
        if n < 2:
            raise ValueError("objective.clusters: one cluster covers the whole clip, so nothing is left to predict")
        self.kept, self.predicted, self.ranks = _count(keep, size), _count(targets, size), _count(ranks, n - 1)
        if self.dropped_only and self.kept == size:
            setting = "dropped_only true" if dropped_only else "causal false"
            raise ValueError(f"objective.{setting} predicts unseen tokens, but objective.keep {keep} leaves none")
        self.query_D = nn.Parameter(torch.randn(decoder_width) * 0.02)
        self.decoder = CrossDecoder(decoder_width, decoder_depth, decoder_heads, self.width, with_self=decoder_self)
        self.target = make_target(self.predicts, codes, decoder_width, likelihood)
        for part in (self.embedding, self.encoder, self.decoder):
            part.apply(init_weights)
        self.query_positions = self.positions.for_width(decoder_width, decoder_heads)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Predict the next clusters of each clip, in the order that `seed_B` determines."""
        ranks, predicted = self._counts()
        visible_BM, predicted_BQ = self._draw(batch["seed_B"], ranks, predicted)

        def mask(queries: int, keys: int) -> BlockMask | None:
            return BlockMask(ranks, queries, keys) if self.causal else None

        # In the encoder, block i of the mask is the cluster of rank i. In the decoder, block i of the queries is rank i + 1.
        x_BMD = self.encode(batch, visible_BM, mask(self.kept, self.kept))
        query_BQD, rotation = self.query_positions(predicted_BQ)
        context_rotation = self.query_positions(visible_BM)[1]
        context = AttentionContext(mask(predicted, self.kept), rotation, context_rotation, mask(predicted, predicted))
        h_BQD = self.decoder(self.query_D + query_BQD, x_BMD, context)
        content_BQP = take(self.predicts.tokens(batch), predicted_BQ)
        loss = self.target(h_BQD, content_BQP)
        return {"loss": loss, **self.target.numbers(loss.detach(), content_BQP)}

    def _hidden_in_words(self) -> str:
        size = self.members_NK.shape[1]
        sees = "earlier clusters" if self.causal else "all clusters but the last"
        only = ", only unseen tokens predicted" if self.dropped_only else ""
        return (
            f"{self.kept} of {size} tokens of {sees} visible{only}, clusters of {self.clusters.box}, order {self.order}"
        )

    def _counts(self) -> tuple[int, int]:
        """Return the numbers of ranks and of predicted tokens per cluster: the configured ones in training, else the maximum."""
        n, size = self.members_NK.shape
        max_predicted = size - self.kept if self.dropped_only else size
        return (self.ranks, min(self.predicted, max_predicted)) if self.training else (n - 1, max_predicted)

    def _draw(self, seed_B: Tensor, ranks: int, predicted: int) -> tuple[Tensor, Tensor]:
        """Return the visible tokens, (B, R * k), and the tokens to predict, (B, R * m), both sorted by rank."""
        order_BN = cluster_order(self.clusters, self.order, seed_B)
        if ranks + 1 < order_BN.shape[1]:
            order_BN = choose_clusters(order_BN, ranks + 1, seed_B)
        tokens_BRK = tokens_by_rank(self.members_NK, order_BN, seed_B)
        return tokens_BRK[:, :-1, : self.kept].flatten(1), tokens_BRK[:, 1:, -predicted:].flatten(1)


def _count(share: float, total: int) -> int:
    """Return the share of a total, rounded up, at least 1."""
    # The margin corrects products such as 0.28 * 25 = 7.000000000000001, which would be rounded up.
    return math.ceil(share * total - 1e-9)

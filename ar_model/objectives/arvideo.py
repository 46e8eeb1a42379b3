"""ARVideo: predict space-time clusters of tokens, one after another, in a random order (arXiv 2405.15160).

What is seen  clusters of tokens in a random order; of each the encoder gets a random share `keep`, of the last nothing
              (sections 3.2, 3.3).
Input         the codes of a tokenizer (the paper: pixels).
Trunk         a ViT under a block-triangular mask; a decoder of cross-attention only, whose queries of a cluster see
              lower ranks (section 3.4).
Target        cross-entropy of the codes (the paper: squared error of pixels) in a random share `targets` of
              each next cluster.

Legend: B batch, T H W the grid of codes, L tokens, N clusters, K tokens of a cluster, k kept and m predicted ones,
P codes of a token, D width.
"""

import math
from typing import get_args

import torch
from torch import Tensor, nn

from ar_model.attention import BlockMask, Rotation
from ar_model.clusters import ClusterGrid, Order, cluster_order, tokens_by_rank
from ar_model.inputs import CodeEmbedding, CodeInput, CodeSpec, patch_codes, token_grid
from ar_model.objectives.base import Objective
from ar_model.targets import CodeLikelihood, CodeTarget
from ar_model.transformer import CrossDecoder, Encoder, init_weights, rotary_angles, sincos_positions


class ARVideo(Objective):
    """Autoregressive prediction of space-time clusters in a random order (arXiv 2405.15160).

    The cluster that comes first in an order has nothing before it and is not predicted, as in the paper.

    Args:
        codes: what the cache says of its codes.
        clusters: tokens of a cluster along (t, h, w).
        order: order of prediction.
        keep: share of each cluster's tokens that the encoder sees.
        targets: share of each next cluster's tokens that is predicted in a step; all of them in validation.
        causal: false is the control of the same boxes, dropping and decoder without the causal mask: masked prediction
            of tokens that were dropped.
        code_patch: codes of one token along (t, h, w).
        code_input: embed codes by their geometry, or by one row per code.
        rope: turn queries and keys by their positions (axial rotary positions), besides adding sine-cosine
            positions to the tokens.
        likelihood: predict a code at once, or digit by digit.
        width: width of the encoder.
        depth: blocks of the encoder.
        heads: attention heads of the encoder.
        decoder_width: width of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_heads: attention heads of the decoder.

    Raises:
        ValueError: for clusters that do not divide the grid or shares that are not in (0, 1].
    """

    def __init__(
        self,
        codes: CodeSpec,
        *,
        clusters: tuple[int, int, int] = (2, 4, 4),
        order: Order = "random",
        keep: float = 0.25,
        targets: float = 0.25,
        causal: bool = True,
        code_patch: tuple[int, int, int] = (1, 1, 1),
        code_input: CodeInput = "geometry",
        rope: bool = True,
        likelihood: CodeLikelihood = "joint",
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        decoder_width: int = 128,
        decoder_depth: int = 2,
        decoder_heads: int = 4,
    ) -> None:
        super().__init__()
        if order not in get_args(Order) or code_input not in get_args(CodeInput):
            raise ValueError(f"order {order!r} or code_input {code_input!r} is none of the choices")
        if min(width, depth, decoder_width, decoder_depth) < 1:
            raise ValueError("objective.width, depth, decoder_width and decoder_depth must be at least 1")
        clusters, code_patch = _three(clusters), _three(code_patch)
        for name, share in (("keep", keep), ("targets", targets)):
            if not 0 < share <= 1:
                raise ValueError(f"objective.{name} is {share}, but must be a share in (0, 1]")
        self.patch = code_patch
        self.clusters = ClusterGrid(token_grid(codes, code_patch), clusters)
        self.time_slices = self.clusters.grid[0]
        self.order = order
        self.causal = causal
        self.members_NK: Tensor
        self.position_LD: Tensor
        self.query_position_LD: Tensor
        self.angle_LA: Tensor
        self.query_angle_LA: Tensor
        self.register_buffer("members_NK", self.clusters.members(), persistent=False)
        n, size = self.members_NK.shape
        if n < 2:
            raise ValueError("one cluster covers the whole clip: nothing is left to predict")
        self.kept, self.predicted = (
            math.ceil(share * size - 1e-9) for share in (keep, targets)
        )  # 0.28 of 25 is 7, not 7 + 1e-15
        if not causal and self.kept == size:
            raise ValueError("without the causal mask only dropped tokens are predicted: keep must leave some")

        self.embedding = CodeEmbedding(codes, width, math.prod(code_patch), by_geometry=code_input == "geometry")
        self.encoder = Encoder(width, depth, heads)
        self.query_D = nn.Parameter(torch.randn(decoder_width) * 0.02)
        self.decoder = CrossDecoder(decoder_width, decoder_depth, decoder_heads, context_width=width)
        self.target = CodeTarget(codes, decoder_width, math.prod(code_patch), likelihood)
        for part in (self.embedding, self.encoder, self.decoder):
            part.apply(init_weights)
        grid = self.clusters.grid
        self.register_buffer("position_LD", sincos_positions(grid, width), persistent=False)
        self.register_buffer("query_position_LD", sincos_positions(grid, decoder_width), persistent=False)
        self.rope = rope
        self.register_buffer("angle_LA", rotary_angles(grid, width // heads), persistent=False)
        self.register_buffer("query_angle_LA", rotary_angles(grid, decoder_width // decoder_heads), persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Predict the next clusters of `codes_BTHW`, in the order that `seed_B` draws."""
        codes_BLP = patch_codes(batch["codes_BTHW"], self.patch)
        order_BN = cluster_order(self.clusters, self.order, batch["seed_B"])
        tokens_BNK = tokens_by_rank(self.members_NK, order_BN, batch["seed_B"])
        seen_BL = tokens_BNK[:, :-1, : self.kept].flatten(1)
        wanted_BM = tokens_BNK[:, 1:, -self._predicted_now() :].flatten(1)

        x_BLD = self.embedding(_take(codes_BLP, seen_BL)) + self.position_LD[seen_BL]
        layers = self.encoder(x_BLD, self._mask(self.kept), self._rotation(self.angle_LA[seen_BL]))
        h_BMD = self.decoder(
            self.query_D + self.query_position_LD[wanted_BM],
            self.encoder.norm(layers[-1]),
            self._mask(self._predicted_now()),
            self._rotation(self.query_angle_LA[wanted_BM]),
            self._rotation(self.query_angle_LA[seen_BL]),
        )
        loss = self.target(h_BMD, _take(codes_BLP, wanted_BM)).mean()
        return {"loss": loss, "bits_per_code": loss.detach() / math.log(2)}

    def features(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """Output of every encoder block for whole clips, (B, L, D) in raster order; no mask, nothing dropped."""
        codes_BLP = patch_codes(batch["codes_BTHW"], self.patch)
        return self.encoder(self.embedding(codes_BLP) + self.position_LD, rotation=self._rotation(self.angle_LA[None]))

    def _rotation(self, angle_BLA: Tensor) -> Rotation | None:
        return Rotation.of(angle_BLA) if self.rope else None

    def _predicted_now(self) -> int:
        """Targets per cluster: the configured share in training, all that may be asked in evaluation."""
        size = self.members_NK.shape[1]
        most = size if self.causal else size - self.kept
        return min(self.predicted, most) if self.training else most

    def _mask(self, queries: int) -> BlockMask | None:
        """Encoder: run i holds rank i. Decoder: its run i holds rank i + 1, and so sees ranks up to i."""
        return BlockMask(len(self.members_NK) - 1, queries, self.kept) if self.causal else None


def _take(codes_BLP: Tensor, tokens_BM: Tensor) -> Tensor:
    return codes_BLP.gather(1, tokens_BM[..., None].expand(-1, -1, codes_BLP.shape[-1]))


def _three(sides: tuple[int, int, int]) -> tuple[int, int, int]:
    """A tuple also of the list that a saved configuration gives."""
    return sides[0], sides[1], sides[2]

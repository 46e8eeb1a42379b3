"""VIMPAC: predict the codes of hidden blocks, and which two clips are from the same video (arXiv 2106.11250).

Visible  All tokens, but one learned vector replaces the tokens in a few cuboids, about 15 % (section 3.2), and another learned
         vector replaces the tokens after the end of a short video.
Input    Codes of a tokenizer, and one clip token.
Model    A ViT on all tokens, without a decoder.
Target   Cross-entropy of the hidden codes, whose output vectors are shared with the input embedding, and NT-Xent between two
         clips of each video (section 3.3), on the clip token after a small network.

The ViT has pre-norm blocks with attention over all tokens, as for the other objectives here. The paper's blocks are post-norm
and attend along time first, then along height and width.

Legend: B clips (with pairs: all first clips, then all second clips), L tokens, K of them that may be predicted,
P codes of a token, D width.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ar_model.clusters import hashed
from ar_model.contrastive import GlobalBatchNorm, nt_xent
from ar_model.inputs import CodeEmbedding, CodeSpec, take
from ar_model.objectives.base import EmbeddedTokens, Objective, check_choices, check_positive
from ar_model.targets import CodeLikelihood, CodeTarget
from ar_model.token_masking import block_mask, check_ratio, scattered_mask
from ar_model.transformer import Positions, init_weights

Hiding = Literal["block", "random"]
BLOCKS, RATIO = 5, 0.15
"""Defaults. Each setting belongs to one kind of mask, and must keep its default with the other kind."""
MAX_PREDICTED = 0.5
"""Maximum share of a clip's tokens in the loss. All clips get this number of rows. Blocks rarely hide more."""


class VIMPAC(Objective):
    """Masked code modelling by blocks, and contrast between two clips of a video (arXiv 2106.11250).

    Args:
        mask: hide blocks, or single tokens anywhere.
        blocks: number of blocks with mask block. Blocks may overlap; 5 to 7 blocks hide about 15 %.
        ratio: share of the tokens that mask random hides.
        contrast: weight of the contrastive loss between two clips of a video; with 0, one view per video is enough.
        temperature: temperature of the contrastive loss, also a factor of its weight.
        likelihood: one softmax per code, or one per digit of a code; auto: per digit if a place has several codes with digits.
        head_width: hidden width of the contrastive head.

    Raises a ValueError for settings that are out of range or belong to the other kind of mask.
    """

    feature_parts = (*Objective.feature_parts, "clip_D", "pad_D")

    def __init__(
        self,
        codes: CodeSpec,
        *,
        mask: Hiding = "block",
        blocks: int = BLOCKS,
        ratio: float = RATIO,
        contrast: float = 1.0,
        temperature: float = 0.2,
        likelihood: CodeLikelihood = "auto",
        head_width: int = 512,
        **trunk: Any,
    ) -> None:
        super().__init__(codes, input="codes", target="codes", **trunk)
        check_choices(mask=(mask, Hiding), likelihood=(likelihood, CodeLikelihood))
        check_positive(blocks=blocks, head_width=head_width)
        if contrast < 0:
            raise ValueError(f"objective.contrast must be at least 0, got {contrast}")
        if temperature <= 0:
            raise ValueError(f"objective.temperature must be above 0, got {temperature}")
        if (mask == "block" and ratio != RATIO) or (mask == "random" and blocks != BLOCKS):
            raise ValueError(f"objective.ratio needs objective.mask random, objective.blocks mask block; got {mask}")
        if mask == "random":
            check_ratio("random", self.grid, ratio)
        self.mask, self.blocks, self.ratio, self.contrast, self.temperature = mask, blocks, ratio, contrast, temperature
        self.needs_pairs = contrast > 0
        self.mask_D = nn.Parameter(torch.randn(self.width) * 0.02)
        self.clip_D = nn.Parameter(torch.randn(self.width) * 0.02)
        self.pad_D = nn.Parameter(torch.zeros(self.width))
        table = None
        if isinstance(self.embedding, CodeEmbedding) and self.embedding.merge is None and likelihood != "digits":
            table = self.embedding.table
        self.target = CodeTarget(codes, self.width, math.prod(self.predicts.box), likelihood, table)
        self.head: nn.Sequential | None = None
        if self.needs_pairs:
            self.head = nn.Sequential(
                nn.Linear(self.width, head_width), GlobalBatchNorm(head_width), nn.ReLU(), nn.Linear(head_width, 256)
            )
        for part in (self.embedding, self.encoder, self.head):
            if part is not None:
                part.apply(init_weights)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Predict the hidden codes and, with `pair_BTHW` and `contrast`, which clips are from the same video."""
        with_pairs = self.head is not None and "pair_BTHW" in batch
        if with_pairs:
            # Both losses use the same masked clips, as in the paper. The second clip of a pair has blocks of its own.
            batch = _append_pairs(batch)
        content_BLP, absent_BL, seed_B = self.input.tokens(batch), self._absent(batch), batch["seed_B"]
        hidden_BL = self._hidden(seed_B, absent_BL)
        x_BLD = torch.where(hidden_BL[..., None], self.mask_D, self._embed(content_BLP, absent_BL))
        tokens = self._with_clip_token(x_BLD, self.positions)
        last_BLD = self.encoder(tokens.x_BLD, rotation=tokens.rotation())[-1]
        clip_BD, out_BLD = last_BLD[:, 0], last_BLD[:, 1:]
        predicted_BK, share_BK = _predicted(hidden_BL, seed_B)
        content_BKP = take(content_BLP, predicted_BK)
        nats = self.target(take(self.encoder.norm(out_BLD), predicted_BK), content_BKP, share_BK)
        numbers = self.target.numbers(nats.detach(), content_BKP)
        if not with_pairs or self.head is None:
            return {"loss": nats, **numbers}
        first_BD, second_BD = self.head(self.encoder.norm(clip_BD)).chunk(2)
        contrast = nt_xent(first_BD, second_BD, self.temperature, batch.get("row_B"))
        return {"loss": nats + self.contrast * self.temperature * contrast, "contrast": contrast.detach(), **numbers}

    def _hidden_in_words(self) -> str:
        hidden = f"{self.blocks} blocks" if self.mask == "block" else f"mask random of {self.ratio:g}"
        return f"{hidden} hidden within the video"

    def embed(self, batch: dict[str, Tensor]) -> EmbeddedTokens:
        x_BLD = self._embed(self.input.tokens(batch), self._absent(batch))
        return self._with_clip_token(x_BLD, self.positions.resized(self.grid_of(batch)))

    def _embed(self, content_BLP: Tensor, absent_BL: Tensor) -> Tensor:
        return torch.where(absent_BL[..., None], self.pad_D, self.embedding(content_BLP))

    def _absent(self, batch: dict[str, Tensor]) -> Tensor:
        """Return a bool mask, (B or 1, L), true for tokens after the end of their video."""
        t, h, w = self.grid_of(batch)
        slice_L = torch.arange(t, device=batch["codes_BTHW"].device).repeat_interleave(h * w)
        if "slices_B" not in batch:
            return torch.zeros_like(slice_L, dtype=torch.bool)[None]
        return slice_L * self.predicts.box[0] >= batch["slices_B"][:, None]

    def _with_clip_token(self, x_BLD: Tensor, positions: Positions) -> EmbeddedTokens:
        """Return the clip token, which has no position, and all other tokens with their positions."""
        clip_B1D = self.clip_D.to(x_BLD.dtype).expand(len(x_BLD), 1, -1)
        x_BLD = torch.cat([clip_B1D, x_BLD + positions.encoding_LD], dim=1)
        # Angle 0 does not rotate the clip token.
        return EmbeddedTokens(x_BLD, F.pad(positions.angle_LA, (0, 0, 1, 0)) if positions.rope else None)

    def _hidden(self, seed_B: Tensor, absent_BL: Tensor) -> Tensor:
        """Return a bool mask, (B, L), true for hidden tokens. Tokens after the end of a video are not hidden."""
        if self.mask == "block":
            slices_B = (~absent_BL.view(-1, *self.grid)[:, :, 0, 0]).sum(1).expand(len(seed_B))
            return block_mask(self.grid, self.blocks, seed_B, slices_B).flatten(1)
        return scattered_mask(self.ratio, seed_B, absent_BL)


def _predicted(hidden_BL: Tensor, seed_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return K token indices per clip, hidden tokens first, and their weights in the loss, both (B, K).

    The hidden tokens of a clip have equal weights, and visible tokens have weight 0. The weights of each clip sum to 1 / B.
    """
    count = hidden_BL.shape[1]
    # Random keys in [-2**61, 2**61): adding 2**62 puts hidden tokens first, in random order.
    random_BL = hashed(seed_B, count, stream=5) >> 2
    order_BL = (torch.where(hidden_BL, 2**62, 0) + random_BL).argsort(1, descending=True)
    predicted_BK = order_BL[:, : max(1, int(MAX_PREDICTED * count))]
    weight_BK = hidden_BL.gather(1, predicted_BK).float()
    return predicted_BK, weight_BK / weight_BK.sum(1, keepdim=True) / len(weight_BK)


def _append_pairs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return one batch of all clips, then all their pairs. The seed of a pair is the bitwise complement of the clip's seed."""
    pairs = {"codes_BTHW": batch["pair_BTHW"], "seed_B": ~batch["seed_B"]}
    if "slices_B" in batch:
        pairs["slices_B"] = batch["pair_slices_B"]
    return batch | {name: torch.cat([batch[name], pair]) for name, pair in pairs.items()}

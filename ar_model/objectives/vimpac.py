"""VIMPAC: predict the codes of hidden blocks, and which two clips are of one video (arXiv 2106.11250).

What is seen  all tokens; those in a few cuboids, about 15 %, are replaced by one learned vector (section 3.2), those behind
              the end of a short video by another.
Input         the codes of a tokenizer, and a token that stands for the clip.
Trunk         a ViT on all of them, nothing else.
Target        the cross-entropy of the hidden codes, whose output vectors are those of the input; and NT-Xent between two clips
              of each video (section 3.3), by the clip's token through a small network.

The trunk is the one that all objectives here share: joint attention with norms before it, where the paper's attends along
time, then along height and width, with norms behind it.

Legend: B clips (of pairs: first all first ones, then all second ones), L tokens, K of them that may be predicted, D width.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ar_model.attention import Rotation
from ar_model.clusters import hashed
from ar_model.contrastive import GlobalBatchNorm, nt_xent
from ar_model.inputs import CodeEmbedding, CodeSpec, take
from ar_model.masking import block_mask, check_ratio, scattered_mask
from ar_model.objectives.base import Objective, check_choices
from ar_model.targets import CodeLikelihood, CodeTarget
from ar_model.transformer import Positions, init_weights

Hiding = Literal["block", "random"]
BLOCKS, RATIO = 5, 0.15
"""By default; anything else is a choice, which the other mask refuses."""
MOST = 0.5
"""Share of a clip's tokens that is predicted at most, so that all clips have as many rows; blocks rarely hide more."""


class VIMPAC(Objective):
    """Masked code modelling by blocks, and contrast between two clips of a video (arXiv 2106.11250).

    Args:
        mask: what is hidden: blocks, or single tokens anywhere.
        blocks: how many blocks are drawn, which may overlap; 5 to 7 hide about 15 %.
        ratio: share that is hidden where the mask is random.
        contrast: weight of the contrast between two clips of a video; 0: none, and one view of a video is enough.
        temperature: of the contrast, which it is multiplied by too.
        likelihood: predict a code at once, or digit by digit.
        head_width: width of the network between the clip's token and the contrast.

    Raises:
        ValueError: for a number of blocks or a share that makes no sense.
    """

    def __init__(
        self,
        codes: CodeSpec,
        *,
        mask: Hiding = "block",
        blocks: int = BLOCKS,
        ratio: float = RATIO,
        contrast: float = 1.0,
        temperature: float = 0.2,
        likelihood: CodeLikelihood = "joint",
        head_width: int = 512,
        **trunk: Any,
    ) -> None:
        super().__init__(codes, input="codes", target="codes", **trunk)
        check_choices({"mask": Hiding, "likelihood": CodeLikelihood}, mask=mask, likelihood=likelihood)
        if blocks < 1 or contrast < 0 or temperature <= 0 or head_width < 1:
            raise ValueError("objective.blocks, temperature and head_width must be above 0, contrast at least 0")
        if (mask == "block" and ratio != RATIO) or (mask == "random" and blocks != BLOCKS):
            raise ValueError("objective.ratio is for mask random, objective.blocks for mask block")
        if mask == "random":
            check_ratio("random", self.grid, ratio)
        self.mask, self.blocks, self.ratio, self.contrast, self.temperature = mask, blocks, ratio, contrast, temperature
        self.needs_pairs = contrast > 0
        self.mask_D, self.clip_D = (nn.Parameter(torch.randn(self.width) * 0.02) for _ in range(2))
        self.pad_D = nn.Parameter(torch.zeros(self.width))
        table = None
        if isinstance(self.embedding, CodeEmbedding) and self.embedding.merge is None and likelihood == "joint":
            table = self.embedding.table
        self.target = CodeTarget(codes, self.width, math.prod(self.predicts.box), likelihood, table)
        self.head = _head(self.width, head_width) if contrast else None
        for part in (self.embedding, self.encoder, self.head):
            if part is not None:
                part.apply(init_weights)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Predict what the blocks hide that `seed_B` draws; with `pair_BTHW`, also which clips belong together."""
        pairs = self.head is not None and "pair_BTHW" in batch
        if pairs:  # both losses see the same hidden clips, as in the paper; a pair has its own blocks
            batch = _both(batch)
        content_BLP, absent_BL, seed_B = self.input.tokens(batch), self._absent(batch), batch["seed_B"]
        hidden_BL = self._hidden(seed_B, absent_BL)
        x_BLD = torch.where(hidden_BL[..., None], self.mask_D, self._embed(content_BLP, absent_BL))
        clip_BD, out_BLD = self._see(x_BLD, self.positions)[-1]
        wanted_BK, share_BK = _predicted(hidden_BL, seed_B)
        nats = self.target(take(self.encoder.norm(out_BLD), wanted_BK), take(content_BLP, wanted_BK), share_BK)
        said = self.target.numbers(nats.detach())
        if not pairs or self.head is None:
            return {"loss": nats, **said}
        first_BD, second_BD = self.head(self.encoder.norm(clip_BD)).chunk(2)
        apart = nt_xent(first_BD, second_BD, self.temperature, batch.get("row_B"))
        return {"loss": nats + self.contrast * self.temperature * apart, "contrast": apart.detach(), **said}

    def features(self, batch: dict[str, Tensor]) -> list[Tensor]:
        grid = self._grid(batch)
        x_BLD = self._embed(self.input.tokens(batch), self._absent(batch))
        return [out_BLD for _, out_BLD in self._see(x_BLD, self.positions.laid_over(grid))]

    def _embed(self, content_BLP: Tensor, absent_BL: Tensor) -> Tensor:
        return torch.where(absent_BL[..., None], self.pad_D, self.embedding(content_BLP))

    def _absent(self, batch: dict[str, Tensor]) -> Tensor:
        """Whether each token is behind the end of its video, (B or 1, L)."""
        t, h, w = self._grid(batch)
        slice_L = torch.arange(t, device=batch["codes_BTHW"].device).repeat_interleave(h * w)
        if "slices_B" not in batch:
            return torch.zeros_like(slice_L, dtype=torch.bool)[None]
        return slice_L * self.predicts.box[0] >= batch["slices_B"][:, None]

    def _see(self, x_BLD: Tensor, positions: Positions) -> list[tuple[Tensor, Tensor]]:
        """The clip's token (B, D) and all others (B, L, D) after every block."""
        position_1LD, rotation = positions(torch.arange(x_BLD.shape[1], device=x_BLD.device)[None])
        if rotation is not None:
            rotation = Rotation.joined(Rotation.of(torch.zeros_like(positions.angle_LA[None, :1])), rotation)
        clip_B1D = self.clip_D.to(x_BLD.dtype).expand(len(x_BLD), 1, -1)
        layers = self.encoder(torch.cat([clip_B1D, x_BLD + position_1LD], dim=1), rotation=rotation)
        return [(layer[:, 0], layer[:, 1:]) for layer in layers]

    def _hidden(self, seed_B: Tensor, absent_BL: Tensor) -> Tensor:
        """Whether each token is hidden, (B, L): some of those that are there."""
        if self.mask == "block":
            slices_B = (~absent_BL.view(-1, *self.grid)[:, :, 0, 0]).sum(1).expand(len(seed_B))
            return block_mask(self.grid, self.blocks, seed_B, slices_B).flatten(1)
        return scattered_mask(self.ratio, seed_B, absent_BL)


def _predicted(hidden_BL: Tensor, seed_B: Tensor) -> tuple[Tensor, Tensor]:
    """Equally many tokens of each clip, first of all hidden ones, and what each counts: of a clip the hidden ones the same
    and the others nothing, and all clips the same."""
    count, order_BL = hidden_BL.shape[1], hashed(seed_B, hidden_BL.shape[1], stream=5) >> 2
    wanted_BL = (hidden_BL * 2**62 + order_BL).argsort(1, descending=True)
    wanted_BK = wanted_BL[:, : max(1, int(MOST * count))]
    counts_BK = hidden_BL.gather(1, wanted_BK).float()
    return wanted_BK, counts_BK / counts_BK.sum(1, keepdim=True) / len(counts_BK)


def _both(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The clips of a batch and behind them their pairs, as one batch."""
    codes_BTHW = torch.cat([batch["codes_BTHW"], batch["pair_BTHW"]])
    both = {**batch, "codes_BTHW": codes_BTHW, "seed_B": torch.cat([batch["seed_B"], ~batch["seed_B"]])}
    if "slices_B" in batch:
        both["slices_B"] = torch.cat([batch["slices_B"], batch["pair_slices_B"]])
    return both


def _head(width: int, hidden: int, out: int = 256) -> nn.Sequential:
    """Between the clip's token and the contrast (section 3.3)."""
    return nn.Sequential(nn.Linear(width, hidden), GlobalBatchNorm(hidden), nn.ReLU(), nn.Linear(hidden, out))

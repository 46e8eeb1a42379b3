"""VideoMAE: predict the pixels of hidden tubes from the few tubelets that stay visible (arXiv 2203.12602).

What is seen  a tenth of the tubelets: the same places of every slice of time are hidden (section 3.3).
Input         tubelets of pixels, or the codes of a tokenizer.
Trunk         a ViT on the visible tokens; a narrow decoder of self-attention on those and a mask token for each hidden one.
Target        the squared error of the hidden tubelets' pixels, each normalised by colour, or the cross-entropy of their codes.

Legend: B batch, M visible and Q hidden tokens, D width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ar_model.attention import Rotation
from ar_model.inputs import CodeSpec, Content, take
from ar_model.masking import Masking, check_ratio, masked
from ar_model.objectives.base import Objective, check_choices
from ar_model.targets import CodeLikelihood, make_target
from ar_model.transformer import SelfDecoder, init_weights


class VideoMAE(Objective):
    """Masked autoencoding of tubes (arXiv 2203.12602), whose own positions are `flat` and not rotary.

    Args:
        mask: what is hidden together: the same places of all slices, whole slices, or single tokens.
        ratio: share that is hidden.
        input: what the encoder gets; pixels need a cache that keeps them.
        target: what is predicted of hidden tokens.
        likelihood: predict a code at once, or digit by digit.
        decoder_width: width of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_heads: attention heads of the decoder.

    Raises:
        ValueError: for a ratio that hides nothing or leaves nothing visible.
    """

    def __init__(
        self,
        codes: CodeSpec,
        *,
        mask: Masking = "tube",
        ratio: float = 0.9,
        input: Content = "pixels",  # noqa: A002
        target: Content = "pixels",
        likelihood: CodeLikelihood = "joint",
        decoder_width: int = 64,
        decoder_depth: int = 4,
        decoder_heads: int = 2,
        **trunk: Any,
    ) -> None:
        super().__init__(codes, input=input, target=target, **trunk)
        check_choices({"mask": Masking, "likelihood": CodeLikelihood}, mask=mask, likelihood=likelihood)
        check_ratio(mask, self.grid, ratio)
        self.mask, self.ratio = mask, ratio
        self.mask_D = nn.Parameter(torch.randn(decoder_width) * 0.02)
        self.decoder = SelfDecoder(decoder_width, decoder_depth, decoder_heads, self.width)
        self.decoder_positions = self.positions.for_width(decoder_width, decoder_heads)
        self.target = make_target(self.predicts, codes, decoder_width, likelihood)
        for part in (self.embedding, self.encoder, self.decoder):
            part.apply(init_weights)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Predict what the tubes hide that `seed_B` draws."""
        visible_BM, hidden_BQ = masked(self.mask, self.grid, self.ratio, batch["seed_B"])
        x_BMD = self.encode(batch, visible_BM)
        position_BMD, seen = self.decoder_positions(visible_BM)
        query_BQD, asked = self.decoder_positions(hidden_BQ)
        rotation = Rotation.joined(seen, asked) if seen and asked else None
        h_BQD = self.decoder(self.mask_D + query_BQD, x_BMD, position_BMD, rotation)
        loss = self.target(h_BQD, take(self.predicts.tokens(batch), hidden_BQ))
        return {"loss": loss, **self.target.numbers(loss.detach())}

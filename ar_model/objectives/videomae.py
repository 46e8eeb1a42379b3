"""VideoMAE: predict the pixels of hidden tubes from the few visible tubelets (arXiv 2203.12602).

Visible  A tenth of the tubelets; the same locations are hidden in every time slice (section 3.3).
Input    Tubelets of pixels, or codes of a tokenizer.
Model    A ViT on the visible tokens, and a narrow self-attention decoder on them and on a mask token for each hidden token.
Target   Squared error of the hidden tubelets' pixels, normalised per channel, or cross-entropy of their codes.

Legend: B batch, M visible and Q hidden tokens, P codes or pixels of a token, D width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ar_model.inputs import CodeSpec, Content, take
from ar_model.objectives.base import Objective, check_choices, check_positive
from ar_model.targets import CodeLikelihood, make_target
from ar_model.token_masking import Masking, check_ratio, draw_mask
from ar_model.transformer import SelfDecoder, init_weights


class VideoMAE(Objective):
    """Masked autoencoding of tubes (arXiv 2203.12602). The paper's positions correspond to `flat` true and `rope` false.

    Args:
        mask: hide the same locations in all time slices, whole slices, or single tokens.
        ratio: share of the tokens that are hidden.
        input: input of the encoder; pixels need a cache made with --keep_pixels.
        target: what is predicted for hidden tokens.
        likelihood: one softmax per code, or one per digit of a code; auto: per digit if a place has several codes with digits.
        decoder_width: width of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_heads: attention heads of the decoder.

    Raises a ValueError if the ratio hides nothing or everything.
    """

    def __init__(
        self,
        codes: CodeSpec,
        *,
        mask: Masking = "tube",
        ratio: float = 0.9,
        input: Content = "pixels",  # noqa: A002
        target: Content = "pixels",
        likelihood: CodeLikelihood = "auto",
        decoder_width: int = 64,
        decoder_depth: int = 4,
        decoder_heads: int = 2,
        **trunk: Any,
    ) -> None:
        super().__init__(codes, input=input, target=target, **trunk)
        check_choices(mask=(mask, Masking), likelihood=(likelihood, CodeLikelihood))
        check_positive(decoder_width=decoder_width, decoder_depth=decoder_depth)
        check_ratio(mask, self.grid, ratio)
        self.mask, self.ratio = mask, ratio
        self.mask_D = nn.Parameter(torch.randn(decoder_width) * 0.02)
        self.decoder = SelfDecoder(decoder_width, decoder_depth, decoder_heads, self.width)
        self.decoder_positions = self.positions.for_width(decoder_width, decoder_heads)
        self.target = make_target(self.predicts, codes, decoder_width, likelihood)
        for part in (self.embedding, self.encoder, self.decoder):
            part.apply(init_weights)

    def _hidden_in_words(self) -> str:
        return f"mask {self.mask} of {self.ratio:g} hidden"

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Predict the tokens hidden by the mask that `seed_B` determines."""
        visible_BM, hidden_BQ = draw_mask(self.mask, self.grid, self.ratio, batch["seed_B"])
        x_BMD = self.encode(batch, visible_BM)
        position_BLD, rotation = self.decoder_positions(torch.cat([visible_BM, hidden_BQ], dim=1))
        position_BMD, query_BQD = position_BLD.tensor_split([visible_BM.shape[1]], dim=1)
        h_BQD = self.decoder(self.mask_D + query_BQD, x_BMD, position_BMD, rotation)
        content_BQP = take(self.predicts.tokens(batch), hidden_BQ)
        loss = self.target(h_BQD, content_BQP)
        return {"loss": loss, **self.target.numbers(loss.detach(), content_BQP)}

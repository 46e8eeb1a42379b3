"""MAM2: predict the appearance and the motion of hidden tubelets with separate decoders (arXiv 2210.05234).

This module is based on the paper's abstract: an encoder, a regressor that separates visible from hidden tokens, and two
decoders, one for VQGAN codes and one for RGB differences. The rest follows CAE (arXiv 2202.03026), the image model that MAM2
extends, and can be set: the mask, the depths, the loss weights, the kind of RGB difference, and the alignment of latents.

Visible  A part of the tubelets; the same locations are hidden in every time slice.
Input    Tubelets of pixels, or codes of a tokenizer.
Model    A ViT on the visible tokens, a regressor whose queries for hidden tokens attend to them, and two small self-attention
         decoders on the regressor's output.
Target   Cross-entropy of the hidden tubelets' codes, and squared error of their normalised RGB differences. With `align`, also
         the squared error between the regressor's output and the encoder's output for the hidden tokens.

Legend: B batch, M visible and Q hidden tokens, P codes or pixels of a token, D width.
"""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ar_model.inputs import CodeSpec, Content, Patching, take
from ar_model.objectives.base import Objective, check_choices, check_positive
from ar_model.targets import CodeLikelihood, CodeTarget, Difference, PixelTarget, Target, rgb_difference
from ar_model.token_masking import Masking, check_ratio, draw_mask
from ar_model.transformer import AttentionContext, CrossDecoder, Encoder, init_weights


class MAM2(Objective):
    """Masked appearance and motion modelling (arXiv 2210.05234, with details beyond its abstract chosen here).

    Args:
        mask: hide the same locations in all time slices, whole slices, or single tokens.
        ratio: share of the tokens that are hidden.
        input: input of the encoder.
        appearance: weight of the codes' cross-entropy; 0 omits the decoder of codes.
        motion: weight of the squared error of RGB differences; 0 omits the decoder of differences.
        align: weight of the squared error between the regressor's and the encoder's output for hidden tokens; 2 in CAE.
        difference: RGB difference between the frames of a tubelet, or to the next tubelet.
        likelihood: one softmax per code, or one per digit of a code; auto: per digit if a place has several codes with digits.
        regressor_depth: blocks of the regressor, as wide as the encoder.
        decoder_depth: blocks of each decoder, as wide as the encoder.

    Raises a ValueError if the ratio hides nothing or everything, or a weight, depth or difference is invalid.
    """

    needs_pixels = True

    def __init__(
        self,
        codes: CodeSpec,
        *,
        mask: Masking = "tube",
        ratio: float = 0.75,
        input: Content = "pixels",  # noqa: A002
        appearance: float = 1.0,
        motion: float = 1.0,
        align: float = 0.0,
        difference: Difference = "within",
        likelihood: CodeLikelihood = "auto",
        regressor_depth: int = 2,
        decoder_depth: int = 1,
        **trunk: Any,
    ) -> None:
        super().__init__(codes, input=input, target="codes", **trunk)
        check_choices(
            mask=(mask, Masking), likelihood=(likelihood, CodeLikelihood), difference=(difference, Difference)
        )
        self.weights = {"appearance": appearance, "motion": motion, "align": align}
        if min(self.weights.values()) < 0 or appearance == motion == 0:
            message = "weights of the objective must be at least 0, and appearance or motion above 0"
            raise ValueError(f"{message}, got {self.weights}")
        check_positive(regressor_depth=regressor_depth, decoder_depth=decoder_depth)
        check_ratio(mask, self.grid, ratio)
        self.mask, self.ratio, self.difference = mask, ratio, difference
        self.tubelets = Patching.of("pixels", codes, self.predicts.box) if motion > 0 else None
        self.needs_pixels = motion > 0 or input == "pixels"
        self.query_D = nn.Parameter(torch.randn(self.width) * 0.02)
        self.regressor = CrossDecoder(self.width, regressor_depth, self.heads, self.width, with_self=True)
        self.decoders, self.targets = nn.ModuleDict(), nn.ModuleDict()
        if appearance > 0:
            self.decoders["appearance"] = Encoder(self.width, decoder_depth, self.heads)
            self.targets["appearance"] = CodeTarget(codes, self.width, math.prod(self.predicts.box), likelihood)
        if self.tubelets is not None:
            frames, rows, columns = self.tubelets.box
            if difference == "within" and frames < 2:
                raise ValueError("objective.difference within needs tubelets of at least 2 frames, got 1: use next")
            if difference == "next" and self.grid[0] < 2:
                raise ValueError("objective.difference next needs at least 2 tubelets along time, got 1: use within")
            differences = frames - 1 if difference == "within" else frames
            self.decoders["motion"] = Encoder(self.width, decoder_depth, self.heads)
            self.targets["motion"] = PixelTarget(self.width, (differences, rows, columns))
        for part in (self.embedding, self.encoder, self.regressor, self.decoders):
            part.apply(init_weights)

    def _hidden_in_words(self) -> str:
        return f"mask {self.mask} of {self.ratio:g} hidden"

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Predict the tokens hidden by the mask that `seed_B` determines."""
        visible_BM, hidden_BQ = draw_mask(self.mask, self.grid, self.ratio, batch["seed_B"])
        x_BMD = self.encode(batch, visible_BM)
        query_BQD, rotation = self.positions(hidden_BQ)
        attention_context = AttentionContext(rotation=rotation, context_rotation=self.positions(visible_BM)[1])
        regressed_BQD = self.regressor(self.query_D + query_BQD, x_BMD, attention_context)
        losses: dict[str, Tensor] = {}
        numbers: dict[str, Tensor] = {}
        for name, decoder in self.decoders.items():
            h_BQD = cast(Encoder, decoder).last(regressed_BQD + query_BQD, rotation=rotation)
            target = cast(Target, self.targets[name])
            content_BQP = take(self._target_content(name, batch), hidden_BQ)
            losses[name] = target(h_BQD, content_BQP)
            numbers |= target.numbers(losses[name].detach(), content_BQP)
        if self.weights["align"] > 0:
            # No gradient: the encoder must not learn outputs that are easy to regress.
            with torch.no_grad():
                latent_BQD = self.encode(batch, hidden_BQ)
            losses["align"] = F.mse_loss(regressed_BQD.float(), latent_BQD.float())
        loss = torch.stack([self.weights[name] * value for name, value in losses.items()]).sum()
        return {"loss": loss, **{name: value.detach() for name, value in losses.items()}, **numbers}

    def _target_content(self, name: str, batch: dict[str, Tensor]) -> Tensor:
        """Return the codes (for `appearance`) or the RGB differences (for `motion`) of all tokens."""
        if self.tubelets is None or name == "appearance":
            return self.predicts.tokens(batch)
        return rgb_difference(self.tubelets.tokens(batch), self.grid[0], self.tubelets.box[0], self.difference)

"""MAM2: from the few tubelets that stay visible, regress the hidden ones and decode their appearance and their motion apart
(arXiv 2210.05234).

Certain is only what the abstract says: an encoder, a regressor that separates what is seen from what is asked, and two decoders,
one for VQGAN codes, one for RGB differences. All else is our choice, after the image model that it grew from (CAE, arXiv
2202.03026), and a setting: the mask, the depths, the weights, which difference, and whether latents are aligned.

What is seen  visible tubelets; the same places of every slice of time are hidden.
Input         tubelets of pixels, or codes.
Trunk         a ViT on the visible tokens; a regressor, whose queries for hidden ones read them; two small decoders of
              self-attention on what it finds.
Target        the cross-entropy of the hidden tubelets' codes, and the squared error of their normalised RGB differences; with
              `align`, also that of the regressor's output to what the encoder makes of the hidden tokens.

Legend: B batch, M visible and Q hidden tokens, D width.
"""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ar_model.inputs import CodeSpec, Content, Patching, take
from ar_model.masking import Masking, check_ratio, masked
from ar_model.objectives.base import Objective, check_choices
from ar_model.targets import CodeLikelihood, CodeTarget, Difference, PixelTarget, rgb_difference
from ar_model.transformer import AttentionContext, CrossDecoder, Encoder, init_weights


class MAM2(Objective):
    """Masked appearance and motion modelling (arXiv 2210.05234; what its abstract does not say is ours).

    Args:
        mask: what is hidden together: the same places of all slices, whole slices, or single tokens.
        ratio: share that is hidden.
        input: what the encoder gets.
        appearance: weight of the codes' cross-entropy; 0: no such decoder.
        motion: weight of the RGB differences; 0: no such decoder.
        align: weight of the squared error between the regressor's output and the encoder's for hidden tokens; CAE's is 2.
        difference: of frames within a tubelet, or to the next tubelet.
        likelihood: predict a code at once, or digit by digit.
        regressor_depth: blocks of the regressor, as wide as the encoder.
        decoder_depth: blocks of each decoder, as wide as the encoder.

    Raises:
        ValueError: for a ratio that hides nothing or leaves nothing visible, or no target at all.
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
        likelihood: CodeLikelihood = "joint",
        regressor_depth: int = 2,
        decoder_depth: int = 1,
        **trunk: Any,
    ) -> None:
        super().__init__(codes, input=input, target="codes", **trunk)
        choices = {"mask": Masking, "likelihood": CodeLikelihood, "difference": Difference}
        check_choices(choices, mask=mask, likelihood=likelihood, difference=difference)
        if min(appearance, motion, align) < 0 or not appearance + motion:
            raise ValueError(
                "objective.appearance, motion and align must be at least 0, and not both of the first two 0"
            )
        if min(regressor_depth, decoder_depth) < 1:
            raise ValueError("objective.regressor_depth and decoder_depth must be at least 1")
        check_ratio(mask, self.grid, ratio)
        self.mask, self.ratio, self.difference = mask, ratio, difference
        self.weights = {"appearance": appearance, "motion": motion, "align": align}
        self.tubelets = Patching.of("pixels", codes, self.predicts.box) if motion else None
        self.needs_pixels = bool(motion) or input == "pixels"
        self.query_D = nn.Parameter(torch.randn(self.width) * 0.02)
        self.regressor = CrossDecoder(self.width, regressor_depth, self.heads, self.width, with_self=True)
        self.decoders, self.targets = nn.ModuleDict(), nn.ModuleDict()
        if appearance:
            self.decoders["appearance"] = Encoder(self.width, decoder_depth, self.heads)
            self.targets["appearance"] = CodeTarget(codes, self.width, math.prod(self.predicts.box), likelihood)
        if self.tubelets is not None:
            frames, rows, columns = self.tubelets.box
            if difference == "within" and frames < 2:
                raise ValueError("objective.difference within needs tubelets of two frames or more; take next")
            if difference == "next" and self.grid[0] < 2:
                raise ValueError("objective.difference next needs two tubelets along time; take within")
            seen = frames - 1 if difference == "within" else frames
            self.decoders["motion"] = Encoder(self.width, decoder_depth, self.heads)
            self.targets["motion"] = PixelTarget(self.width, (seen, rows, columns))
        for part in (self.embedding, self.encoder, self.regressor, self.decoders):
            part.apply(init_weights)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Predict what the tubes hide that `seed_B` draws."""
        visible_BM, hidden_BQ = masked(self.mask, self.grid, self.ratio, batch["seed_B"])
        x_BMD = self.encode(batch, visible_BM)
        query_BQD, rotation = self.positions(hidden_BQ)
        sight = AttentionContext(None, rotation, self.positions(visible_BM)[1])
        found_BQD = self.regressor(self.query_D + query_BQD, x_BMD, sight)
        losses: dict[str, Tensor] = {}
        said: dict[str, Tensor] = {}
        for name, decoder in self.decoders.items():
            h_BQD = cast(Encoder, decoder).last(found_BQD + query_BQD, rotation=rotation)
            target = cast(CodeTarget | PixelTarget, self.targets[name])
            losses[name] = target(h_BQD, take(self._wanted(name, batch), hidden_BQ))
            said |= target.numbers(losses[name].detach())
        if self.weights["align"]:
            with torch.no_grad():
                latent_BQD = self.encode(batch, hidden_BQ)
            losses["align"] = F.mse_loss(found_BQD.float(), latent_BQD.float())
        loss = torch.stack([self.weights[name] * value for name, value in losses.items()]).sum()
        return {"loss": loss, **{name: value.detach() for name, value in losses.items()}, **said}

    def _wanted(self, name: str, batch: dict[str, Tensor]) -> Tensor:
        """Codes, or RGB differences, of all tokens."""
        if self.tubelets is None or name == "appearance":
            return self.predicts.tokens(batch)
        return rgb_difference(self.tubelets.tokens(batch), self.grid[0], self.tubelets.box[0], self.difference)

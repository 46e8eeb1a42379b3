"""What is predicted, and at what cost: a head and its loss.

Legend: B batch, L predicted tokens, P codes of one token, V codes of the vocabulary, D width.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ar_model.inputs import CodeSpec, CodeTable, digits_of

CodeLikelihood = Literal["joint", "digits"]


class CodeTarget(nn.Module):
    """Negative log-likelihood of codes given a decoder's output.

    `joint`: one softmax over the vocabulary, whose output vectors are composed by geometry (a digit's vector is shared
    by all codes that have it) plus one free row per code. `digits`: one softmax per digit, as if digits were
    independent given the context; an honest likelihood too, and the only affordable one for large vocabularies.

    Raises:
        ValueError: for `digits` of codes that have none.
    """

    def __init__(
        self, codes: CodeSpec, width: int, codes_per_token: int = 1, likelihood: CodeLikelihood = "joint"
    ) -> None:
        super().__init__()
        if likelihood not in get_args(CodeLikelihood):
            raise ValueError(f"likelihood {likelihood!r} is neither joint nor digits")
        if likelihood == "digits" and codes.levels is None:
            raise ValueError("likelihood digits needs codes made of digits (FSQ or LFQ); these are rows of a codebook")
        self.codes_per_token = codes_per_token
        self.levels = codes.levels if likelihood == "digits" else None
        self.split = nn.Linear(width, codes_per_token * width)
        nn.init.xavier_uniform_(self.split.weight)
        nn.init.zeros_(self.split.bias)
        if likelihood == "joint":
            self.table = CodeTable(codes, width, free_rows=True)
            self.bias = nn.Parameter(torch.zeros(codes.vocab_size))
        else:
            self.digits = nn.Linear(width, sum(codes.levels or ()))
            nn.init.normal_(self.digits.weight, std=0.02)  # the first guess is about the uniform distribution
            nn.init.zeros_(self.digits.bias)
        self.scale = width**-0.5

    def forward(self, h_BLD: Tensor, codes_BLP: Tensor) -> Tensor:
        """Nats of every code, (B, L, P), in fp32."""
        h_BLPD = self.split(h_BLD).unflatten(-1, (self.codes_per_token, -1))
        if self.levels is None:
            logits_BLPV = F.linear(h_BLPD, self.table.matrix() * self.scale, self.bias)
            return _nats(logits_BLPV, codes_BLP)
        digits_BLPn = digits_of(codes_BLP, self.levels)
        heads = self.digits(h_BLPD).split(self.levels, dim=-1)
        return torch.stack([_nats(logits, digits_BLPn[..., i]) for i, logits in enumerate(heads)]).sum(0)


def _nats(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2).float(), target.flatten(), reduction="none").view(target.shape)

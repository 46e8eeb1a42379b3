"""Description of the codes in a cache for the objectives."""

import torch

from ar_model.inputs import CodeSpec
from data.cache import TokenCache


def code_spec(cache: TokenCache) -> CodeSpec:
    """Return shape, vocabulary, codebook and clip size of the codes in a cache."""
    codebook_VC, clip, layout = cache.codebook(), cache.clip, cache.layout
    return CodeSpec(
        shape=layout.grid,
        vocab_size=layout.vocab_size,
        codes_per_place=layout.codes_per_place,
        levels=layout.levels,
        codebook_VC=None if codebook_VC is None else torch.from_numpy(codebook_VC),
        clip=None if cache.spec["keep_pixels"] == "none" else (clip.frames, clip.size, clip.size),
    )

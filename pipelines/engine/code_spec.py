"""Description of the codes in a cache for the objectives."""

import torch

from ar_model.inputs import CodeSpec
from data.cache import TokenCache


def code_spec(cache: TokenCache) -> CodeSpec:
    """Return shape, vocabulary, codebook and clip size of the codes in a cache."""
    codebook_VC, clip = cache.codebook(), cache.clip
    return CodeSpec(
        shape=cache.codes_shape,
        vocab_size=cache.vocab_size,
        levels=cache.levels,
        codebook_VC=None if codebook_VC is None else torch.from_numpy(codebook_VC),
        clip=None if cache.spec["keep_pixels"] == "none" else (clip.frames, clip.size, clip.size),
    )

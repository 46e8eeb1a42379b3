"""What a cache says of its codes, as stage two takes it."""

import torch

from ar_model.inputs import CodeSpec
from data.cache import TokenCache


def code_spec(cache: TokenCache) -> CodeSpec:
    """What stage two has to know of the codes."""
    codebook_VC, clip = cache.codebook(), cache.clip
    return CodeSpec(
        shape=cache.codes_shape,
        vocab_size=cache.vocab_size,
        levels=cache.levels,
        codebook_VC=None if codebook_VC is None else torch.from_numpy(codebook_VC),
        clip=None if cache.spec["keep_pixels"] == "none" else (clip.frames, clip.size, clip.size),
    )

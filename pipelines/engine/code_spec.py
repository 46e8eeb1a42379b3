"""Description of the codes in a cache for the objectives, and settings that depend on it."""

import torch
import yaml

from ar_model.inputs import CodeSpec
from ar_model.targets import likelihood_of
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


def with_likelihood(settings: str, cache: TokenCache) -> str:
    """Return settings of pretrain_ar, as YAML, with the likelihood that `auto` means for the codes of a cache.

    Runs record it, so that those from before there was `auto` can be resumed.
    """
    content = yaml.safe_load(settings)
    own = content["objective"].get("init_args", {})
    if own.get("likelihood") != "auto":
        return settings
    own["likelihood"] = likelihood_of(code_spec(cache), "auto")
    return yaml.safe_dump(content, sort_keys=False)

"""What decides the content of a cache, and its key: a sha256 over content only.

Tokenizer, clips, numeric policy, decoder, kept pixels and the list of videos are in it; folders, processes, shard size
and dates are not.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from data.clips import ClipSpec
from data.decoding import VERSION
from data.files import compact, sha256_of
from data.pixels import JPEG_QUALITY, KeepPixels
from data.sources import Video

FORMAT = "arvideo-cache-2"
CUTTING = f"clips-1 digits-1 jpeg-{JPEG_QUALITY}"
"""Version of the code that makes pixels of a specification; a change of it makes other caches."""


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """Everything that decides what is in a cache."""

    tokenizer: str
    """Fingerprint of the tokenizer."""
    codes_shape: tuple[int, int, int]
    vocab_size: int
    levels: tuple[int, ...] | None
    """Values of each digit of a code, lowest first (FSQ, LFQ); None if codes are rows of a codebook."""
    clip: ClipSpec
    precision: Literal["fp32", "bf16"]
    encode_batch: int
    """Clips that go through the tokenizer together, always the same number."""
    keep_pixels: KeepPixels
    videos: tuple[Video, ...]
    decoder: str = VERSION
    cutting: str = CUTTING

    def preimage(self) -> dict[str, Any]:
        """What the key is the hash of, in JSON form."""
        settings = {k: v for k, v in vars(self).items() if k not in ("clip", "videos")}
        plain = json.loads(compact({"format": FORMAT, **settings, "clip": asdict(self.clip)}))
        return {**plain, "videos": [[v.path, v.size, v.label, v.group, v.split] for v in self.videos]}

    @property
    def dtype(self) -> np.dtype:
        return code_dtype(self.vocab_size)


def code_dtype(vocab_size: int) -> np.dtype:
    """The smaller of two types that holds every code."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def key_of(preimage: dict[str, Any]) -> str:
    return sha256_of(preimage)

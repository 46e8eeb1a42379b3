"""Specification of a cache's content, and its key: a sha256 of that specification.

The key covers tokenizer, clips, precision, batch size, decoder, kept pixels and the list of videos. Folders, number of
processes, shard size and dates do not change it.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

from data.cache.layout import CodeLayout
from data.clip_spec import ClipSpec
from data.decoding import VERSION
from data.files import compact, sha256_of
from data.pixels import JPEG_QUALITY, KeepPixels
from data.sources import Video

FORMAT = "arvideo-cache-2"
"""Version of the file format."""


def cutting(builtin: str) -> str:
    """Return the versions of the code that cuts clips, renders the built-in videos and encodes JPEGs, for `CacheSpec`.

    `builtin` is the version of the source, empty for video files: built-in videos of a new version leave the keys of caches
    of files unchanged. A new version gives new keys.
    """
    return f"clips-1 {builtin or 'digits-1'} jpeg-{JPEG_QUALITY}"


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """Everything that determines the content of a cache."""

    tokenizer: str
    """Fingerprint of the tokenizer."""
    codes: CodeLayout
    clip: ClipSpec
    precision: Literal["fp32", "bf16"]
    encode_batch: int
    """Number of clips in every batch of the tokenizer."""
    keep_pixels: KeepPixels
    videos: tuple[Video, ...]
    decoder: str = VERSION
    cutting: str = cutting("")
    """Versions of the code that makes the clips, by default of clips of video files."""

    def preimage(self) -> dict[str, Any]:
        """Return the specification as JSON content. The key is its hash."""
        settings = {k: v for k, v in vars(self).items() if k not in ("clip", "codes", "videos")}
        parts = {**self.codes.to_json(), "clip": self.clip.to_json()}
        content = json.loads(compact({"format": FORMAT, **settings, **parts}))
        return {**content, "videos": [[v.path, v.size, v.label, v.group, v.split] for v in self.videos]}


def key_of(preimage: dict[str, Any]) -> str:
    """Return the key of a specification: sha256 of `CacheSpec.preimage`, in hex."""
    return sha256_of(preimage)

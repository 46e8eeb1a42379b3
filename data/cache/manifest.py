"""Content of the JSON files of a cache (docs/cache.md describes the fields), and refusal of other content."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypedDict

from data.pixels import KeepPixels
from data.shards import DamagedCache

MALFORMED = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, IndexError)
"""Exceptions that malformed JSON content causes when it is used."""


class Skipped(TypedDict):
    """Video without codes."""

    path: str
    reason: str


class ShardEntry(TypedDict):
    """Entry of a shard in the manifest."""

    file: str
    samples: int
    bytes: int
    sha256: str
    record: str


class Compared(TypedDict):
    """Counts of codes that were compared with fp32."""

    codes: int
    differ: int
    rate: float | None


class LaterClip(TypedDict, total=False):
    """Settings of clips that are left out if they are not set."""

    fps: float
    seconds: float
    span: Literal["video"]
    scales: list[float]


class Clip(LaterClip):
    """`ClipSpec.to_json`."""

    frames: int
    size: int
    stride: int
    views: int | Literal["dense"]
    flip: bool


class SeveralCodes(TypedDict, total=False):
    """Settings of caches with several codes per place."""

    codes_per_place: int


class Specification(SeveralCodes):
    """`CacheSpec.preimage` as JSON. `TokenCache` checks the rows of `videos`, of which there may be millions."""

    tokenizer: str
    codes_shape: tuple[int, int, int]
    vocab_size: int
    levels: list[int] | list[list[int]] | None
    clip: Clip
    precision: Literal["fp32", "bf16"]
    encode_batch: int
    keep_pixels: KeepPixels
    decoder: str
    cutting: str
    videos: list[Any]


class Manifest(TypedDict):
    """manifest.json."""

    format: str
    key: str
    spec: Specification
    shard_size: int
    shards: list[ShardEntry]
    samples: int
    padded: int
    skipped: list[Skipped]
    clips: int
    codes: int
    codes_used: int
    unigram_bits: float
    codebook: str | None
    bf16: Compared | None


class Plan(TypedDict, total=False):
    """plan.json. It has the specification until the manifest exists."""

    shard_size: int
    spec: Specification


class MadeWith(TypedDict, total=False):
    """made_with.json."""

    videos: str
    tokenizer: str
    root: str


class ScaledFacts(TypedDict, total=False):
    """Facts of views that are scaled, or spread over the video."""

    short_side: list[int]
    shift: list[int]


class Facts(ScaledFacts):
    """json member of a video in a shard."""

    path: str
    size: int
    label: str | None
    group: str | None
    split: str | None
    frames: int
    rate: float | None
    stride: int
    crop: int
    start: list[int]
    real: list[int]
    top: list[int]
    left: list[int]
    flip: list[int]


@contextmanager
def refuse_malformed(problem: str) -> Iterator[None]:
    """Turn an exception in `MALFORMED` into DamagedCache with the message `problem (exception type: message)`."""
    try:
        yield
    except DamagedCache:
        raise
    except MALFORMED as error:
        raise DamagedCache(f"{problem} ({type(error).__name__}: {error})") from None

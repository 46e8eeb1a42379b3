"""The tokenizer that made a cache, as the cache has recorded it."""

import re
from collections.abc import Sequence
from pathlib import Path

from data.cache import TokenCache
from data.recorded import locate, to_record
from tokenizer import VideoTokenizer, load_tokenizer


def tokenizer_to_record(source: str) -> str:
    """Return a source of `load_tokenizer` with an absolute folder; a hub id stays as it is."""
    kind, folder, option = _parts(source)
    return f"{kind}{to_record(folder)}{option}"


def recorded_tokenizer(cache: TokenCache) -> str:
    """Return the source of the tokenizer that made a cache, with its folder where it is now."""
    return locate_tokenizer(cache.made_with["tokenizer"], *(() if cache.remote else (cache.address,)))


def locate_tokenizer(recorded: str, *near: str | Path) -> str:
    """Return a recorded source of `load_tokenizer` with its folder where it is now; see `locate`."""
    kind, folder, option = _parts(recorded)
    return f"{kind}{locate(folder, *near)}{option}"


def _parts(source: str) -> Sequence[str]:
    """Split a source of `load_tokenizer` into its kind, folder and option."""
    match = re.fullmatch(r"(taming:|torchscript:|)(.*?)(\?quantizer=.*|)", source, re.DOTALL)
    assert match is not None
    return match.groups()


def load_recorded_tokenizer(cache: TokenCache, *, trust: bool) -> VideoTokenizer:
    """Load the tokenizer that made a cache. A record may be a folder that has disappeared, so nothing is downloaded.

    Raises:
        ValueError: if it is not found, cannot be read, or is another tokenizer.
    """
    source = recorded_tokenizer(cache)
    try:
        tokenizer = load_tokenizer(source, trust=trust, download=False)
    except ValueError as error:
        hint = "tokenize --tokenizer records where it is now"
        raise ValueError(f"the tokenizer that made {cache.address} does not load ({hint}): {error}") from None
    check_tokenizer(cache, source, tokenizer)
    return tokenizer


def check_tokenizer(cache: TokenCache, source: str, tokenizer: VideoTokenizer) -> None:
    """Raise a ValueError if another tokenizer made the cache, or makes codes of another shape of the cache's clips."""
    problem = f"{source}: cannot decode {cache.address}, which another tokenizer made"
    if tokenizer.fingerprint() != cache.spec["tokenizer"]:
        raise ValueError(problem)
    clip = cache.clip
    try:
        shape = tokenizer.codes_shape(clip.frames, clip.size, clip.size)
    except ValueError as error:
        raise ValueError(f"{problem} ({error})") from None
    if shape != cache.layout.grid:
        sizes = f"{clip.frames} frames of {clip.size}x{clip.size} have codes {shape}, in the cache {cache.layout.grid}"
        raise ValueError(f"{problem} ({sizes})")

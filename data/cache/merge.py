"""Joining caches of equal specification: the result is the cache that tokenizing all their videos at once would have made.

Byte for byte in fp32; of bf16 the sample that was compared with fp32 is that of the parts together.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.cache.reader import JOINED, TokenCache
from data.cache.spec import CacheSpec
from data.cache.writer import CacheWriter
from data.clips import ClipSpec
from data.sources import Video


def merge(
    parts: Sequence[TokenCache], caches: Path, name: str, done: Callable[[int], Any] = lambda videos: None
) -> Path:
    """Write the videos of some caches, sorted by path, into one, and return its folder. A killed merge is continued.

    Args:
        done: called with a number of videos whenever they have been written.

    Raises:
        ValueError: if the caches differ in more than their videos, or hold different videos of the same path.
        DamagedCache: if a sample is damaged.
    """
    spec = _joined_spec(parts)
    writer = CacheWriter(caches, name, spec, parts[0].manifest["shard_size"])
    if writer.finished:
        return writer.folder
    writer.begin()
    _check_other_codes(parts)
    places = {video.path: (part, i) for part in reversed(parts) for i, video in enumerate(part.videos)}
    reasons = {entry["path"]: entry["reason"] for part in reversed(parts) for entry in part.manifest["skipped"]}

    def write(number: int) -> None:
        with writer.open_shard(number) as shard:
            for video in writer.videos(number):
                if video.path in places:
                    part, index = places[video.path]
                    members, frames, padded = part.members(index)
                    shard.add_members(video, part.codes(index), members, frames, padded)
                else:
                    shard.skip(video, reasons[video.path])
            for part in parts if number == 0 else ():
                if part.manifest["bf16"]:
                    shard.compare(part.manifest["bf16"]["codes"], part.manifest["bf16"]["differ"])
            shard.commit()

    try:
        while writer.missing():
            for number in writer.claims():
                write(number)
                done(len(writer.videos(number)))
            if writer.missing():  # others are at the last ones
                time.sleep(0.5)
    finally:
        writer.release_all()
    writer.finish(parts[0].codebook())
    sources = list(dict.fromkeys(source for part in parts for source in part.made_with["videos"].split(JOINED)))
    writer.note({"tokenizer": parts[0].made_with["tokenizer"], "videos": JOINED.join(sources)})
    return writer.folder


def _check_other_codes(parts: Sequence[TokenCache]) -> None:
    """A list tells videos apart by path and size only; the codes tell more."""
    seen: dict[str, tuple[TokenCache, int]] = {}
    for part in parts:
        for index, video in enumerate(part.videos):
            first, place = seen.setdefault(video.path, (part, index))
            if first is not part and not np.array_equal(first.codes(place), part.codes(index)):
                raise ValueError(f"{part.address} and {first.address}: {video.path} is another video in each")


def _joined_spec(parts: Sequence[TokenCache]) -> CacheSpec:
    if len(parts) < 2:
        raise ValueError("merge needs two caches or more")
    first = parts[0]
    for part in parts[1:]:
        differ = [k for k in first.spec if k != "videos" and first.spec[k] != part.spec.get(k)]
        if differ or first.manifest["codebook"] != part.manifest["codebook"]:
            what = f"{differ[0]} of {first.spec[differ[0]]} and {part.spec.get(differ[0])}" if differ else "codebook"
            raise ValueError(f"{first.address} and {part.address} cannot be joined: they differ in {what}")
    videos: dict[str, Video] = {}
    for part in parts:
        for row in part.spec["videos"]:
            video = Video(*row)
            if videos.setdefault(video.path, video) != video:
                raise ValueError(
                    f"{part.address}: {video.path} is another video in another of the caches; "
                    "tokenize a list file of both instead"
                )
    same = ("tokenizer", "vocab_size", "precision", "encode_batch", "keep_pixels", "decoder", "cutting")
    return CacheSpec(
        **{k: first.spec[k] for k in same},
        codes_shape=first.codes_shape,
        levels=first.levels,
        clip=ClipSpec(**first.spec["clip"]),
        videos=tuple(sorted(videos.values(), key=lambda video: video.path)),
    )

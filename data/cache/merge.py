"""Merge caches of equal specification into the cache that tokenizing all their videos together would give.

In fp32, the two are equal byte for byte. In bf16, merging adds the counts of codes that were compared with fp32.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.cache.reader import JOINED, TokenCache
from data.cache.spec import CacheSpec
from data.cache.writer import CacheWriter
from data.clip_spec import ClipSpec
from data.sources import Video


def merge(
    parts: Sequence[TokenCache], caches: Path, name: str, done: Callable[[int], Any] = lambda videos: None
) -> Path:
    """Write the videos of several caches into one, sorted by path, and return its folder. Resumes an interrupted merge.

    `done` is called after each shard with the number of its videos. Raises ValueError if the caches differ in more than their
    videos, or contain different videos with the same path, and DamagedCache if a sample is damaged.
    """
    spec = _joined_spec(parts)
    writer = CacheWriter(caches, name, spec, parts[0].manifest["shard_size"])
    if writer.finished:
        return writer.folder
    writer.begin()
    _check_other_codes(parts)
    origins = {video.path: (part, i) for part in reversed(parts) for i, video in enumerate(part.videos)}
    reasons = {entry["path"]: entry["reason"] for part in reversed(parts) for entry in part.manifest["skipped"]}

    def write(number: int) -> None:
        with writer.open_shard(number) as shard:
            for video in writer.videos(number):
                if video.path in origins:
                    part, index = origins[video.path]
                    members, frames, padded = part.members(index)
                    shard.add_members(video, part.codes(index), members, frames, padded)
                else:
                    shard.skip(video, reasons[video.path])
            # The manifest sums the counts over all shards, so the first shard records the counts of all parts.
            if number == 0:
                for compared in [part.manifest["bf16"] for part in parts if part.manifest["bf16"]]:
                    shard.compare(compared["codes"], compared["differ"])
            shard.commit()

    try:
        while writer.missing():
            for number in writer.claims():
                write(number)
                done(len(writer.videos(number)))
            # Wait while other processes write the last shards.
            if writer.missing():
                time.sleep(0.5)
    finally:
        writer.release_all()
    writer.finish(parts[0].codebook())
    sources = list(dict.fromkeys(source for part in parts for source in part.made_with["videos"].split(JOINED)))
    writer.note({"tokenizer": parts[0].made_with["tokenizer"], "videos": JOINED.join(sources)})
    return writer.folder


def _check_other_codes(parts: Sequence[TokenCache]) -> None:
    """Compare the codes of videos that are in several parts, because path and size can be equal for different videos."""
    first_of: dict[str, tuple[TokenCache, int]] = {}
    for part in parts:
        for index, video in enumerate(part.videos):
            first, first_index = first_of.setdefault(video.path, (part, index))
            if first is not part and not np.array_equal(first.codes(first_index), part.codes(index)):
                raise ValueError(f"{part.address} and {first.address}: codes of {video.path} differ")


def _joined_spec(parts: Sequence[TokenCache]) -> CacheSpec:
    if len(parts) < 2:
        raise ValueError(f"merge needs at least 2 caches, got {len(parts)}")
    first = parts[0]
    for part in parts[1:]:
        for field in first.spec:
            if field != "videos" and first.spec[field] != part.spec.get(field):
                values = f"{field} is {first.spec[field]} and {part.spec.get(field)}"
                raise ValueError(f"cannot merge {first.address} and {part.address}: {values}")
        if first.manifest["codebook"] != part.manifest["codebook"]:
            raise ValueError(f"cannot merge {first.address} and {part.address}: their codebooks differ")
    videos: dict[str, Video] = {}
    for part in parts:
        for row in part.spec["videos"]:
            video = Video(*row)
            if videos.setdefault(video.path, video) != video:
                hint = "list the videos of both caches in one file and tokenize that file"
                raise ValueError(f"{part.address}: {video.path} differs in size, label, group or split; {hint}")
    shared = ("tokenizer", "precision", "encode_batch", "keep_pixels", "decoder", "cutting")
    return CacheSpec(
        **{k: first.spec[k] for k in shared},
        codes=first.layout,
        clip=ClipSpec(**first.spec["clip"]),
        videos=tuple(sorted(videos.values(), key=lambda video: video.path)),
    )

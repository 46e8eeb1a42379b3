"""Videos that a classifier was trained on, recorded without their names, so that an evaluation can tell that it tests on them."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from data.files import write_bytes
from data.sources import Video

FILE = "training_videos.txt"
_DIGITS = 16


def record_training_videos(folder: Path, videos: Iterable[Video]) -> None:
    """Write the hashes of the videos that a classifier was trained on, or chosen on, into the folder of the model."""
    write_bytes(folder / FILE, "".join(f"{line}\n" for line in sorted({_hash(video) for video in videos})).encode())


def seen_in_training(folder: Path, videos: Iterable[Video]) -> int | None:
    """Return how many of some videos were recorded; None if nothing was recorded."""
    file = folder / FILE
    if not file.exists():
        return None
    recorded = set(file.read_text(errors="replace").split())
    return sum(_hash(video) in recorded for video in videos)


def _hash(video: Video) -> str:
    """Return a hash of the name and size of a file, whatever folder its path begins in."""
    name = video.path.rpartition("/")[2]
    content = f"{video.size} {name}".encode(errors="surrogateescape")
    # Built-in videos have no sizes, and numbers as names.
    content += b"" if video.size else video.path.encode(errors="surrogateescape")
    return hashlib.sha256(content).hexdigest()[:_DIGITS]

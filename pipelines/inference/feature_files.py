"""Files of extracted features: shards of arrays, and an index with one row for each window of a video.

FOLDER/
  shards/000000.npz    `features`, float32 (windows, ...), and `path`, `start` and `end` of each window
  shards/000000.json   rows of the index, and the damaged videos of the shard; a shard without it is not finished
  index.csv            shard, row, path, label, group, split, start, end; written when all shards are finished
"""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np

from data.files import write_bytes, write_json
from data.schema import conform
from data.sources import Video
from pipelines.engine.run_files import read_json

_INDEX = ("shard", "row", "path", "label", "group", "split", "start", "end")


@dataclass(frozen=True)
class Row:
    """A window of a video. `start`, `end`: seconds, None if the video has neither time stamps nor a frame rate."""

    path: str
    label: str | None
    group: str | None
    split: str | None
    start: float | None
    end: float | None

    @classmethod
    def of(cls, video: Video, start: float | None, end: float | None) -> "Row":
        return cls(video.path, video.label, video.group, video.split, start, end)


class _Row(TypedDict):
    path: str
    label: str | None
    group: str | None
    split: str | None
    start: float | None
    end: float | None


class _Skipped(TypedDict):
    path: str
    reason: str


class _Record(TypedDict):
    """shards/000000.json."""

    rows: list[_Row]
    skipped: list[_Skipped]


class FeatureFolder:
    """Folder of extracted features."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.shards = folder, folder / "shards"

    def has(self, shard: int) -> bool:
        """Return whether a shard is finished."""
        return self._record(shard).exists()

    def write(self, shard: int, features: Sequence[np.ndarray], rows: Sequence[Row], skipped: dict[str, str]) -> None:
        """Write a shard. `skipped`: reason of each damaged video, by path."""
        self.shards.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        np.savez(
            content,
            features=np.stack(features).astype(np.float32) if features else np.zeros((0, 0), np.float32),
            path=np.array([row.path for row in rows], dtype=str),
            start=np.array([row.start for row in rows], np.float64),
            end=np.array([row.end for row in rows], np.float64),
        )
        write_bytes(self.shards / f"{shard:06d}.npz", content.getvalue())
        damaged = [{"path": path, "reason": reason} for path, reason in skipped.items()]
        write_json(self._record(shard), {"rows": [asdict(row) for row in rows], "skipped": damaged})

    def finish(self, shards: int) -> list[tuple[str, str]]:
        """Write the index of all shards, and return path and reason of each damaged video."""
        text, skipped = io.StringIO(), []
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_INDEX)
        for shard in range(shards):
            record = self._read(shard)
            skipped += [(entry["path"], entry["reason"]) for entry in record["skipped"]]
            for number, row in enumerate(record["rows"]):
                values = ["" if row[name] is None else row[name] for name in _INDEX[2:]]  # type: ignore[literal-required]
                writer.writerow([f"{shard:06d}.npz", number, *values])
        write_bytes(self.folder / "index.csv", text.getvalue().encode(errors="surrogateescape"))
        return skipped

    def read(self) -> Iterator[tuple[np.ndarray, list[Row]]]:
        """Yield the features and the rows of each shard with windows.

        Raises:
            ValueError: if a file is missing or malformed.
        """
        for file in sorted(self.shards.glob("*.json")):
            shard = int(file.stem) if file.stem.isdigit() else -1
            rows = [Row(**{name: row[name] for name in _INDEX[2:]}) for row in self._read(shard)["rows"]]  # type: ignore[literal-required]
            if not rows:
                continue
            try:
                with np.load(self.shards / f"{shard:06d}.npz", allow_pickle=False) as content:
                    features_N = content["features"]
            except (OSError, KeyError, ValueError) as error:
                raise ValueError(f"{file.with_suffix('.npz')}: cannot be read: {error}") from None
            if len(features_N) != len(rows) or features_N.dtype != np.float32:
                found = f"{len(features_N)} of {features_N.dtype}"
                raise ValueError(f"{file.with_suffix('.npz')}: must have {len(rows)} features of float32, got {found}")
            yield features_N, rows

    def _record(self, shard: int) -> Path:
        return self.shards / f"{shard:06d}.json"

    def _read(self, shard: int) -> _Record:
        return conform(read_json(self._record(shard)), _Record, str(self._record(shard)))

"""Files of extracted features: shards of arrays, and an index with one row for each window of a video.

FOLDER/
  shards/000000.npz    `features`, float32 (windows, ...), and `path`, `start` and `end` of each window
  shards/000000.json   rows of the index, and the damaged videos of the shard; a shard without it is not finished
  index.csv            shard, row, path, label, group, split, view, start, end; written when all shards are finished
"""

import csv
import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import product
from pathlib import Path
from types import NoneType
from typing import Any, TypedDict
from zipfile import BadZipFile

import numpy as np

from data.files import write_bytes, write_json
from data.schema import conform
from data.sources import Video
from pipelines.engine.run_files import read_json

_INDEX = ("shard", "row", "path", "label", "group", "split", "view", "start", "end")
_FIELDS = _INDEX[2:]
_DAMAGED = (OSError, KeyError, ValueError, EOFError, NotImplementedError, BadZipFile, zlib.error)
"""Errors of reading a damaged .npz file."""


@dataclass(frozen=True)
class Row:
    """A window of a video.

    `view`: its number among the clips of the video that the windows were cut from, or in the cache. `start`, `end`: seconds, None
    if the video has neither time stamps nor a frame rate.
    """

    path: str
    label: str | None
    group: str | None
    split: str | None
    view: int
    start: float | None
    end: float | None

    @classmethod
    def of(cls, video: Video, view: int, start: float | None, end: float | None) -> "Row":
        return cls(video.path, video.label, video.group, video.split, view, start, end)


class _Row(TypedDict):
    path: str
    label: str | None
    group: str | None
    split: str | None
    view: int
    start: float | None
    end: float | None


_KINDS = set(product((str,), *[(str, NoneType)] * 3, (int,), *[(float, int, NoneType)] * 2))
"""Types of the fields of `_Row`. Millions of rows are checked faster by them than by `conform`."""


class _Skipped(TypedDict):
    path: str
    reason: str


class _Record(TypedDict):
    """shards/000000.json."""

    rows: list[Any]
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
        write_bytes(self.file(shard), content.getvalue())
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
            for number, row in enumerate(self._rows(shard, record)):
                values = ["" if value is None else value for value in astuple(row)]
                writer.writerow([f"{shard:06d}.npz", number, *values])
        write_bytes(self.folder / "index.csv", text.getvalue().encode(errors="surrogateescape"))
        return skipped

    def read(self) -> Iterator[tuple[np.ndarray, list[Row]]]:
        """Yield the features and the rows of each shard with windows. Raises the errors of `rows` and `features`."""
        for shard in self.finished():
            if rows := self.rows(shard):
                yield self.features(shard, len(rows)), rows

    def finished(self) -> list[int]:
        """Return the numbers of the finished shards."""
        return sorted(int(file.stem) for file in self.shards.glob("*.json") if file.stem.isdecimal())

    def rows(self, shard: int) -> list[Row]:
        """Read the rows of a shard.

        Raises:
            ValueError: if the file is malformed.
        """
        return self._rows(shard, self._read(shard))

    def features(self, shard: int, count: int) -> np.ndarray:
        """Read the features of the `count` windows of a shard, float32 (windows, ...).

        Raises:
            ValueError: if the file is missing, damaged, or has another number of windows.
        """
        file = self.file(shard)
        try:
            with np.load(file, allow_pickle=False) as content:
                features_N = content["features"]
        except _DAMAGED as error:
            raise ValueError(f"{file}: cannot be read: {error}") from None
        if features_N.shape[:1] != (count,) or features_N.dtype != np.float32:
            found = f"{features_N.dtype} of shape {features_N.shape}"
            raise ValueError(f"{file}: must have {count} features of float32, got {found}")
        return features_N

    def file(self, shard: int) -> Path:
        """Return the path of the arrays of a shard."""
        return self.shards / f"{shard:06d}.npz"

    def _record(self, shard: int) -> Path:
        return self.shards / f"{shard:06d}.json"

    def _read(self, shard: int) -> _Record:
        return conform(read_json(self._record(shard)), _Record, str(self._record(shard)))

    def _rows(self, shard: int, record: _Record) -> list[Row]:
        rows: list[Row] = []
        for row in record["rows"]:
            values: list[Any] = [row.get(name) for name in _FIELDS] if type(row) is dict else []
            if tuple(map(type, values)) not in _KINDS:
                conform(row, _Row, f"{self._record(shard)}: rows[{len(rows)}]")
            rows.append(Row(*values))
        return rows

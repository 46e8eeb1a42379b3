"""Features of a folder as unit vectors, whose products are cosine similarities.

Legend: N windows, F features, V videos.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from sklearn.preprocessing import StandardScaler, normalize

from pipelines.inference.feature_files import FeatureFolder

SMALL = 100_000
"""Most windows whose vectors are kept in memory and compared one by one."""
_BLOCK = 8192
"""Windows of one block of vectors, or a few more."""


@dataclass(frozen=True, eq=False)
class Scaling:
    """Mean and standard deviation of each feature, (F,) float32. A constant feature has the deviation 1."""

    mean_F: np.ndarray
    scale_F: np.ndarray

    def unit(self, features_NF: np.ndarray) -> np.ndarray:
        """Standardise features and divide them by their length, float32 (N, F)."""
        return normalize((features_NF - self.mean_F) / self.scale_F, copy=False)


class FeatureVectors:
    """Standardised features of all windows of a folder, as unit vectors.

    `rows`: the windows; `videos`: paths of the videos, in the order of their first windows; `video_N`: number of the video of
    each window. Features are read when they are needed; those of up to `SMALL` windows stay in memory.
    """

    def __init__(self, folder: FeatureFolder) -> None:
        """Read the rows. Raises a ValueError if a file is malformed, or there are no windows."""
        self.folder = folder
        shards = [(shard, rows) for shard in folder.finished() if (rows := folder.rows(shard))]
        self._shards = [(shard, len(rows)) for shard, rows in shards]
        self.rows = [row for _, rows in shards for row in rows]
        if not self.rows:
            raise ValueError(f"{folder.folder}: holds no features")
        numbers: dict[str, int] = {}
        self.video_N = np.array([numbers.setdefault(row.path, len(numbers)) for row in self.rows])
        self.videos = list(numbers)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def scaling(self) -> Scaling:
        """Scaling of the features of the folder. The first use reads all features, unless it was set."""
        scaler = StandardScaler()
        for features_NF in self._features():
            scaler.partial_fit(features_NF)
        return Scaling(scaler.mean_.astype(np.float32), scaler.scale_.astype(np.float32))

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the vectors of consecutive windows, float32 (windows, F), with the number of the first window."""
        if len(self) <= SMALL:
            for first in range(0, len(self), _BLOCK):
                yield first, self._matrix[first : first + _BLOCK]
            return
        first, waiting = 0, 0
        parts: list[np.ndarray] = []
        for features_NF in self._features():
            parts.append(features_NF)
            waiting += len(features_NF)
            if waiting >= _BLOCK or first + waiting == len(self):
                yield first, self.scaling.unit(np.concatenate(parts))
                first, waiting = first + waiting, 0
                parts.clear()

    def take(self, rows: Sequence[int]) -> np.ndarray:
        """Return the vectors of some windows, in ascending order, float32 (windows, F)."""
        wanted = np.asarray(rows)
        parts = [
            vectors_NF[wanted[(first <= wanted) & (wanted < first + len(vectors_NF))] - first]
            for first, vectors_NF in self.blocks()
        ]
        return np.concatenate(parts)

    def features(self, row: int) -> np.ndarray:
        """Return the features of a window before standardisation, (1, F), from the file of its shard."""
        first = 0
        for shard, count in self._shards:
            if row < first + count:
                return self._shard(shard, count, first)[row - first, None]
            first += count
        raise IndexError(f"{self.folder.folder}: has {len(self)} windows, got {row}")

    @cached_property
    def _matrix(self) -> np.ndarray:
        return np.concatenate([self.scaling.unit(features_NF) for features_NF in self._features()])

    def _features(self) -> Iterator[np.ndarray]:
        """Yield the features of each shard, (windows, F).

        Raises:
            ValueError: if a file is damaged, or holds values that are not finite or features of another number.
        """
        first, width = 0, None
        for shard, count in self._shards:
            features_NF = self._shard(shard, count, first)
            width = width or features_NF.shape[1]
            if features_NF.shape[1] != width:
                found = f"{features_NF.shape[1]} features of a window, expected {width}"
                raise ValueError(f"{self.folder.file(shard)}: has {found} as in the files before it")
            yield features_NF
            first += count

    def _shard(self, shard: int, count: int, first: int) -> np.ndarray:
        features_NF = self.folder.features(shard, count).reshape(count, -1)
        finite_N = np.isfinite(features_NF).all(1)
        if not finite_N.all():
            row = self.rows[first + int(finite_N.argmin())]
            problem = f"{count - finite_N.sum()} of {count} windows have features that are not finite"
            raise ValueError(f"{self.folder.file(shard)}: {problem}, the first of {row.path}")
        return features_NF

"""Nearest windows of a query: all vectors compared, or candidates of a faiss index.

FOLDER/search/index.faiss   index of a folder of features with more than `SMALL` windows
FOLDER/search/index.json    its size, recall and scaling; written last

The index stores the nearest of `_LISTS` centroids of a vector, and 4 bits for each pair of features of the difference from it
(product quantisation, Jégou et al. 2011). Every query scans all codes, which takes a few milliseconds for 100,000 windows (André
et al., arXiv 1812.09162). Its candidates are ordered by the vectors in half precision.

Legend: N windows, F features, Q queries, K neighbours.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from data.files import temporary_name, write_json
from data.schema import conform
from data.sources import spread
from pipelines.engine.run_files import read_json
from pipelines.inference.feature_vectors import SMALL, FeatureVectors, Scaling

CANDIDATES = 4096
"""Least number of candidates of the faiss index."""
RECALL_AT = 10
_TRAINING = 2**14
"""Vectors from which the index learns its codes: 16 centroids need at most 4,096."""
_TESTED = 100
"""Windows whose neighbours are searched in both ways, to state the recall."""
_LISTS = 256
"""Centroids. Without them, the vectors of a large cluster would have almost the same codes."""
_SINGLE = 384
"""Most features that have 4 bits each. If there are more, pairs of them do."""


class Index:
    """Search for the nearest windows. `recall`: share of the `RECALL_AT` nearest windows that it finds; None if it is exact."""

    recall: float | None = None

    def search(self, query_F: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows and similarities of at least `most` windows, if there are so many, nearest first."""
        raise NotImplementedError


class Exact(Index):
    """Comparison with all vectors."""

    def __init__(self, vectors: FeatureVectors) -> None:
        self._vectors = vectors

    def search(self, query_F: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Return all windows, nearest first, see `Index`."""
        similarity_N = np.concatenate([vectors_NF @ query_F for _, vectors_NF in self._vectors.blocks()])
        order_N = np.argsort(-similarity_N, kind="stable")
        return order_N, similarity_N[order_N]


class _Built(TypedDict):
    """index.json."""

    features: str
    bytes: int
    recall: float
    seconds: float
    mean: list[float]
    scale: list[float]


class Approximate(Index):
    """Search in a faiss index."""

    def __init__(self, index: Any, recall: float | None = None) -> None:
        self._index, self.recall = index, recall

    def search(self, query_F: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the best candidates, see `Index`."""
        pad = self._index.d - len(query_F)
        similarity_QK, row_QK = self._index.search(np.pad(query_F, (0, pad))[None], min(most, self._index.ntotal))
        found_K = row_QK[0] >= 0
        return row_QK[0][found_K], similarity_QK[0][found_K]


def nearest_videos(
    index: Index, vectors: FeatureVectors, query_F: np.ndarray, count: int, own: int | None
) -> list[tuple[int, float]]:
    """Return the row and the similarity of the nearest window of the nearest videos, nearest first.

    Args:
        query_F: unit vector, see `Scaling.unit`.
        count: number of videos.
        own: number of a video that is left out.
    """
    videos = len(vectors.videos) - (own is not None)
    most = max(CANDIDATES, 64 * count)
    while True:
        rows, similarities = index.search(query_F, most)
        best: dict[int, tuple[int, float]] = {}
        for row, similarity in zip(rows.tolist(), similarities.tolist(), strict=True):
            video = int(vectors.video_N[row])
            if video != own and video not in best:
                best[video] = (row, similarity)
                if len(best) == count:
                    break
        if len(best) == min(count, videos) or most >= len(vectors):
            return list(best.values())
        most *= 4


def open_index(vectors: FeatureVectors, features: str, say: Callable[[str], None]) -> Index:
    """Return the index of a folder: exact for up to `SMALL` windows, else that of faiss, which is built once and stored.

    Args:
        features: identity of the features; a stored index of others is built again.
        say: prints a message.

    Raises:
        ValueError: if features cannot be read, or the stored index is damaged.
    """
    if len(vectors) <= SMALL:
        return Exact(vectors)
    try:
        import faiss
    except ImportError:
        extra = "the extra search (pip install -e '.[search]') has an index"
        say(f"{len(vectors):,} windows are compared one by one; {extra}")
        return Exact(vectors)
    folder = vectors.folder.folder / "search"
    file, record = folder / "index.faiss", folder / "index.json"
    if record.exists():
        built: _Built = conform(read_json(record), _Built, str(record))
        if built["features"] == features:
            vectors.scaling = Scaling(np.array(built["mean"], np.float32), np.array(built["scale"], np.float32))
            return Approximate(_read(faiss, file, built["bytes"]), built["recall"])
    say(f"building an index of {len(vectors):,} windows in {folder}, once")
    began = time.perf_counter()
    index = _build(faiss, vectors)
    scaling = vectors.scaling
    try:
        _write(faiss, index._index, file)
        built = {
            "features": features,
            "bytes": file.stat().st_size,
            "recall": round(float(index.recall or 0), 4),
            "seconds": round(time.perf_counter() - began, 1),
            "mean": scaling.mean_F.tolist(),
            "scale": scaling.scale_F.tolist(),
        }
        write_json(record, built)
    # faiss reports a file that it cannot write as RuntimeError.
    except (OSError, RuntimeError) as error:
        say(f"{folder}: the index cannot be stored: {error}")
    return index


def _read(faiss: Any, file: Path, size: int) -> Any:
    try:
        if file.stat().st_size != size:
            raise ValueError(f"has {file.stat().st_size} bytes, expected {size}")
        # The exact vectors stay on the disk.
        return faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file}: {error}; delete the folder {file.parent} to build the index again") from None


def _write(faiss: Any, index: Any, file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    temporary = temporary_name(file)
    try:
        faiss.write_index(index, str(temporary))
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _build(faiss: Any, vectors: FeatureVectors) -> Approximate:
    """Build an index and measure its recall."""
    sample = spread(range(len(vectors)), _TRAINING)
    training_NF = vectors.take(sample)
    features = training_NF.shape[1]
    group = 1 if features <= _SINGLE else 2
    codes = -(-features // group)
    pad = ((0, 0), (0, codes * group - features))
    lists = max(1, min(_LISTS, len(sample) // 64))
    kind = f"IVF{lists},PQ{codes}x4fsr,Refine(SQfp16)"
    index = faiss.index_factory(codes * group, kind, faiss.METRIC_INNER_PRODUCT)
    faiss.extract_index_ivf(index.base_index).nprobe = lists
    index.train(np.pad(training_NF, pad))
    tested = spread(range(len(sample)), _TESTED)
    query_QF = training_NF[tested]
    best_QK = np.full((len(tested), RECALL_AT + 1), -np.inf, np.float32)
    row_QK = np.zeros((len(tested), RECALL_AT + 1), np.int64)
    for first, vectors_NF in vectors.blocks():
        index.add(np.pad(vectors_NF, pad))
        best_QK = np.concatenate([best_QK, query_QF @ vectors_NF.T], 1)
        row_QK = np.concatenate([row_QK, np.tile(np.arange(first, first + len(vectors_NF)), (len(tested), 1))], 1)
        order_QK = np.argsort(-best_QK, axis=1, kind="stable")[:, : RECALL_AT + 1]
        best_QK, row_QK = np.take_along_axis(best_QK, order_QK, 1), np.take_along_axis(row_QK, order_QK, 1)
    built = Approximate(index)
    shares = []
    for number, query_F, exact_K in zip(tested, query_QF, row_QK, strict=True):
        own = sample[number]
        expected = [row for row in exact_K.tolist() if row != own][:RECALL_AT]
        found = [row for row in built.search(query_F, CANDIDATES)[0].tolist() if row != own][:RECALL_AT]
        shares.append(len({*expected} & {*found}) / len(expected))
    built.recall = float(np.mean(shares))
    return built

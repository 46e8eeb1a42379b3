"""Time, recall and memory of a search in a large folder of features.

Legend: N windows, F features.
"""

import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.sources import spread
from pipelines.benchmarks import Row, comparison, in_new_process
from pipelines.inference.feature_files import FeatureFolder
from pipelines.inference.feature_files import Row as Window
from pipelines.inference.feature_vectors import SMALL, FeatureVectors
from pipelines.inference.neighbours import RECALL_AT, Exact, Index, nearest_videos, open_index

_WINDOWS, _FEATURES, _SHARD = 10**6, 768, 5000
_QUERIES, _COMPARED = 50, 3
"""Queries of the index, and of the comparison with all vectors."""
_MIB = 2**20


def measure(folder: Path, scale: float) -> Iterator[Row]:
    """Yield the rows for random features, which have no structure, and for features in 100 clusters.

    Raises:
        ValueError: if faiss is missing.
    """
    windows = max(SMALL + _SHARD, round(_WINDOWS * scale))
    for kind, clusters in (("random", 0), ("in 100 clusters", 100)):
        _write(folder / "features", windows, clusters)
        seconds, recall, built_mib = in_new_process(_build, folder / "features")
        opening, query_ms, compared_ms, open_mib = in_new_process(_search, folder / "features")
        index_mib = (folder / "features/search/index.faiss").stat().st_size / _MIB
        shutil.rmtree(folder / "features")
        what = f"{windows:,} windows of {_FEATURES} features, {kind}"
        reach = "≤ 50" if windows == _WINDOWS else ""
        yield comparison(
            f"{what}: a query", "ms", query_ms, compared_ms, "all vectors compared, read from files", reach
        )
        yield Row(f"{what}: recall at {RECALL_AT} of the exact search", "", recall)
        yield Row(f"{what}: building the index once", "s", seconds)
        yield Row(f"{what}: opening folder and index", "s", opening)
        yield Row(f"{what}: size of the index", "MiB", index_mib)
        yield Row(f"{what}: peak memory of building", "MiB", built_mib)
        yield Row(f"{what}: peak memory of {_QUERIES} queries", "MiB", open_mib)


def _write(folder: Path, windows: int, clusters: int) -> None:
    rng = np.random.default_rng(0)
    centres = 4 * rng.standard_normal((max(1, clusters), _FEATURES), dtype=np.float32)
    written = FeatureFolder(folder)
    for shard, first in enumerate(range(0, windows, _SHARD)):
        count = min(_SHARD, windows - first)
        features_NF = rng.standard_normal((count, _FEATURES), dtype=np.float32)
        if clusters:
            features_NF += centres[rng.integers(clusters, size=count)]
        rows = [Window(f"{number:07d}.mp4", None, None, None, 0, 0.0, 2.0) for number in range(first, first + count)]
        written.write(shard, list(features_NF), rows, {})


def _build(folder: Path) -> tuple[float, float, float]:
    """Return the seconds of building the index, its recall, and the peak memory in MiB."""
    vectors = FeatureVectors(FeatureFolder(folder))
    began = time.perf_counter()
    index = open_index(vectors, "benchmark", _say)
    if index.recall is None:
        raise ValueError("faiss-cpu cannot be imported; it is in the extra search")
    return time.perf_counter() - began, index.recall, _peak()


def _search(folder: Path) -> tuple[float, float, float, float]:
    """Return the seconds of opening, the milliseconds of a query in both ways, and the peak memory of the index in MiB."""
    began = time.perf_counter()
    vectors = FeatureVectors(FeatureFolder(folder))
    index = open_index(vectors, "benchmark", _say)
    opening = time.perf_counter() - began
    rows = spread(range(len(vectors)), _QUERIES)
    queries = {row: vectors.scaling.unit(vectors.features(row))[0] for row in rows}
    query_ms, peak = _median_ms(index, vectors, queries), _peak()
    compared_ms = _median_ms(Exact(vectors), vectors, {row: queries[row] for row in rows[:_COMPARED]})
    return opening, query_ms, compared_ms, peak


def _median_ms(index: Index, vectors: FeatureVectors, queries: dict[int, np.ndarray]) -> float:
    """Return the median time of a query in milliseconds. `queries`: unit vector of each row."""
    times = []
    for row, query_F in queries.items():
        began = time.perf_counter()
        nearest_videos(index, vectors, query_F, RECALL_AT, own=row)
        times.append(time.perf_counter() - began)
    return 1000 * float(np.median(times))


def _peak() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (_MIB if sys.platform == "darwin" else 1024)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

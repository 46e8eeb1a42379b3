"""Recall and mean average precision of a search among labelled videos.

Legend: N windows, Q queries, F features, V videos.
"""

from collections.abc import Callable
from typing import TypedDict

import numpy as np

from data.files import sha256_of, write_json
from data.schema import conform
from data.sources import spread
from pipelines.engine.run_files import read_json
from pipelines.inference.feature_vectors import FeatureVectors

PROTOCOL = (
    "queries are windows of labelled videos, among the other labelled videos, each with its nearest window; the video of a query "
    "and its group are left out; an equally near video of another label counts as nearer; recall at k: share of the queries "
    "with a video of the same label among the k nearest; map: mean average precision over all of these videos; chance: recall "
    "at 1 of a random order"
)
"""Description of the evaluation, for JSON and pages."""
AT = (1, 5, 10)
_QUERIES = 2000
_LONG = 10_000
"""Windows from which an evaluation takes more than a few seconds."""
_SIMILARITIES = 2 * 10**8
"""Most similarities of queries and videos in memory."""


class Retrieval(TypedDict):
    """Result of an evaluation.

    `recall`, `map`, `chance`: see `PROTOCOL`, None without queries; `queries`: number of windows that were evaluated; `eligible`:
    windows that could be; `single`: labelled windows without another video of their label outside their group; `groups`: whether
    there are groups.
    """

    recall: dict[str, float] | None
    map: float | None
    chance: float | None
    queries: int
    eligible: int
    single: int
    groups: bool


def retrieval(vectors: FeatureVectors, most: int = _QUERIES) -> Retrieval:
    """Evaluate a search for each of up to `most` windows, spread evenly. Raises a ValueError if features cannot be read."""
    label_V, group_V = _videos(vectors)
    labelled_N = label_V[vectors.video_N] >= 0
    same_V, candidates_V = _candidates(label_V, group_V)
    eligible = np.flatnonzero(labelled_N & (same_V > 0)[vectors.video_N]).tolist()
    groups = bool((np.bincount(group_V[label_V >= 0]) > 1).any()) if labelled_N.any() else False
    rows = spread(eligible, min(most, max(1, _SIMILARITIES // len(vectors.videos))))
    found: Retrieval = {
        "recall": None,
        "map": None,
        "chance": None,
        "queries": len(rows),
        "eligible": len(eligible),
        "single": int(labelled_N.sum()) - len(eligible),
        "groups": groups,
    }
    if not rows:
        return found
    similarity_QV = _similarities(vectors, rows)
    hits, precisions = [], []
    for row, similarity_V in zip(rows, similarity_QV, strict=True):
        own = vectors.video_N[row]
        others_V, same_label_V = (label_V >= 0) & (group_V != group_V[own]), label_V == label_V[own]
        right, wrong = (np.sort(-similarity_V[others_V & kind_V]) for kind_V in (same_label_V, ~same_label_V))
        # A video of another label that is equally near counts as nearer.
        rank = np.searchsorted(wrong, right, side="right") + np.arange(1, len(right) + 1)
        hits.append([rank[0] <= k for k in AT])
        precisions.append(np.mean(np.arange(1, len(rank) + 1) / rank))
    shares = dict(zip(AT, np.mean(hits, axis=0).tolist(), strict=True))
    found["recall"] = {str(k): round(share, 4) for k, share in shares.items()}
    found["map"] = round(float(np.mean(precisions)), 4)
    found["chance"] = round(float((same_V / np.maximum(candidates_V, 1))[vectors.video_N[rows]].mean()), 4)
    return found


def stored_retrieval(vectors: FeatureVectors, features: str, say: Callable[[str], None]) -> Retrieval:
    """Return the evaluation of a folder, which is done once and stored in FOLDER/search/evaluation.json.

    Args:
        features: identity of the features; the stored evaluation of others is not used.
        say: prints a message.
    """
    file, of = vectors.folder.folder / "search" / "evaluation.json", sha256_of([features, PROTOCOL])
    if file.exists():
        stored = read_json(file)
        if stored.pop("of", None) == of:
            return conform(stored, Retrieval, str(file))
    if len(vectors) > _LONG:
        say(f"evaluating the search among {len(vectors):,} windows, once")
    found = retrieval(vectors)
    try:
        file.parent.mkdir(exist_ok=True)
        write_json(file, {**found, "of": of})
    except OSError as error:
        say(f"{file}: the evaluation cannot be stored: {error}")
    return found


def _videos(vectors: FeatureVectors) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of the label of each video, -1 without a label, and of its group; a video alone is its own group."""
    first = {row.path: row for row in reversed(vectors.rows)}
    rows = [first[path] for path in vectors.videos]
    labels = {
        label: number for number, label in enumerate(sorted({row.label for row in rows if row.label is not None}))
    }
    groups: dict[tuple[str, str], int] = {}
    for row in rows:
        groups.setdefault(("group", row.group) if row.group else ("video", row.path), len(groups))
    group_V = [groups[("group", row.group) if row.group else ("video", row.path)] for row in rows]
    return np.array([-1 if row.label is None else labels[row.label] for row in rows]), np.array(group_V)


def _candidates(label_V: np.ndarray, group_V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of candidates of the same label for each video, and of all candidates."""
    known_V = label_V >= 0
    pair_V = np.unique(np.stack([label_V, group_V]), axis=1, return_inverse=True)[1].reshape(-1)
    same_V = np.bincount(label_V[known_V], minlength=1)[label_V] - np.bincount(pair_V)[pair_V]
    all_V = known_V.sum() - np.bincount(group_V, weights=known_V)[group_V]
    return same_V, all_V


def _similarities(vectors: FeatureVectors, rows: list[int]) -> np.ndarray:
    """Return the similarity of each query to the nearest window of each video, (Q, V)."""
    query_QF = vectors.take(rows)
    best_QV = np.full((len(rows), len(vectors.videos)), -np.inf, np.float32)
    for first, vectors_NF in vectors.blocks():
        video_N = vectors.video_N[first : first + len(vectors_NF)]
        # The windows of a video follow each other.
        starts = np.flatnonzero(np.diff(video_N, prepend=-1))
        nearest_QV = np.maximum.reduceat(query_QF @ vectors_NF.T, starts, axis=1)
        videos = video_N[starts]
        best_QV[:, videos] = np.maximum(best_QV[:, videos], nearest_QV)
    return best_QV

"""Recall and mean average precision equal numbers computed by hand."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.evaluation import retrieval as module
from pipelines.evaluation.retrieval import Retrieval, retrieval, stored_retrieval
from pipelines.inference.feature_files import Row
from pipelines.inference.feature_vectors import FeatureVectors, Scaling
from tests.helpers.features import at_angles, window, write_features

ANGLES = (0, 10, 25, 90, 100)
LABELS = ("a", "a", "b", "b", "a")


def evaluated(folder: Path, angles: tuple[float, ...], rows: list[Row], most: int = 2000) -> Retrieval:
    vectors = FeatureVectors(write_features(folder, at_angles(*angles), rows))
    vectors.scaling = Scaling(np.zeros(1, np.float32), np.ones(1, np.float32))
    return retrieval(vectors, most)


def test_recall_and_precision_by_hand(tmp_path: Path) -> None:
    found = evaluated(tmp_path, ANGLES, [window(str(i), label) for i, label in enumerate(LABELS)])
    # Ranks of the videos of the same label: 1 and 4, 1 and 4, 3, 2, 3 and 4.
    precisions = [(1 + 2 / 4) / 2, (1 + 2 / 4) / 2, 1 / 3, 1 / 2, (1 / 3 + 2 / 4) / 2]
    assert found == {
        "recall": {"1": 0.4, "5": 1.0, "10": 1.0},
        "map": round(sum(precisions) / 5, 4),
        "chance": round((3 * 2 / 4 + 2 * 1 / 4) / 5, 4),
        "queries": 5,
        "eligible": 5,
        "single": 0,
        "groups": False,
    }


def test_the_group_of_a_query_is_left_out(tmp_path: Path) -> None:
    groups = ("g", "g", None, None, None)
    rows = [window(str(i), label, group) for i, (label, group) in enumerate(zip(LABELS, groups, strict=True))]
    found = evaluated(tmp_path, ANGLES, rows)
    precisions = [1 / 3, 1 / 3, 1 / 3, 1 / 2, (1 / 3 + 2 / 4) / 2]
    assert found["recall"] == {"1": 0.0, "5": 1.0, "10": 1.0} and found["map"] == round(sum(precisions) / 5, 4)
    assert found["chance"] == round((1 / 3 + 1 / 3 + 1 / 4 + 1 / 4 + 2 / 4) / 5, 4) and found["groups"]


def test_a_video_counts_by_its_nearest_window_and_never_for_itself(tmp_path: Path) -> None:
    rows = [window("0", "a"), window("0", "a", view=1), window("1", "b"), window("2", "a"), window("2", "a", view=1)]
    found = evaluated(tmp_path, (0, 1, 5, 170, 3), rows)
    # The nearest window of video 2, at 3 degrees, is nearer to 0 and 1 than video 1 at 5; seen from 170, video 1 is nearer.
    assert (found["queries"], found["single"]) == (4, 1)
    assert found["recall"] is not None and found["recall"]["1"] == 0.75
    assert found["map"] == round((1 + 1 + 1 / 2 + 1) / 4, 4)


def test_an_equally_near_video_of_another_label_counts_as_nearer(tmp_path: Path) -> None:
    # Videos 1 to 4 are equal.
    rows = [window("0", "a"), *(window(str(i), label) for i, label in enumerate("aabb", 1))]
    found = evaluated(tmp_path, (0, 20, 20, 20, 20), rows)
    # Ranks: 3 and 4 for 0; 3 and 4 for 1 and 2, whose other video is 0; 3 for 3 and 4.
    assert found["map"] == round((3 * (1 / 3 + 2 / 4) / 2 + 2 / 3) / 5, 4)


def test_videos_without_a_label_are_neither_queries_nor_found(tmp_path: Path) -> None:
    rows = [window("0", "a"), window("1"), window("2", "a"), window("3", "b")]
    found = evaluated(tmp_path, (0, 1, 20, 90), rows)
    assert found["recall"] == {"1": 1.0, "5": 1.0, "10": 1.0}
    assert (found["queries"], found["eligible"], found["single"]) == (2, 2, 1)


@pytest.mark.parametrize("labels, single", [((None, None), 0), (("a", "b"), 2), (("a", "a"), 2)])
def test_without_two_videos_of_a_label_there_is_no_recall(
    tmp_path: Path, labels: tuple[str | None, str | None], single: int
) -> None:
    found = evaluated(tmp_path, (0, 1), [window(str(i), label, "g") for i, label in enumerate(labels)])
    assert (found["recall"], found["map"], found["queries"], found["single"]) == (None, None, 0, single)


def test_queries_are_spread_evenly(tmp_path: Path) -> None:
    rows = [window(str(i), "a" if i % 2 else "b") for i in range(20)]
    found = evaluated(tmp_path, tuple(range(0, 200, 10)), rows, most=3)
    assert (found["queries"], found["eligible"]) == (3, 20)


def test_an_evaluation_is_done_once_for_the_same_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [window(str(i), label) for i, label in enumerate(LABELS)]
    vectors = FeatureVectors(write_features(tmp_path, at_angles(*ANGLES), rows))
    first = stored_retrieval(vectors, "features", print)
    monkeypatch.setattr(module, "retrieval", lambda vectors: first | {"queries": 99})
    assert stored_retrieval(vectors, "features", print) == first
    assert stored_retrieval(vectors, "others", print)["queries"] == 99

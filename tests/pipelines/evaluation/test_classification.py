"""Accuracies against numbers counted by hand, and the table of predictions."""

import csv
import io

import numpy as np
import pytest

from pipelines.evaluation.classification import Prediction, measures, predictions_csv

CLASSES = ("a", "b", "c", "d", "e", "f")


def prediction(path: str, label: str, order: str, group: str | None = None) -> Prediction:
    """A prediction whose classes are in an order of probability; an empty order is an undecodable video."""
    if not order:
        return Prediction(path, label, group, None, "is damaged")
    share_C = np.array(
        [2.0 ** -(order + "".join(c for c in CLASSES if c not in order)).index(name) for name in CLASSES]
    )
    return Prediction(path, label, group, share_C / share_C.sum())


FOUND = [
    prediction("1", "a", "a"),
    prediction("2", "a", "bca"),
    prediction("3", "a", "bcdefa"),
    prediction("4", "b", "b"),
    prediction("5", "b", ""),
    prediction("6", "unknown", "a"),
]


def test_measures_are_those_counted_by_hand() -> None:
    found = measures(FOUND, CLASSES)
    assert (found["n"], found["top1"], found["top5"]) == (6, round(2 / 6, 4), 0.5)
    assert found["per_class"] == {
        "a": {"accuracy": 0.3333, "n": 3},
        "b": {"accuracy": 0.5, "n": 2},
        "unknown": {"accuracy": 0.0, "n": 1},
    }
    assert found["mean_class"] == pytest.approx((0.3333 + 0.5) / 3, abs=1e-4) and found["chance"] == 0.5
    assert found["confusions"] == [["a", "b", 2], ["unknown", "a", 1]]


def test_top5_needs_more_than_five_classes() -> None:
    assert measures(FOUND[:1], CLASSES[:5])["top5"] is None


def test_the_error_is_over_groups() -> None:
    alone = [prediction(str(i), "a", "a" if i % 2 else "b") for i in range(8)]
    together = [prediction(str(i), "a", "a" if i >= 4 else "b", group=f"g{i // 4}") for i in range(8)]
    assert measures(alone, CLASSES)["top1_error"] < measures(together, CLASSES)["top1_error"]
    assert measures([prediction("1", "a", "a", "g"), prediction("2", "a", "b", "g")], CLASSES)["top1_error"] is None


def test_ties_take_the_first_class() -> None:
    tie = Prediction("1", "b", None, np.array([0.5, 0.5, 0, 0, 0, 0]))
    assert measures([tie], CLASSES)["top1"] == 0 and tie.ranking()[:2] == [0, 1]


def test_the_table_has_a_row_for_each_video() -> None:
    rows = list(csv.DictReader(io.StringIO(predictions_csv(FOUND, CLASSES))))
    assert [row["path"] for row in rows] == list("123456")
    assert [row["right"] for row in rows] == ["1", "0", "0", "1", "0", "0"]
    assert (rows[1]["predicted"], rows[1]["top2"], rows[1]["top3"]) == ("b", "c", "a")
    assert rows[4]["predicted"] == "" and rows[4]["undecodable"] == "is damaged"
    assert float(rows[0]["probability"]) == pytest.approx(FOUND[0].share_C.max(), abs=1e-4)  # type: ignore[union-attr]

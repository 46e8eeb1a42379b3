"""HTML page about the evaluation of a classifier: accuracies, classes, confusions, videos that could not be used."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.decoding import DamagedVideo
from pipelines.evaluation.classification import Prediction
from pipelines.reporting.pages import write_page
from pipelines.reporting.thumbnails import moving_picture

_MOST_CELLS = 30
"""Most classes of a confusion matrix; with more, only the most frequent confusions are listed."""
_CONFUSIONS = 20
_PICTURES = 12
"""Most frequent confusions of which a video is shown."""


def write_evaluation_page(
    page: Path,
    summary: Mapping[str, Any],
    classes: Sequence[str],
    predictions: Sequence[Prediction],
    cut: Callable[[str], np.ndarray],
) -> None:
    """Write the page about the summary of evaluate.

    Args:
        cut: cuts the middle clip of the video of a path, uint8 (T, H, W, 3).
    """
    error = "" if summary["top1_error"] is None else f"± {summary['top1_error']:.3f}, "
    tiles = [
        ["top-1 accuracy", f"{summary['top1']:.3f}", f"{error}n = {summary['n']}"],
        ["mean of the classes", f"{summary['mean_class']:.3f}", f"{len(summary['per_class'])} classes"],
        ["most common class", f"{summary['chance']:.3f}", "without looking"],
    ]
    if summary["top5"] is not None:
        tiles.insert(1, ["top-5 accuracy", f"{summary['top5']:.3f}", ""])
    rows = [
        [name, f"{one['accuracy']:.3f}", str(one["n"])]
        for name, one in sorted(summary["per_class"].items(), key=lambda item: (item[1]["accuracy"], item[0]))
    ]
    confusions = [[label, predicted, str(count)] for label, predicted, count in summary["confusions"][:_CONFUSIONS]]
    values = {
        "title": f"Evaluation of {Path(summary['model']).name}",
        "tiles": tiles,
        "summary": summary,
        "classes": rows,
        "names": classes,
        "confusions": confusions,
        "pictures": [_picture(one, classes, cut) for one in _examples(summary, classes, predictions)],
        "matrix": _matrix(summary, classes) if len(classes) <= _MOST_CELLS else None,
        "unused": [[path, "missing, not counted"] for path in summary["missing_videos"]]
        + [
            [entry["path"], f"undecodable, counted as an error: {entry['reason']}"]
            for entry in summary["undecodable_videos"]
        ],
    }
    write_page(page, "evaluation.html", values)


def _examples(
    summary: Mapping[str, Any], classes: Sequence[str], predictions: Sequence[Prediction]
) -> list[Prediction]:
    """Return for each of the most frequent confusions the video of which the classifier is most certain."""
    examples = []
    for label, predicted, _ in summary["confusions"][:_PICTURES]:
        number = classes.index(predicted)
        confused = [one for one in predictions if one.label == label and one.ranking()[:1] == [number]]
        examples.append(max(confused, key=lambda one: (one.share_C[number], one.path)))  # type: ignore[index]
    return examples


def _picture(prediction: Prediction, classes: Sequence[str], cut: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """Return a moving picture of a video, or a note in its place, with its label and the predicted class."""
    found: dict[str, Any] = {"path": prediction.path, "label": prediction.label, "picture": None}
    found["predicted"] = classes[prediction.ranking()[0]]
    try:
        found["picture"] = moving_picture(cut(prediction.path), None)
    except (OSError, ValueError, DamagedVideo) as error:
        found["note"] = f"no picture: {error}"
    return found


def _matrix(summary: Mapping[str, Any], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for each label: counts of the predicted classes, with their share of the videos of the label."""
    count = {(label, predicted): number for label, predicted, number in summary["confusions"]}
    rows = []
    for label, one in summary["per_class"].items():
        right = round(one["accuracy"] * one["n"])
        numbers = [right if predicted == label else count.get((label, predicted), 0) for predicted in classes]
        cells = [{"count": number or "", "share": round(100 * number / one["n"])} for number in numbers]
        rows.append({"label": label, "cells": cells})
    return rows

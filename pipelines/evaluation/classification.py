"""Measures of a classifier on labelled videos, and the predictions that they are made of.

Legend: N videos, C classes.
"""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ar_model.folds import group_numbers
from pipelines.evaluation.errors import accuracy_with_error

_TOP = 5


@dataclass(frozen=True)
class Prediction:
    """Prediction for a labelled video. `share_C`: probability of each class; None if the video is undecodable (`damage`)."""

    path: str
    label: str
    group: str | None
    share_C: np.ndarray | None
    damage: str | None = None

    def ranking(self) -> list[int]:
        """Return the class numbers, the most probable first; of equal ones, the lower number first."""
        return [] if self.share_C is None else np.argsort(-self.share_C, kind="stable").tolist()


def measures(predictions: Sequence[Prediction], classes: Sequence[str]) -> dict[str, Any]:
    """Return top-1 and top-5 accuracy, mean accuracy of the classes, each class, and the confusions, most frequent first.

    An undecodable video, and a video of a class that the classifier does not know, is an error. With `classes` of at most five,
    `top5` is None. `top1_error`: standard error over videos, or over groups if there are groups.
    """
    number = {name: i for i, name in enumerate(classes)}
    rankings = [prediction.ranking() for prediction in predictions]
    target_N = [number.get(prediction.label, -1) for prediction in predictions]
    first_N = [ranking[:1] == [target] for ranking, target in zip(rankings, target_N, strict=True)]
    fifth_N = [target in ranking[:_TOP] for ranking, target in zip(rankings, target_N, strict=True)]
    total = Counter(prediction.label for prediction in predictions)
    right = Counter(prediction.label for prediction, is_right in zip(predictions, first_N, strict=True) if is_right)
    per_class = {name: {"accuracy": round(right[name] / total[name], 4), "n": total[name]} for name in sorted(total)}
    groups_N = group_numbers([prediction.group for prediction in predictions])
    confusions = Counter(
        (prediction.label, classes[ranking[0]])
        for prediction, ranking in zip(predictions, rankings, strict=True)
        if ranking and classes[ranking[0]] != prediction.label
    )
    top1 = accuracy_with_error([first_N], np.arange(len(predictions)) if groups_N is None else groups_N)
    return {
        "n": len(predictions),
        "top1": top1["mean"],
        "top1_error": top1["stderr"],
        "top5": round(sum(fifth_N) / len(predictions), 4) if len(classes) > _TOP else None,
        "mean_class": round(sum(one["accuracy"] for one in per_class.values()) / len(per_class), 4),
        "chance": round(max(total.values()) / len(predictions), 4),
        "per_class": per_class,
        "confusions": [[label, predicted, count] for (label, predicted), count in confusions.most_common()],
    }


def predictions_csv(predictions: Sequence[Prediction], classes: Sequence[str]) -> str:
    """Return a table with a row for each video: its label, the predicted class with its probability, and the damage if any."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    best = [f"top{place}" for place in range(2, _TOP + 1)]
    writer.writerow(["path", "label", "predicted", "probability", "right", *best, "undecodable"])
    for prediction in predictions:
        ranking = prediction.ranking()
        names = [classes[i] for i in ranking[:_TOP]] + [""] * (_TOP - len(ranking))
        share = "" if prediction.share_C is None else f"{prediction.share_C[ranking[0]]:.4f}"
        is_right = int(names[0] == prediction.label and bool(ranking))
        row = [prediction.path, prediction.label, names[0], share, is_right, *names[1:_TOP], prediction.damage or ""]
        writer.writerow(row)
    return text.getvalue()

"""Probes of saved models on the labelled clips of a cache."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate import Accelerator

from ar_model.objectives import load_objective
from ar_model.probes import Accuracy, Fold, evaluate
from data.cache import TokenCache
from pipelines.evaluation.features import LabelledVideos, collect


def probe_model(
    accelerator: Accelerator,
    model: Path,
    cache: TokenCache,
    labelled: LabelledVideos,
    repetitions: Sequence[list[Fold]],
    *,
    trained: bool = True,
    attentive: bool = False,
    scratch: Path | None = None,
    bar: Any = None,
) -> list[Accuracy]:
    """Probe the frozen features of a saved model, and return one accuracy per repetition.

    Args:
        model: folder written by `Objective.save`.
        repetitions: the folds of each repetition.
        trained: false probes the same network with new random weights, drawn from torch's global generator.
        attentive: also train the attentive probe. The tokens of all clips go to disk while it runs.
        scratch: folder for these tokens; by default the system's temporary folder.
        bar: progress bar that advances by the number of clips for the features, and again for each repetition.
    """
    objective = load_objective(model, trained=trained)
    with TemporaryDirectory(prefix="arvideo-probe-", dir=scratch) as folder:
        features = collect(accelerator, objective, cache, labelled.rows, bar, Path(folder) if attentive else None)
        accuracies = []
        for folds in repetitions:
            accuracies.append(
                evaluate(features.pooled_NF, labelled.y_N, folds, features.tokens_NLD, accelerator.device)
            )
            if bar is not None:
                bar.update(len(labelled.rows))
        return accuracies

"""Probes of frozen models on the labelled clips of a cache.

Legend: N samples, F features, L tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ar_model.objectives import Objective, load_objective
from ar_model.probes import Accuracy, Fold, evaluate, make_folds, slice_means
from data.cache import TokenCache
from data.loading import evaluation_batches

BATCH = 32
LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class LabelledVideos:
    """Cache rows, labels and groups of the labelled videos of a cache, and whether the official split holds them out."""

    rows: list[int]
    y_N: np.ndarray
    groups: list[str | None]
    held_out_N: np.ndarray

    @classmethod
    def of(cls, cache: TokenCache) -> "LabelledVideos":
        """Collect the labelled videos of a cache.

        Raises:
            ValueError: if the labels have fewer than two classes.
        """
        rows = [row for row, video in enumerate(cache.videos) if video.label is not None]
        videos = [cache.videos[row] for row in rows]
        y_N = np.array([video.label for video in videos])
        if (classes := len(set(y_N))) < 2:
            raise ValueError(f"{cache.address}: a probe needs labels of at least 2 classes, got {classes}")
        held_out_N = np.array([video.split not in (None, "train") for video in videos])
        return cls(rows, y_N, [video.group for video in videos], held_out_N)

    def folds(self, seed: int) -> list[Fold]:
        """Split the videos into training and test samples with `make_folds`."""
        return make_folds(self.y_N, self.groups, self.held_out_N, seed)


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
        trained: load the saved weights. If false, the weights are random, drawn from torch's global generator.
        attentive: also train the attentive probe. It stores the tokens of all clips in temporary files.
        scratch: folder for these files; None uses the system's temporary folder.
        bar: progress bar, advanced by the number of clips once for the features and once for each repetition.
    """
    objective = load_objective(model, trained=trained).to(accelerator.device)
    with TemporaryDirectory(prefix="arvideo-probe-", dir=scratch) as folder:
        tokens = Path(folder) if attentive else None
        pooled_NF, tokens_NLD = _features(accelerator, objective, cache, labelled.rows, tokens, bar)
        accuracies = []
        for folds in repetitions:
            accuracies.append(evaluate(pooled_NF, labelled.y_N, folds, tokens_NLD, accelerator.device))
            if bar is not None:
                bar.update(len(labelled.rows))
        return accuracies


@torch.inference_mode()
def _features(
    accelerator: Accelerator,
    objective: Objective,
    cache: TokenCache,
    rows: Sequence[int],
    folder: Path | None,
    bar: Any,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Compute the features of the canonical view of each row.

    Returns:
        Pooled features (N, F) of each layer, from first to last, and all tokens (N, L, D) of each layer in fp16, as NumPy
        memmaps in `folder`. Without a folder the second list is empty.
    """
    pooled: list[list[np.ndarray]] = []
    files: list[np.ndarray] = []
    for first in range(0, len(rows), BATCH):
        (batch,) = evaluation_batches(cache, rows[first : first + BATCH], BATCH, pixels=objective.sees_pixels)
        with accelerator.autocast():
            layers = objective.features({key: value.to(accelerator.device) for key, value in batch.items()})
        slices = objective.time_slices(batch)
        pooled.append([slice_means(layer, slices).cpu().numpy() for layer in layers])
        if folder is not None:
            if not files:
                shape = (len(rows), *layers[0].shape[1:])
                paths = [folder / f"layer{i}.npy" for i in range(len(layers))]
                files = [np.lib.format.open_memmap(path, "w+", np.float16, shape) for path in paths]
            for file, layer in zip(files, layers, strict=True):
                file[first : first + len(layer)] = layer.float().clamp(-LARGEST, LARGEST).half().cpu().numpy()
        if bar is not None:
            bar.update(len(batch["row_B"]))
    return [np.concatenate(parts) for parts in zip(*pooled, strict=True)], files

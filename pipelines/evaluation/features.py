"""Frozen features of the labelled clips of a cache.

Legend: N samples, F features, L tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ar_model.objectives import Objective
from ar_model.probes import Fold, make_folds, slice_means
from data.cache import TokenCache
from data.loading import evaluation_batches

BATCH = 32
LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class LabelledVideos:
    """The labelled videos of a cache: their cache rows, labels, groups and whether their official split holds them out."""

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
        classes = len(set(y_N))
        if classes < 2:
            raise ValueError(f"{cache.address}: a probe needs labels of at least 2 classes, got {classes}")
        held_out_N = np.array([video.split not in (None, "train") for video in videos])
        return cls(rows, y_N, [video.group for video in videos], held_out_N)

    def folds(self, seed: int) -> list[Fold]:
        """Cut the videos into training and test samples, see `make_folds`."""
        return make_folds(self.y_N, self.groups, self.held_out_N, seed)


@dataclass(frozen=True)
class Features:
    """Features of each layer, first to last.

    `pooled_NF` holds one vector per clip. `tokens_NLD` holds all tokens in fp16, and is empty unless tokens were asked for.
    """

    pooled_NF: list[np.ndarray]
    tokens_NLD: list[np.ndarray]


@torch.inference_mode()
def collect(
    accelerator: Accelerator,
    objective: Objective,
    cache: TokenCache,
    rows: Sequence[int],
    bar: Any = None,
    tokens: Path | None = None,
) -> Features:
    """Compute the features of the canonical view of each row.

    Args:
        bar: progress bar that advances by one per clip.
        tokens: empty folder for NumPy memmaps of all tokens, which can be large. Without it no tokens are kept.
    """
    objective.to(accelerator.device)
    pooled: list[list[np.ndarray]] = []
    files: list[np.ndarray] = []
    for first in range(0, len(rows), BATCH):
        (batch,) = evaluation_batches(cache, rows[first : first + BATCH], BATCH, pixels=objective.sees_pixels)
        with accelerator.autocast():
            layers = objective.features({key: value.to(accelerator.device) for key, value in batch.items()})
        slices = objective.time_slices(batch)
        pooled.append([slice_means(layer, slices).cpu().numpy() for layer in layers])
        if tokens is not None:
            if not files:
                shape = (len(rows), *layers[0].shape[1:])
                paths = [tokens / f"layer{i}.npy" for i in range(len(layers))]
                files = [np.lib.format.open_memmap(path, "w+", np.float16, shape) for path in paths]
            for file, layer in zip(files, layers, strict=True):
                file[first : first + len(layer)] = layer.float().clamp(-LARGEST, LARGEST).half().cpu().numpy()
        if bar is not None:
            bar.update(len(batch["row_B"]))
    return Features([np.concatenate(parts) for parts in zip(*pooled, strict=True)], files)

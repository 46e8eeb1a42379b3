"""Features of a frozen network for the clips of a cache, as its probes want them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ar_model.objectives import Objective
from ar_model.probes import Accuracy, Fold, evaluate, make_folds, slice_means
from data.cache import TokenCache
from data.loading import evaluation_batches

BATCH = 32
LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class LabelledVideos:
    """The labelled videos of a cache."""

    rows: list[int]
    y_N: np.ndarray
    groups: list[str | None]
    held_out_N: np.ndarray

    @classmethod
    def of(cls, cache: TokenCache) -> "LabelledVideos":
        rows = [row for row, video in enumerate(cache.videos) if video.label is not None]
        videos = [cache.videos[row] for row in rows]
        y_N = np.array([video.label for video in videos])
        if len(set(y_N)) < 2:
            raise ValueError(f"{cache.address}: {len(set(y_N))} classes among its labels; a probe needs two or more")
        held_out = np.array([video.split not in (None, "train") for video in videos])
        return cls(rows, y_N, [video.group for video in videos], held_out)

    def folds(self, seed: int) -> list[Fold]:
        return make_folds(self.y_N, self.groups, self.held_out_N, seed)


@dataclass(frozen=True)
class Features:
    """Of each layer: pooled ones (N, F), and the tokens (N, L, D) in half precision if they were asked for."""

    pooled_NF: list[np.ndarray]
    tokens_NLD: list[np.ndarray]

    def probe(self, y_N: np.ndarray, folds: Sequence[Fold], device: torch.device | None = None) -> Accuracy:
        return evaluate(self.pooled_NF, y_N, folds, self.tokens_NLD, device)


@torch.inference_mode()
def collect(
    accelerator: Accelerator,
    objective: Objective,
    cache: TokenCache,
    rows: Sequence[int],
    bar: Any = None,
    tokens: Path | None = None,
) -> Features:
    """Features of the canonical views. `tokens`: an empty folder for the files of all tokens, which can be large."""
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
            shape = (len(rows), *layers[0].shape[1:])
            files = files or [
                np.lib.format.open_memmap(tokens / f"layer{i}.npy", "w+", np.float16, shape) for i in range(len(layers))
            ]
            for file, layer in zip(files, layers, strict=True):
                file[first : first + len(layer)] = layer.float().clamp(-LARGEST, LARGEST).half().cpu().numpy()
        if bar is not None:
            bar.update(len(batch["row_B"]))
    return Features([np.concatenate(parts) for parts in zip(*pooled, strict=True)], files)

"""Baselines without a network: linear probes on the pixels of one frame, and on motion energy.

Legend: N samples, F features, T H W C frames, height, width, channels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ar_model.folds import Fold
from ar_model.probes import evaluate
from data.cache import TokenCache
from data.source_clips import canonical_clips
from pipelines.evaluation.errors import accuracy_with_error
from pipelines.evaluation.features import LabelledVideos

SIDE = 16
"""Height and width of the downsampled frames."""


def baselines(
    cache: TokenCache, labelled: LabelledVideos, repetitions: Sequence[list[Fold]], bar: Any
) -> dict[str, Any]:
    """Return the accuracy and standard error of `one_frame` and `motion_energy` over the folds of each repetition."""
    frame_NF, energy_NF = _pixel_features(cache, labelled.rows, bar)
    results = {}
    for name, x_NF in (("one_frame", frame_NF), ("motion_energy", energy_NF)):
        outcomes = [evaluate([x_NF], labelled.y_N, folds) for folds in repetitions]
        groups_M = labelled.groups_of(outcomes[0].tested)
        results[name] = accuracy_with_error([outcome.best["linear"] for outcome in outcomes], groups_M)
    return results


def _pixel_features(cache: TokenCache, rows: Sequence[int], bar: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the middle frame at 16x16 in colour, and the mean absolute frame difference at 16x16 in grey, (N, F) each."""
    frames, energies = [], []
    for clip_THWC in canonical_clips(cache, rows):
        clip_TCHW = torch.from_numpy(clip_THWC.copy()).float().permute(0, 3, 1, 2)
        small_TCHW = torch.nn.functional.adaptive_avg_pool2d(clip_TCHW, SIDE)
        frames.append(small_TCHW[len(small_TCHW) // 2].flatten().numpy())
        # A clip of one frame has no differences, so their mean is NaN.
        energies.append(small_TCHW.mean(1).diff(dim=0).abs().mean(0).nan_to_num().flatten().numpy())
        bar.update()
    return np.stack(frames), np.stack(energies)

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

from ar_model.folds import Fold, group_numbers, make_folds, shortened
from ar_model.inputs import Grid
from ar_model.objectives import Objective, load_objective
from ar_model.probes import Outcomes, evaluate, slice_means
from data.cache import TokenCache
from data.loading import evaluation_batches
from data.sources import hold_out

EVALUATION = 3
"""Version of the rules of probes: folds, choices, standard errors. Results of another version are made again."""
BATCH = 32
LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class LabelledVideos:
    """Labelled videos of a cache that a probe can use: cache rows, labels, groups, and whether an official split tests them.

    `notes`: one sentence for each kind of video that is left out or cannot be predicted.
    `left_out`: number of labelled videos that are left out.
    """

    rows: list[int]
    y_N: np.ndarray
    groups: list[str | None]
    held_out_N: np.ndarray
    notes: tuple[str, ...]
    left_out: int

    @classmethod
    def of(cls, cache: TokenCache) -> "LabelledVideos":
        """Collect the labelled videos of a cache.

        - Videos of the split val are left out if there is a test split, because settings may be chosen on them.
        - Without an official split, a class is left out if all its videos are in one group, or if it has one video: it could
          never be in the training and in the test samples.

        Raises:
            ValueError: if fewer than two classes are left.
        """
        notes = []
        rows = all_rows = [row for row, video in enumerate(cache.videos) if video.label is not None]
        held_out = {cache.videos[row].split for row in rows} - {None, "train"}
        if "val" in held_out and len(held_out) > 1:
            rows = [row for row in rows if cache.videos[row].split != "val"]
            notes.append(f"{len(all_rows) - len(rows)} labelled videos of the split val are not used")
        units: dict[str, set[str]] = {}
        trained = set()
        for row in rows:
            video = cache.videos[row]
            units.setdefault(str(video.label), set()).add(f"group {video.group}" if video.group else f"video {row}")
            if video.split in (None, "train"):
                trained.add(video.label)
        if held_out:
            trained_groups = {cache.videos[row].group for row in rows if cache.videos[row].split in (None, "train")} - {
                None
            }
            shared = sum(
                cache.videos[row].group in trained_groups for row in rows if cache.videos[row].split in held_out
            )
            if shared:
                notes.append(f"{shared} held-out videos are in a group that also has training videos")
            if untrained := sorted(set(units) - trained):
                notes.append(
                    f"classes without training videos, whose test videos count as errors: {shortened(untrained)}"
                )
        elif single := sorted(label for label, found in units.items() if len(found) == 1):
            rows = [row for row in rows if cache.videos[row].label not in single]
            notes.append(f"left out: classes with one video or one group only: {shortened(single)}")
        videos = [cache.videos[row] for row in rows]
        y_N = np.array([video.label for video in videos])
        if (classes := len(set(y_N))) < 2:
            why = "".join(f"; {note}" for note in notes)
            raise ValueError(f"{cache.address}: a probe needs labels of at least 2 classes, got {classes}{why}")
        held_out_N = np.array([video.split not in (None, "train") for video in videos])
        groups = [video.group for video in videos]
        return cls(rows, y_N, groups, held_out_N, tuple(notes), len(all_rows) - len(rows))

    def unpredictable(self, repetitions: Sequence[Sequence[Fold]]) -> list[str]:
        """Return a note on the tested samples of folds by groups whose class has no training sample in their fold, if any."""
        counts = [
            sum(int((~np.isin(self.y_N[fold.test], self.y_N[fold.train])).sum()) for fold in folds)
            for folds in repetitions
            if len(folds) > 1
        ]
        if not any(counts):
            return []
        return [
            f"up to {max(counts)} tested clips are of a class without training clips in their fold, and count as errors"
        ]

    def groups_of(self, samples: Sequence[int]) -> np.ndarray:
        """Return the group numbers of some samples, for standard errors. A video without a group is a group of its own."""
        numbers_N = group_numbers(self.groups)
        return np.asarray(samples) if numbers_N is None else numbers_N[samples]

    def folds(self, seed: int) -> list[Fold]:
        """Split the videos into training and test samples with `make_folds`."""
        return make_folds(self.y_N, self.groups, self.held_out_N, seed)


def seen_in_pretraining(cache: TokenCache, labelled: LabelledVideos, folds: Sequence[Fold], trained: TokenCache) -> int:
    """Return how many tested videos a network that was pre-trained on the cache `trained` has seen, without labels."""
    videos = {(trained.videos[row].path, trained.videos[row].size) for row in hold_out(trained.videos)[0]}
    tested = (cache.videos[labelled.rows[sample]] for fold in folds for sample in fold.test)
    return sum((video.path, video.size) in videos for video in tested)


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
) -> list[Outcomes]:
    """Probe the frozen features of a saved model, and return the outcomes of each repetition.

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
        pooled_NF, tokens_NLD, grid = _features(accelerator, objective, cache, labelled.rows, tokens, bar)
        outcomes = []
        for folds in repetitions:
            outcomes.append(evaluate(pooled_NF, labelled.y_N, folds, tokens_NLD, grid, accelerator.device))
            if bar is not None:
                bar.update(len(labelled.rows))
        return outcomes


@torch.inference_mode()
def _features(
    accelerator: Accelerator,
    objective: Objective,
    cache: TokenCache,
    rows: Sequence[int],
    folder: Path | None,
    bar: Any,
) -> tuple[list[np.ndarray], list[np.ndarray], Grid]:
    """Compute the features of the canonical view of each row.

    Returns:
        Pooled features (N, F) of each layer, from first to last; all tokens (N, L, D) of each layer in fp16, as NumPy memmaps in
        `folder` (without a folder, an empty list); and the number of tokens along (t, h, w).
    """
    pooled: list[list[np.ndarray]] = []
    files: list[np.ndarray] = []
    grid: Grid = (1, 1, 1)
    for first in range(0, len(rows), BATCH):
        (batch,) = evaluation_batches(cache, rows[first : first + BATCH], BATCH, pixels=objective.sees_pixels)
        with accelerator.autocast():
            layers = objective.features({key: value.to(accelerator.device) for key, value in batch.items()})
        for number, layer in enumerate(layers, start=1):
            if not layer.isfinite().all():
                raise ValueError(f"the features of layer {number} are not finite: the model is damaged or has diverged")
        grid = objective.grid_of(batch)
        pooled.append([slice_means(layer, grid).cpu().numpy() for layer in layers])
        if folder is not None:
            if not files:
                shape = (len(rows), *layers[0].shape[1:])
                paths = [folder / f"layer{i}.npy" for i in range(len(layers))]
                files = [np.lib.format.open_memmap(path, "w+", np.float16, shape) for path in paths]
            for file, layer in zip(files, layers, strict=True):
                file[first : first + len(layer)] = layer.float().clamp(-LARGEST, LARGEST).half().cpu().numpy()
        if bar is not None:
            bar.update(len(batch["row_B"]))
    return [np.concatenate(parts) for parts in zip(*pooled, strict=True)], files, grid

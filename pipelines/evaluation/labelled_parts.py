"""Parts of the labelled videos of a cache for fine-tuning: to train on, and to choose the best weights on."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ar_model.folds import Fold, group_numbers, shortened
from data.cache import TokenCache

_PARTS = 10
"""One part of so many is held out to choose the best weights."""
_SIDES = ("left", "right")
_DIRECTIONS = {
    *(f"{side}{end}" for side in _SIDES for end in ("", "ward", "wards")),
    *("clockwise", "counterclockwise", "anticlockwise", "cw", "ccw", "east", "west"),
}


@dataclass(frozen=True)
class LabelledParts:
    """Rows of a cache to train on and rows held out from them, with the number of the class of each row of the cache.

    `classes`: sorted names. `label_N`: -1 for rows without a label that is trained. `notes`: one sentence for each kind of video
    that is left out.
    """

    classes: tuple[str, ...]
    label_N: np.ndarray
    train: list[int]
    held_out: list[int]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, cache: TokenCache, seed: int) -> "LabelledParts":
        """Split the labelled videos of a cache. Videos of the split test are never used.

        Videos of the split val are held out. Without them, about a tenth of the training videos is, at least one group: whole
        groups, stratified by label. A group that holds all videos of a class is not held out.

        Raises:
            ValueError: if fewer than two classes are left, or nothing can be held out.
        """
        videos, notes = cache.videos, []
        labelled = [row for row, video in enumerate(videos) if video.label is not None]
        train = [row for row in labelled if videos[row].split in (None, "train")]
        held_out = [row for row in labelled if videos[row].split == "val"]
        if tested := len(labelled) - len(train) - len(held_out):
            notes.append(f"{tested} labelled videos of other splits than train and val are not used")
        names = [str(videos[row].label) for row in train]
        single = sorted(name for name in set(names) if names.count(name) == 1)
        if single:
            train = [row for row in train if videos[row].label not in single]
            notes.append(f"left out: classes with one training video only: {shortened(single)}")
        classes = sorted({str(videos[row].label) for row in train})
        if len(classes) < 2:
            why = "".join(f"; {note}" for note in notes)
            raise ValueError(f"{cache.address}: needs training videos of at least 2 classes, got {len(classes)}{why}")
        if unknown := sorted({str(videos[row].label) for row in held_out} - set(classes)):
            notes.append(f"held-out videos of classes without training videos are not used: {shortened(unknown)}")
            held_out = [row for row in held_out if videos[row].label in classes]
        number = {name: i for i, name in enumerate(classes)}
        label_N = np.array([number.get(str(video.label), -1) for video in videos])
        if not held_out:
            train, held_out = _split(cache, train, label_N, seed)
            checked = {int(label_N[row]) for row in held_out}
            if unchecked := [name for i, name in enumerate(classes) if i not in checked]:
                notes.append(f"classes without a held-out video: {shortened(unchecked)}")
        return cls(tuple(classes), label_N, train, held_out, tuple(notes))


def _split(cache: TokenCache, rows: Sequence[int], label_N: np.ndarray, seed: int) -> tuple[list[int], list[int]]:
    """Hold out about a tenth of some rows, at least one group, without splitting a group.

    If most classes have one group only, single videos are held out.
    """
    groups_M = group_numbers([cache.videos[row].group for row in rows])
    everything = np.arange(len(rows))
    folds = Fold(everything, everything[:0], groups_M).inner(label_N[list(rows)], _PARTS, seed)
    if not folds:
        raise ValueError(f"{cache.address}: nothing can be held out to choose the best weights")
    held_out = set(folds[0].test.tolist())
    # A group that holds all videos of a class is trained on: nothing could be predicted about the class otherwise.
    return [row for i, row in enumerate(rows) if i not in held_out], [rows[i] for i in sorted(held_out)]


def directions(classes: Sequence[str]) -> list[str]:
    """Return the names of classes that mirroring would swap."""
    # SwipeLeft is two words.
    words = {name: re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower() for name in classes}
    return [name for name in classes if _DIRECTIONS & set(re.split(r"[^a-z]+", words[name]))]

"""Folds of labelled samples: training and test samples, with the groups that must not be separated.

Legend: N samples, M samples of a part.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, StratifiedKFold

MAX_FOLDS = 10
_CLASSES = 0.9
"""Share of the classes that a part of the inner folds must test."""


@dataclass(frozen=True, eq=False)
class Fold:
    """Indices of the training samples and of the test samples, (M,) each.

    `groups_M` has one integer per training sample, equal for samples that belong together (one scene, one subject). Settings are
    chosen by leaving out whole groups of the training samples. None: each sample is a group of its own.
    """

    train: np.ndarray
    test: np.ndarray
    groups_M: np.ndarray | None = None

    def inner(self, y_N: np.ndarray, count: int, seed: int, enough: int | None = None) -> "list[Fold]":
        """Split the training samples into at most `count` folds, without splitting a group (see `left_out_groups`).

        Test samples whose class has no training sample are left out. The list is empty if nothing can be tested. With
        `enough`, it ends with the fold up to which that many samples are tested, of nine tenths of the classes of all folds.
        """
        y_M = y_N[self.train]
        groups_M = left_out_groups(y_M, self.groups_M)[0] if self.groups_M is not None else None
        parts = [(train, test[np.isin(y_M[test], y_M[train])]) for train, test in _split(y_M, groups_M, count, seed)]
        folds = [Fold(self.train[train], self.train[test]) for train, test in parts if len(test)]
        if enough is not None:
            tested = [y_N[fold.test] for fold in folds]
            for first in range(1, len(folds)):
                some, all_of_them = np.concatenate(tested[:first]), np.concatenate(tested)
                if len(some) >= enough and len(set(some)) >= _CLASSES * len(set(all_of_them)):
                    return folds[:first]
        return folds


def group_numbers(groups: Sequence[str | None]) -> np.ndarray | None:
    """Return one integer per sample, equal within a group; None if there are no groups.

    A sample without a group is a group of its own.
    """
    if not any(groups):
        return None
    names = [f"group {group}" if group else f"sample {i}" for i, group in enumerate(groups)]
    return np.unique(names, return_inverse=True)[1]


def left_out_groups(y_M: np.ndarray, groups_M: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the group of each training sample that is left out with it, and whether the sample counts.

    A class is testable if it has samples in two groups; else no model could predict what is left out of it. If most classes are
    testable, the samples of the others do not count. Else, each sample of the others is a group of its own.
    """
    number_M = np.unique(y_M, return_inverse=True)[1]
    single_M = np.arange(len(y_M))
    if groups_M is None:
        groups_M = single_M
    testable_C = _groups_by_class(number_M, groups_M) > 1
    if testable_C.mean() <= 0.5:
        groups_M = np.where(testable_C[number_M], groups_M, groups_M.max() + 1 + single_M)
        testable_C = _groups_by_class(number_M, groups_M) > 1
    counts_M = testable_C[number_M]
    return groups_M, counts_M if counts_M.any() else np.ones(len(y_M), bool)


def _groups_by_class(number_M: np.ndarray, groups_M: np.ndarray) -> np.ndarray:
    """Return the number of groups with samples of each class, given the class numbers of samples."""
    return np.bincount(np.unique(np.stack([number_M, groups_M]), axis=1)[0])


def make_folds(y_N: np.ndarray, groups: Sequence[str | None], held_out_N: np.ndarray, seed: int) -> list[Fold]:
    """Split labelled samples into folds, as a function of the seed.

    - With an official held-out split: one fold. It tests on that split and trains on a random 90 % of the other samples.
    - Else, with groups: ten stratified folds that keep each group together, or one fold per group if there are at most ten.
    - Else: ten stratified folds, or as many as the most common class has samples.

    Raises:
        ValueError: if nothing can be held out, nothing is left to train on, the training samples have one class only, or no
            training sample has a label of the held-out samples.
    """
    groups_N = group_numbers(groups)
    if held_out_N.any():
        train = np.flatnonzero(~held_out_N)
        _check_labels(y_N[train], y_N[held_out_N])
        order = np.random.default_rng(seed).permutation(len(train))
        kept, dropped = np.split(order, [max(1, round(0.9 * len(train)))])
        # A rare class keeps one sample.
        lost = [
            np.flatnonzero(y_N[train] == label)[:1] for label in np.setdiff1d(y_N[train[dropped]], y_N[train[kept]])
        ]
        kept = np.sort(np.concatenate([kept, *lost]))
        parts = [(train[kept], np.flatnonzero(held_out_N))]
    else:
        parts = _split(y_N, groups_N, MAX_FOLDS, seed)
        if not parts:
            what = (
                "all labelled videos are in one group"
                if groups_N is not None
                else "each class has one labelled video only"
            )
            raise ValueError(f"{what}: nothing can be held out")
    return [Fold(train, test, None if groups_N is None else groups_N[train]) for train, test in parts]


def _split(y_M: np.ndarray, groups_M: np.ndarray | None, count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split samples into up to `count` folds: by groups if there are groups, else stratified by label."""
    if groups_M is not None:
        # In a random order, because equal groups are taken in their order.
        names, number_M = np.unique(groups_M, return_inverse=True)
        groups_M = np.random.default_rng(seed).permutation(len(names))[number_M]
        if len(names) <= count:
            splitter = GroupKFold(len(names)) if len(names) > 1 else None
        else:
            # Stratified, because folds with several groups of a class would leave few of them for training, or none.
            splitter = StratifiedGroupKFold(min(count, max(Counter(y_M).values())))
    else:
        count = min(count, max(Counter(y_M).values()))
        splitter = StratifiedKFold(count, shuffle=True, random_state=seed) if count > 1 else None
    if splitter is None:
        return []
    with warnings.catch_warnings():
        # A class with fewer samples than folds is missing from the test samples of some folds.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        return [(train, test) for train, test in splitter.split(y_M, y_M, groups_M) if len(test)]


def _check_labels(train_M: np.ndarray, test_M: np.ndarray) -> None:
    """Raise a ValueError if a probe that is trained on the first labels cannot be tested on the second ones."""
    trained, tested = sorted(set(train_M)), sorted(set(test_M))
    if not trained:
        raise ValueError("all labelled videos are in the held-out split: none is left to train a probe on")
    if len(trained) == 1:
        raise ValueError(f"a probe needs training videos of at least 2 classes, got only {trained[0]}")
    if not set(trained) & set(tested):
        raise ValueError(
            f"no class of the held-out videos has training videos: held out {shortened(tested)}; training {shortened(trained)}"
        )


def shortened(names: Sequence[str], count: int = 5) -> str:
    """Return the first names as text, and the number of the others."""
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(str, names[:count])) + rest


def folds_in_words(folds: int) -> str:
    """Return a description of the test samples, given the number of folds from `make_folds`."""
    return "the official held-out split" if folds == 1 else f"{folds} folds, which split no group if there are groups"


def chance(y_N: np.ndarray, folds: Sequence[Fold]) -> float:
    """Return the accuracy of the best constant prediction: the share of the most common class among the test samples."""
    y_tested = np.concatenate([y_N[fold.test] for fold in folds])
    return Counter(y_tested).most_common(1)[0][1] / len(y_tested)

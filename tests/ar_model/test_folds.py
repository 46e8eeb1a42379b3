"""Folds split no group, are functions of the seed, and are refused where nothing can be tested."""

import numpy as np
import pytest

from ar_model.folds import Fold, chance, left_out_groups, make_folds


def nothing_held_out(n: int) -> np.ndarray:
    return np.zeros(n, dtype=bool)


def assert_partition(folds: list[Fold], n: int) -> None:
    """Assert that every sample is tested in one fold and trained on in all others."""
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(n))
    for fold in folds:
        assert sorted(np.concatenate([fold.train, fold.test])) == list(range(n))


def test_an_official_split_is_tested_completely_and_nine_tenths_of_the_rest_train() -> None:
    held_out = np.arange(50) % 5 == 0
    (fold,) = make_folds(np.arange(50) % 2, ["a"] * 50, held_out, seed=0)
    assert fold.test.tolist() == np.flatnonzero(held_out).tolist()
    assert len(set(fold.train)) == len(fold.train) == 36
    assert not held_out[fold.train].any()
    trains = [make_folds(np.arange(50) % 2, [None] * 50, held_out, seed)[0].train.tolist() for seed in range(4)]
    assert len({tuple(train) for train in trains}) == 4


@pytest.mark.parametrize("groups_N, folds_N", [(4, 4), (10, 10), (23, 10)])
def test_folds_never_split_a_group(groups_N: int, folds_N: int) -> None:
    n = 120
    groups = np.array([f"g{i % groups_N}" for i in range(n)])
    folds = make_folds(np.arange(n) % 3, groups.tolist(), nothing_held_out(n), seed=3)
    assert len(folds) == folds_N
    assert_partition(folds, n)
    for fold in folds:
        assert not set(groups[fold.train]) & set(groups[fold.test])


def test_samples_without_a_group_are_groups_of_their_own() -> None:
    groups = ["a"] * 10 + [None] * 10
    folds = make_folds(np.arange(20) % 2, groups, nothing_held_out(20), seed=0)
    assert_partition(folds, 20)
    group = set(range(10))
    assert all(len(group & set(fold.test)) in (0, 10) for fold in folds)
    assert any(0 < len(set(fold.test) - group) < 10 for fold in folds)


def test_folds_without_groups_are_stratified() -> None:
    y = np.array([0] * 50 + [1] * 30 + [2] * 20)
    folds = make_folds(y, [None] * 100, nothing_held_out(100), seed=0)
    assert len(folds) == 10
    assert_partition(folds, 100)
    assert all(np.bincount(y[fold.test]).tolist() == [5, 3, 2] for fold in folds)


@pytest.mark.filterwarnings("error")
def test_a_rare_class_does_not_limit_the_number_of_folds() -> None:
    y = np.array([0] * 20 + [1] * 3)
    folds = make_folds(y, [None] * 23, nothing_held_out(23), seed=0)
    assert len(folds) == 10
    assert_partition(folds, 23)
    assert sorted((y[fold.test] == 1).sum() for fold in folds) == [0] * 7 + [1] * 3


@pytest.mark.parametrize("groups", [[None] * 60, [f"g{i % 20}" for i in range(60)]])
def test_folds_are_a_function_of_the_seed(groups: list[str | None]) -> None:
    def tests(seed: int) -> list[list[int]]:
        return [fold.test.tolist() for fold in make_folds(np.arange(60) % 2, groups, nothing_held_out(60), seed)]

    assert tests(5) == tests(5)
    assert tests(5) != tests(6)


def test_nothing_to_hold_out_is_refused() -> None:
    y = np.array([0, 0, 1, 1])
    with pytest.raises(ValueError, match="held-out split"):
        make_folds(y, [None] * 4, np.ones(4, dtype=bool), seed=0)
    with pytest.raises(ValueError, match="one group"):
        make_folds(y, ["a"] * 4, nothing_held_out(4), seed=0)
    with pytest.raises(ValueError, match="each class has one labelled video"):
        make_folds(np.array([0, 1, 2]), [None] * 3, nothing_held_out(3), seed=0)


def test_a_held_out_split_without_a_trained_class_is_refused() -> None:
    labels = np.array(["run", "walk", "run", "jump", "sit"])
    held_out = np.array([False, False, False, True, True])
    with pytest.raises(ValueError, match="jump, sit.*run, walk"):
        make_folds(labels, [None] * 5, held_out, seed=0)
    with pytest.raises(ValueError, match="2 classes, got only run"):
        make_folds(labels[[0, 2, 0, 1, 1]], [None] * 5, held_out, seed=0)
    make_folds(labels[[0, 1, 0, 1, 4]], [None] * 5, held_out, seed=0)


@pytest.mark.parametrize("official", [False, True])
def test_folds_carry_the_groups_of_their_training_samples(official: bool) -> None:
    groups = [f"g{i % 7}" if i % 9 else None for i in range(90)]
    held_out = np.arange(90) % 7 == 3 if official else nothing_held_out(90)
    for fold in make_folds(np.arange(90) % 3, groups, held_out, seed=0):
        assert fold.groups_M is not None and len(fold.groups_M) == len(fold.train)
        of_names: dict[str, set[int]] = {}
        for row, group in zip(fold.train, fold.groups_M, strict=True):
            of_names.setdefault(groups[row] or f"sample {row}", set()).add(int(group))
        numbers = [next(iter(found)) for found in of_names.values() if len(found) == 1]
        assert len(set(numbers)) == len(of_names)
        for part in fold.inner(np.arange(90) % 3, 5, seed=0):
            assert set(part.train) | set(part.test) == set(fold.train)
            names = [{groups[row] or f"sample {row}" for row in rows} for rows in (part.train, part.test)]
            assert not names[0] & names[1]


def test_inner_folds_are_empty_if_nothing_can_be_left_out() -> None:
    y = np.array([0, 1, 2, 0, 1])
    assert Fold(np.arange(3), np.arange(3, 5)).inner(y, 5, seed=0) == []
    assert len(Fold(np.arange(4), np.arange(4, 5)).inner(y, 5, seed=0)) == 2


def test_inner_folds_end_when_they_test_enough_samples_of_enough_classes() -> None:
    nobody = np.arange(0)
    y, groups = np.repeat([0, 1, 0, 1, 0], 120), np.repeat(np.arange(5), 120)
    few = Fold(np.arange(600), nobody, groups).inner(y, 5, seed=0, enough=100)
    assert {0, 1} == set(y[np.concatenate([part.test for part in few])])
    assert len(few) < 5 and len(Fold(np.arange(600), nobody, groups).inner(y, 5, seed=0)) == 5
    single = np.arange(1000) % 3
    assert [len(part.test) for part in Fold(np.arange(1000), nobody).inner(single, 5, seed=0, enough=100)] == [200]
    assert len(Fold(np.arange(200), nobody).inner(single[:200], 5, seed=0, enough=100)) == 3


def test_inner_folds_leave_out_single_samples_if_each_class_is_one_group() -> None:
    y = np.repeat(np.arange(3), 10)
    parts = Fold(np.arange(30), np.arange(0), y).inner(y, 5, seed=0)
    assert len(parts) == 5 and all(set(y[part.test]) <= set(y[part.train]) for part in parts)


def test_a_sample_counts_if_another_group_has_its_class_and_most_classes_have_several_groups() -> None:
    y, groups = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 2, 2, 3, 4])
    numbers, counts = left_out_groups(y, groups)
    assert numbers.tolist() == groups.tolist() and counts.tolist() == [True, True, False, False, True, True]
    numbers, counts = left_out_groups(y, y)
    assert len(set(numbers)) == 6 and counts.all(), "each class is one group: single samples are left out"
    assert left_out_groups(np.arange(3), None)[1].all(), "no class has two samples"


def test_a_stray_sample_does_not_make_its_class_the_only_one_that_counts() -> None:
    y = np.repeat(np.arange(10), 30)
    groups = y.copy()
    groups[0] = 10
    numbers, counts = left_out_groups(y, groups)
    assert counts.all()
    assert len(set(numbers)) == 2 + 9 * 30 and len(set(numbers[:30])) == 2
    for part in Fold(np.arange(300), np.arange(0), groups).inner(y, 5, seed=0):
        assert len(set(y[part.test])) >= 9


def test_a_rare_class_of_an_official_split_keeps_a_training_sample() -> None:
    y, held_out = np.array([*"aaaaaaaaab", "a", "b"]), np.arange(12) >= 10
    assert all(set(y[make_folds(y, [None] * 12, held_out, seed)[0].train]) == {"a", "b"} for seed in range(30))


def test_folds_by_groups_have_about_the_same_size() -> None:
    groups = [f"g{i}" for i in range(60) for _ in range(1 + (7 * i) % 31)]
    folds = make_folds(np.arange(len(groups)) % 2, groups, nothing_held_out(len(groups)), seed=0)
    sizes = [len(fold.test) for fold in folds]
    assert max(sizes) < 1.5 * min(sizes)


@pytest.mark.parametrize("classes, groups_of_class", [(10, 2), (51, 2), (101, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_folds_by_groups_train_on_every_class_that_has_two_groups(
    classes: int, groups_of_class: int, seed: int
) -> None:
    y = np.repeat(np.arange(classes), groups_of_class * 5)
    groups = [f"g{i // 5}" for i in range(len(y))]
    folds = make_folds(y, groups, nothing_held_out(len(y)), seed)
    assert_partition(folds, len(y))
    for fold in folds:
        assert set(y[fold.test]) <= set(y[fold.train])
        assert not {groups[i] for i in fold.train} & {groups[i] for i in fold.test}


def test_chance_is_the_accuracy_of_the_best_constant_prediction() -> None:
    """It does not depend on the folds. (Always predicting the most common class of the training samples would score 0 here.)"""
    y_N = np.array(["a", "a", "b", "b"])
    folds = [Fold(np.array([1, 2, 3]), np.array([0])), Fold(np.array([0, 1, 2]), np.array([3]))]
    folds += [Fold(np.array([0, 2, 3]), np.array([1])), Fold(np.array([0, 1, 3]), np.array([2]))]
    assert chance(y_N, folds) == 0.5
    assert chance(np.array(["a", "b", "b", "b"]), folds) == 0.75
    assert chance(np.array(["a", "b", "b", "a"]), [Fold(np.array([0, 1]), np.array([2, 3]))]) == 0.5

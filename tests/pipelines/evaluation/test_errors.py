"""Standard errors over seeds, clips and groups of clips, and whether an entry is ahead of another."""

import math

import numpy as np
import pytest
import torch

from pipelines.evaluation.errors import (
    accuracy_with_error,
    difference,
    mean_over_clips,
    mean_over_seeds,
    sampling_error,
)


def test_the_error_over_seeds_is_rounded_and_needs_two_seeds() -> None:
    assert mean_over_seeds([0.5, 0.7, 0.6]) == {"mean": 0.6, "stderr": 0.0577}
    assert mean_over_seeds([0.5]) == {"mean": 0.5, "stderr": None}


def test_the_error_over_clips_needs_two_clips() -> None:
    result = mean_over_clips(torch.tensor([0.5, 0.75, 1.0]))
    assert result == {"mean": 0.75, "stderr": pytest.approx(0.25 / 3**0.5, rel=1e-12)}
    assert mean_over_clips(torch.tensor([2.0])) == {"mean": 2.0, "stderr": None}


def test_the_sampling_error_of_single_clips_is_binomial() -> None:
    right = np.arange(400) % 4 > 0
    assert sampling_error(right, np.arange(400)) == pytest.approx(math.sqrt(0.75 * 0.25 / 399))
    assert sampling_error(right, np.zeros(400)) is None, "one group says nothing"
    assert sampling_error(np.ones(1), np.zeros(1)) is None


def test_the_sampling_error_over_groups_equals_a_bootstrap() -> None:
    draw = np.random.default_rng(0)
    group = draw.integers(0, 60, 500)
    right = draw.uniform(size=500) < draw.uniform(size=60)[group]
    means = []
    for _ in range(4000):
        drawn = np.concatenate([np.flatnonzero(group == g) for g in draw.integers(0, 60, 60)])
        means.append(right[drawn].mean())
    assert sampling_error(right, group) == pytest.approx(np.std(means) * math.sqrt(60 / 59), rel=0.05)


def test_the_stated_error_is_the_true_one_where_clips_of_a_group_are_alike() -> None:
    """100 groups of 5 clips; the true error is .034, where a binomial error would state .022."""
    draw = np.random.default_rng(0)
    group = np.repeat(np.arange(100), 5)
    right_SM = draw.uniform(size=(1000, 500)) < draw.uniform(size=(1000, 100))[:, group]
    stated = [sampling_error(right, group) for right in right_SM]
    assert np.mean(stated) == pytest.approx(right_SM.mean(1).std(), rel=0.05)
    assert np.mean(stated) == pytest.approx(0.0338, rel=0.03)


UNEQUAL = {"one of 900": [900, *[11] * 9], "one of 600": [600, *[20] * 20], "two of 500": [500, 500, *[5] * 20]}


@pytest.mark.parametrize("sizes_G", UNEQUAL.values(), ids=UNEQUAL)
def test_a_group_with_most_of_the_clips_does_not_hide_the_error(sizes_G: list[int]) -> None:
    draw, group = np.random.default_rng(0), np.repeat(np.arange(len(sizes_G)), sizes_G)
    skill_SG = 0.5 + 0.1 * draw.normal(size=(1000, len(sizes_G)))
    right_SM = draw.uniform(size=(1000, len(group))) < skill_SG[:, group]
    stated = [sampling_error(right, group) for right in right_SM]
    assert np.mean(stated) > 0.8 * right_SM.mean(1).std()


@pytest.mark.parametrize("sizes_G", [*UNEQUAL.values(), [200, *[1] * 200]], ids=[*UNEQUAL, "one of 200, single ones"])
def test_equal_entries_are_rarely_called_ahead_on_groups_of_unequal_size(sizes_G: list[int]) -> None:
    """Each page has two entries and two probes."""
    draw, group, false = np.random.default_rng(0), np.repeat(np.arange(len(sizes_G)), sizes_G), 0
    for _ in range(200):
        ahead = []
        for _ in range(2):
            skill_EG = 0.5 + 0.1 * draw.normal(size=(2, len(sizes_G)))
            entries = [draw.uniform(size=(5, len(group))) < skill_G[group] for skill_G in skill_EG]
            best, second = sorted(entries, key=lambda right_RM: -right_RM.mean())
            ahead.append(difference(best, second, group, 4)["ahead"])
        false += any(ahead)
    assert false <= 10


def test_the_standard_error_adds_the_variances_of_clips_and_repetitions() -> None:
    right_RM = [np.arange(400) < 4 * percent for percent in (70, 80, 75)]
    repeated = (0.05**2 + 0.05**2) / 2 / 3
    sampling = sampling_error(np.mean(right_RM, axis=0), np.arange(400))
    found = accuracy_with_error(right_RM, np.arange(400))
    assert found == {"mean": 0.75, "stderr": round(math.sqrt(sampling**2 + repeated), 4)}
    assert accuracy_with_error([np.ones(9)] * 2, np.arange(9)) == {"mean": 1.0, "stderr": 0.0}
    assert accuracy_with_error([np.ones(9)] * 2, np.zeros(9)) == {"mean": 1.0, "stderr": None}


def simulated(
    generator: np.random.Generator, entries: int, seeds: int, groups: int = 80, gain: float = 0.0
) -> list[np.ndarray]:
    """Outcomes (R, M) of equal entries on 400 clips in groups.

    Clips and groups differ in difficulty, also between entries, and training runs differ in skill. All entries have the same
    folds in a repetition. `gain` makes the first entry better.
    """
    clips = 400 // groups
    difficulty_M = generator.normal(size=groups).repeat(clips) + generator.normal(size=400)
    fold_R = 0.2 * generator.normal(size=seeds)
    outcomes = []
    for number in range(entries):
        own_M = difficulty_M + 0.7 * generator.normal(size=groups).repeat(clips)
        skill_R = fold_R + 0.2 * generator.normal(size=seeds) + gain * (number == 0)
        outcomes.append(skill_R[:, None] + generator.normal(size=(seeds, 400)) > own_M)
    return outcomes


@pytest.mark.parametrize(("entries", "seeds", "groups"), [(2, 5, 80), (2, 2, 80), (2, 10, 80), (2, 5, 4), (5, 5, 80)])
def test_equal_entries_are_called_ahead_in_at_most_one_page_of_twenty(entries: int, seeds: int, groups: int) -> None:
    """Each page has two probes."""
    generator, groups_M, false = np.random.default_rng(1), np.arange(groups).repeat(400 // groups), 0
    for _ in range(1000):
        ahead = []
        for _ in range(2):
            outcomes = simulated(generator, entries, seeds, groups)
            best, second = sorted(outcomes, key=lambda right_RM: -right_RM.mean())[:2]
            ahead.append(difference(best, second, groups_M, entries * (entries - 1) * 2)["ahead"])
        false += any(ahead)
    assert false <= 50


def test_a_clear_lead_is_seen() -> None:
    generator, groups_M = np.random.default_rng(1), np.arange(80).repeat(5)
    found = [difference(*simulated(generator, 2, 5, gain=1.0), groups_M, 4)["ahead"] for _ in range(50)]
    assert sum(found) >= 40


def test_a_difference_is_paired() -> None:
    """Folds that are hard for both entries do not hide that one of them is always better."""
    fold_R = np.array([100, 200, 300, 150, 250])
    right = [[np.arange(1000) < count + more for count in fold_R] for more in (50, 0)]
    apart = difference(*right, np.arange(1000), 2)
    assert apart == {"mean": 0.05, "stderr": 0.0, "sampling": apart["sampling"], "tied": False, "ahead": True}
    assert apart["sampling"] == round(sampling_error(np.mean(right[0], 0) - np.mean(right[1], 0), np.arange(1000)), 4)


def test_equal_outcomes_are_tied_and_one_repetition_says_nothing() -> None:
    right = [np.arange(10) < 5, np.arange(10) < 6]
    assert difference(right, right, np.arange(10), 2) == {
        **{"mean": 0.0, "stderr": 0.0, "sampling": 0.0},
        **{"tied": True, "ahead": False},
    }
    single = difference([np.ones(10)], [np.zeros(10)], np.arange(10), 2)
    assert (single["stderr"], single["ahead"], single["mean"]) == (None, None, 1.0)
    assert difference([np.ones(10)] * 3, [np.zeros(10)] * 3, np.zeros(10), 2)["ahead"] is None, "one group"
    one, other = [np.arange(10) < 6] * 3, [np.arange(10) < 5] * 3
    assert difference(one, other, np.arange(10) > 0, 2)["ahead"] is False, "two groups, of one and of nine clips"


def test_equal_totals_are_tied_without_rounding() -> None:
    draw = np.random.default_rng(0)
    one, other = (
        np.stack([draw.permutation(60) < 20 + shift for shift in shifts]) for shifts in ((1, 2, 3), (3, 1, 2))
    )
    assert difference(one, other, np.arange(60), 2)["tied"] and difference(one, other, np.arange(60), 2)["mean"] == 0

"""Labelled videos of a cache: which a probe uses, and which it leaves out with a note."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.cache import TokenCache
from data.sources import Video
from pipelines.evaluation.features import LabelledVideos, seen_in_pretraining
from tests.helpers.caches import MakeCache


@pytest.fixture
def labelled(make_cache: MakeCache, tmp_path: Path) -> Any:
    """Function that makes a cache from (label, split, group) of each video, and collects its labelled videos."""

    def make(*rows: tuple[str | None, str | None, str | None]) -> LabelledVideos:
        videos = [Video(f"{i:03d}.mp4", 1, label, group, split) for i, (label, split, group) in enumerate(rows)]
        return LabelledVideos.of(TokenCache.open(make_cache(tmp_path, videos=videos)))

    return make


def test_videos_without_a_label_are_ignored(labelled: Any) -> None:
    found = labelled(*[("a", None, None), (None, None, None), ("b", None, None)] * 2)
    assert found.rows == [0, 2, 3, 5] and found.y_N.tolist() == ["a", "b"] * 2
    assert found.notes == () and found.left_out == 0


def test_a_test_split_is_tested_without_the_validation_videos(labelled: Any) -> None:
    rows = [(label, split, None) for split in ("train", "val", "test") for label in "ab" for _ in range(3)]
    found = labelled(*rows)
    (fold,) = found.folds(0)
    assert found.left_out == 6 and "6 labelled videos of the split val" in found.notes[0]
    assert [rows[found.rows[sample]][1] for sample in fold.test] == ["test"] * 6
    assert {rows[found.rows[sample]][1] for sample in fold.train} == {"train"}


def test_validation_videos_are_tested_if_there_is_no_test_split(labelled: Any) -> None:
    found = labelled(*[(label, split, None) for split in ("train", "val") for label in "ab"] * 3)
    assert found.notes == () and len(found.folds(0)[0].test) == 6


@pytest.mark.parametrize("group", [None, "one scene"])
def test_a_class_that_cannot_be_trained_and_tested_is_left_out_by_name(labelled: Any, group: str | None) -> None:
    alone = [("rare", None, group)] * (1 if group is None else 3)
    others = [(label, None, group and f"g{i}") for i in range(4) for label in "ab"]
    found = labelled(*others, *alone)
    assert set(found.y_N) == {"a", "b"} and found.left_out == len(alone)
    assert "rare" in found.notes[0]
    with pytest.raises(ValueError, match=r"at least 2 classes, got 1.*\brare\b"):
        labelled(*[row for row in others if row[0] == "a"], *alone)


def test_test_videos_of_an_unknown_class_are_named(labelled: Any) -> None:
    rows = [(label, split, None) for label in "ab" for split in ("train", "test")] + [("new", "test", None)]
    found = labelled(*rows)
    assert "new" in found.notes[0] and found.left_out == 0
    assert len(found.folds(0)[0].test) == 3


def test_standard_errors_use_groups_where_there_are_groups(labelled: Any) -> None:
    found = labelled(*[(label, None, group) for label in "ab" for group in ("g", "g", "h", None, None)])
    numbers = found.groups_of(range(10))
    assert numbers[0] == numbers[1] == numbers[5] != numbers[2] == numbers[7]
    assert len(np.unique(numbers)) == 2 + 4
    assert len(np.unique(labelled(*[(label, None, None) for label in "abab"]).groups_of(range(4)))) == 4


@pytest.mark.parametrize(
    ("splits", "tested", "seen"),
    [
        ([None], 40, 36),  # folds test all videos, and a tenth of them was held out from pre-training
        (["train", "test"], 20, 0),
        (["train", "val", None, "test"], 10, 0),
        (["train", "val"], 20, 0),
    ],
)
def test_tested_videos_that_were_in_pretraining_are_counted(
    make_cache: MakeCache, tmp_path: Path, splits: list[str | None], tested: int, seen: int
) -> None:
    videos = [Video(f"{i}.mp4", i, "ab"[i // 4 % 2], None, splits[i % len(splits)]) for i in range(40)]
    cache = TokenCache.open(make_cache(tmp_path, videos))
    labelled = LabelledVideos.of(cache)
    folds = labelled.folds(0)
    assert sum(len(fold.test) for fold in folds) == tested
    assert seen_in_pretraining(cache, labelled, folds, cache) == seen
    # A network that was pre-trained on another cache has seen the videos of that cache only.
    others = [Video(f"{i}.mp4", i, None, None, "train") for i in range(4)]
    others += [Video(f"{i}.mp4", -i, None, None, "train") for i in range(4, 40)]
    trained = TokenCache.open(make_cache(tmp_path, [*others, Video("x.mp4", 1, None, None, "test")], name="other"))
    expected = {labelled.rows[sample] for fold in folds for sample in fold.test}
    assert seen_in_pretraining(cache, labelled, folds, trained) == sum(
        cache.videos[row].path in {"0.mp4", "1.mp4", "2.mp4", "3.mp4"} for row in expected
    )

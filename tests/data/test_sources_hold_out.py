"""Held-out videos are functions of splits, groups and paths, and selections of them are spread over all."""

import pytest

from data.sources import Video, hold_out, spread


def test_videos_of_other_splits_are_held_out() -> None:
    def held(*splits: str | None) -> tuple[list[int], list[int]]:
        return hold_out([Video(str(i), 1, split=split) for i, split in enumerate(splits)])

    assert held("train", "test", None, "other", "train") == ([0, 2, 4], [1, 3])
    assert held("train", "val", None, "val", "train") == ([0, 2, 4], [1, 3])


def test_with_a_validation_split_the_test_videos_stay_unseen() -> None:
    splits = ["train", "val", None, "test", "train", "other"]
    assert hold_out([Video(str(i), 1, split=split) for i, split in enumerate(splits)]) == ([0, 2, 4], [1])


@pytest.mark.parametrize(
    ("most", "expected"), [(1, [3]), (2, [3, 12]), (4, [3, 6, 9, 12]), (10, [*range(3, 13)]), (99, [*range(3, 13)])]
)
def test_a_selection_of_rows_is_spread_evenly(most: int, expected: list[int]) -> None:
    assert spread(range(3, 13), most) == expected


def test_no_rows_give_an_empty_selection() -> None:
    assert spread([], 5) == []


def test_without_splits_a_tenth_is_held_out_by_group() -> None:
    videos = [Video(f"{i:03d}", 1, group=f"g{i % 20}") for i in range(100)]
    train, held = hold_out(videos)
    assert sorted(train + held) == list(range(100))
    assert len(held) == 10
    assert len({videos[i].group for i in held}) == 2
    assert not {videos[i].group for i in held} & {videos[i].group for i in train}


def test_held_out_videos_do_not_depend_on_the_order() -> None:
    videos = [Video(f"{i:03d}\udcff", 1) for i in range(40)]
    held = {videos[i].path for i in hold_out(videos)[1]}
    assert len(held) == 4
    assert {videos[::-1][i].path for i in hold_out(videos[::-1])[1]} == held


def test_single_group_is_not_held_out() -> None:
    assert hold_out([Video("a", 1, group="g"), Video("b", 1, group="g")]) == ([0, 1], [])

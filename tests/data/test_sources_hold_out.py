"""Held-out videos are functions of splits, groups and paths, and selections of them are spread over all."""

import hashlib
import math
import random

import pytest

from data.sources import Video, hold_out, spread, training_rows


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


def videos_of(sizes: dict[str, int]) -> list[Video]:
    return [Video(f"{group} {i}", 1, group=group) for group, size in sizes.items() for i in range(size)]


@pytest.mark.parametrize("per_group", [0, 1, 2, 7])
def test_of_groups_of_equal_size_the_first_tenth_by_hash_is_held_out(per_group: int) -> None:
    """These are the rows of all earlier versions: runs on such sets go on as they began. No group (0) is a group of one."""
    for count in [*range(1, 45), 99, 100, 101, 250]:
        groups = [f"{count}-{i}" for i in range(count)]
        videos = videos_of(dict.fromkeys(groups, per_group)) if per_group else [Video(group, 1) for group in groups]
        ordered = sorted(groups, key=lambda group: hashlib.sha256(group.encode()).digest())
        chosen = set(ordered[: math.ceil(count / 10)]) if count > 1 else set()
        expected = [row for row, video in enumerate(videos) if (video.group or video.path) in chosen]
        assert hold_out(videos)[1] == expected


@pytest.mark.parametrize("sizes", [[900] + [11] * 9, [500, 500, 1], [50, 30, 20], [100, 1], [300] * 3 + [1] * 100])
def test_unequal_groups_hold_out_at_most_a_fifth_whatever_their_names(sizes: list[int]) -> None:
    for naming in range(40):
        videos = videos_of({f"{naming}-{i}": size for i, size in enumerate(sizes)})
        train, held = hold_out(videos)
        assert train and held and sorted(train + held) == [*range(len(videos))]
        assert not {videos[row].group for row in train} & {videos[row].group for row in held}
        assert len(held) <= max(len(videos) / 5, min(sizes))


def test_of_many_unequal_groups_a_tenth_of_the_videos_is_held_out() -> None:
    draw = random.Random(0)
    for naming in range(20):
        videos = videos_of({f"{naming}-{i}": draw.randint(1, 40) for i in range(60)})
        assert 0.1 <= len(hold_out(videos)[1]) / len(videos) <= 0.2


def test_set_without_training_videos_is_refused_with_its_name_and_splits() -> None:
    videos = [Video(str(i), 1, split="val" if i < 3 else "test") for i in range(10)]
    with pytest.raises(ValueError, match=r"my set: .*all 10 videos .*7 in test, 3 in val"):
        training_rows(videos, "my set")
    videos.append(Video("x", 1))
    assert training_rows(videos, "my set") == hold_out(videos)

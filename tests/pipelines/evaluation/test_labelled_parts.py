"""Videos to train on and videos held out from them: no group in both, no test video in either, every odd one named."""

from pathlib import Path

import pytest

from data.cache import TokenCache
from data.sources import Video
from pipelines.evaluation.labelled_parts import LabelledParts, directions
from tests.helpers.caches import MakeCache


@pytest.fixture
def parts(make_cache: MakeCache, tmp_path: Path) -> object:
    def of(videos: list[Video], seed: int = 0) -> tuple[LabelledParts, TokenCache]:
        cache = TokenCache.open(make_cache(tmp_path / "caches", videos))
        return LabelledParts.of(cache, seed), cache

    return of


def test_whole_groups_of_training_videos_are_held_out(parts) -> None:  # type: ignore[no-untyped-def]
    videos = [Video(f"{i:03d}.mp4", 5, "ab"[i % 2], group=f"g{i // 4}") for i in range(40)]
    videos += [Video(f"test/{i}.mp4", 5, "a", group="g0", split="test") for i in range(5)]
    videos += [Video(f"none/{i}.mp4", 5) for i in range(3)]
    for seed in range(3):
        found, cache = parts(videos, seed)
        groups = [{cache.videos[row].group for row in rows} for rows in (found.train, found.held_out)]
        assert not groups[0] & groups[1] and len(found.train) + len(found.held_out) == 40 and len(found.held_out) == 4
        assert all(cache.videos[row].split is None for row in found.train + found.held_out)
        assert [found.classes[found.label_N[row]] for row in found.train] == [
            cache.videos[row].label for row in found.train
        ]
        assert any("5 labelled videos of other splits" in note for note in found.notes)


def test_the_split_val_is_held_out(parts) -> None:  # type: ignore[no-untyped-def]
    videos = [Video(f"{i}.mp4", 5, "ab"[i % 2], split="train") for i in range(6)]
    videos += [Video(f"val/{i}.mp4", 5, "abc"[i % 3], split="val") for i in range(6)]
    found, cache = parts(videos)
    assert {cache.videos[row].split for row in found.held_out} == {"val"} and len(found.train) == 6
    assert len(found.held_out) == 4 and any(
        "classes without training videos are not used: c" in note for note in found.notes
    )


def test_a_class_with_one_video_is_left_out_and_named(parts) -> None:  # type: ignore[no-untyped-def]
    videos = [Video(f"{i}.mp4", 5, "ab"[i % 2]) for i in range(6)] + [Video("one.mp4", 5, "rare")]
    found, _ = parts(videos)
    assert found.classes == ("a", "b") and any("one training video only: rare" in note for note in found.notes)


def test_a_class_of_one_group_is_trained_and_named(parts) -> None:  # type: ignore[no-untyped-def]
    videos = [Video(f"{name}{i}.mp4", 5, name, group=f"{name}{i // 2}") for name in "bcdef" for i in range(12)]
    videos += [Video(f"a{i}.mp4", 5, "a", group="a0") for i in range(4)]
    for seed in range(4):
        found, cache = parts(videos, seed)
        assert len(found.train) + len(found.held_out) == len(videos)
        assert {cache.videos[row].label for row in found.train} == set(found.classes) == set("abcdef")
        assert any("without a held-out video: a" in note for note in found.notes)


@pytest.mark.parametrize(
    "classes, swapped",
    [
        (("left", "up"), ["left"]),
        (("Turn_Right", "stop"), ["Turn_Right"]),
        (("brightness", "lefty", "up"), []),
        (("SwipeLeft", "swipeUp", "moving_rightwards"), ["SwipeLeft", "moving_rightwards"]),
        (("pull left arm", "spin clockwise"), ["pull left arm", "spin clockwise"]),
    ],
)
def test_classes_that_mirroring_swaps(classes: tuple[str, ...], swapped: list[str]) -> None:
    assert directions(classes) == swapped

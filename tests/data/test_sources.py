"""Sources read a folder, a list or the built-in set, and leave nothing out silently."""

import csv
import os
import shlex
import shutil
from pathlib import Path

import pytest

from data.sources import Source, Video, hold_out, load_source, spread
from tests.helpers.hostile_names import HOSTILE_NAMES


def touch(root: Path, *paths: str) -> Path:
    """Create files of five bytes."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"video")
    return root


def paths_of(source: Source) -> list[str]:
    return [video.path for video in source.videos]


def list_file(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_folder_that_contains_a_file_is_its_label(tmp_path: Path) -> None:
    source = load_source(str(touch(tmp_path, "run/b.mp4", "jump/high/a.AVI", "loose.mkv")))
    assert source.root == tmp_path.resolve()
    assert source.name == tmp_path.name
    assert source.videos == (
        Video("jump/high/a.AVI", 5, label="high"),
        Video("loose.mkv", 5),
        Video("run/b.mp4", 5, label="run"),
    )


def test_top_folders_named_after_splits_are_splits_not_labels(tmp_path: Path) -> None:
    touch(tmp_path, "train/run/a.mp4", "Validation/run/b.mp4", "testing/c.mp4", "train/train/d.mp4")
    videos = {video.path[-5]: (video.split, video.label) for video in load_source(str(tmp_path)).videos}
    assert videos == {"a": ("train", "run"), "b": ("val", "run"), "c": ("test", None), "d": ("train", "train")}


def test_folder_train_next_to_other_classes_is_a_label(tmp_path: Path) -> None:
    touch(tmp_path, "train/a.mp4", "car/b.mp4")
    videos = {video.path[-5]: (video.split, video.label) for video in load_source(str(tmp_path)).videos}
    assert videos == {"a": (None, "train"), "b": (None, "car")}


def test_folder_lists_only_videos_sorted_by_path(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.mp4", "a/1.webm", "a.mp4", "a/notes.txt", "README.md", "b/mp4")
    (tmp_path / "folder.mp4").mkdir()
    assert paths_of(load_source(str(tmp_path))) == ["a.mp4", "a/1.webm", "b/2.mp4"]


def test_moving_the_folder_changes_no_video(tmp_path: Path) -> None:
    old = touch(tmp_path / "old", "run/a.mp4", "jump/b.mp4")
    before = load_source(str(old)).videos
    shutil.move(old, tmp_path / "some where else")
    assert load_source(str(tmp_path / "some where else")).videos == before


def test_link_to_a_parent_folder_lists_no_video_twice(tmp_path: Path) -> None:
    touch(tmp_path, "run/a.mp4")
    (tmp_path / "run" / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert paths_of(load_source(str(tmp_path))) == ["run/a.mp4"]


def test_links_to_folders_and_videos_are_followed(tmp_path: Path) -> None:
    touch(tmp_path / "disk", "run/a.mp4", "b.mp4")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "run").symlink_to(tmp_path / "disk" / "run", target_is_directory=True)
    (tmp_path / "set" / "c.mp4").symlink_to(tmp_path / "disk" / "b.mp4")
    assert load_source(str(tmp_path / "set")).videos == (Video("c.mp4", 5), Video("run/a.mp4", 5, label="run"))


def test_broken_link_is_an_error(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    with pytest.raises(ValueError, match=r"gone\.mp4"):
        load_source(str(tmp_path))


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no video")
    with pytest.raises(ValueError, match="no video files"):
        load_source(str(tmp_path))


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_source(str(tmp_path / "nowhere"))


def test_list_file_gives_path_label_and_group(tmp_path: Path) -> None:
    touch(tmp_path, "b.mp4", "a.mp4", "sub/with space.mp4", "x#y.mp4")
    text = (
        "# my videos\n\nb.mp4 run\n  a.mp4 jump 'Mr. X'  # a comment\n'sub/with space.mp4'\n\"x#y.mp4\" 'two words'\n"
    )
    source = load_source(list_file(tmp_path / "videos.txt", text))
    assert source.name == "videos"
    assert source.videos == (
        Video("a.mp4", 5, label="jump", group="Mr. X"),
        Video("b.mp4", 5, label="run"),
        Video("sub/with space.mp4", 5),
        Video("x#y.mp4", 5, label="two words"),
    )


def test_csv_columns_give_label_group_and_split(tmp_path: Path) -> None:
    touch(tmp_path, "a,b.mp4", "c.mp4")
    text = '\ufefflabel,path,note,group,split\nrun,"a,b.mp4",x,g1,train\n,c.mp4,,,test\n'
    assert load_source(list_file(tmp_path / "list.csv", text)).videos == (
        Video("a,b.mp4", 5, label="run", group="g1", split="train"),
        Video("c.mp4", 5, split="test"),
    )


def test_csv_header_may_have_capitals_and_spaces(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    source = load_source(list_file(tmp_path / "list.csv", "Path, Label, Split\na.mp4, run, test\n"))
    assert source.videos == (Video("a.mp4", 5, label="run", split="test"),)


def test_csv_and_folder_accept_the_same_names_of_splits(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    text = "path,split\na.mp4,Training\nb.mp4,validation\nc.mp4,TEST\n"
    videos = load_source(list_file(tmp_path / "list.csv", text)).videos
    assert [video.split for video in videos] == ["train", "val", "test"]


def test_csv_without_a_path_column_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    with pytest.raises(ValueError, match="column 'path'"):
        load_source(list_file(tmp_path / "list.csv", "file,label\na.mp4,run\n"))


@pytest.mark.parametrize(
    ("file", "text"),
    [("list.txt", "a.mp4\n# b\n\nnone.mp4 run\n"), ("list.csv", "path,label\na.mp4,run\na.mp4,run\nnone.mp4,run\n")],
)
def test_missing_video_is_reported_with_its_line(tmp_path: Path, file: str, text: str) -> None:
    touch(tmp_path, "a.mp4")
    with pytest.raises(ValueError, match=rf"{file}, line 4: .*none\.mp4"):
        load_source(list_file(tmp_path / file, text))


def test_path_too_long_for_a_file_name_is_a_missing_video(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 1: "):
        load_source(list_file(tmp_path / "list.txt", "x" * 300 + ".mp4\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4 run fast group extra\n", "line 1: 5 fields"),
        ("\na.mp4 'run\n", "line 2: "),
        ("# nothing\n", "no videos"),
        ("", "no videos"),
        ("a.mp4\0", "text list"),
    ],
)
def test_malformed_list_is_refused(tmp_path: Path, text: str, message: str) -> None:
    touch(tmp_path, "a.mp4")
    with pytest.raises(ValueError, match=message):
        load_source(list_file(tmp_path / "list.txt", text))


def test_csv_field_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"list\.csv"):
        load_source(list_file(tmp_path / "list.csv", "path\n" + "x" * 200_000 + "\n"))


def test_video_is_not_read_as_a_list(video_folder: Path) -> None:
    with pytest.raises(ValueError, match="text list"):
        load_source(str(video_folder / "left" / "clip 0.mp4"))


@pytest.mark.parametrize("again", ["a.mp4", "./a.mp4", "sub/../a.mp4"])
def test_video_listed_twice_is_refused(tmp_path: Path, again: str) -> None:
    touch(tmp_path, "a.mp4", "sub/b.mp4")
    with pytest.raises(ValueError, match=r"a\.mp4 more than once"):
        load_source(list_file(tmp_path / "list.txt", f"a.mp4 run\n{again} jump\n"))


def test_moving_list_and_videos_together_changes_no_video(tmp_path: Path) -> None:
    old = touch(tmp_path / "old", "clips/a.mp4", "b.mp4")
    list_file(old / "list.txt", "clips/a.mp4 run\nb.mp4 jump\n")
    before = load_source(str(old / "list.txt"))
    shutil.move(old, tmp_path / "new")
    after = load_source(str(tmp_path / "new" / "list.txt"))
    assert after.videos == before.videos
    assert after.root == (tmp_path / "new").resolve()


def test_list_may_name_videos_outside_its_folder(tmp_path: Path) -> None:
    touch(tmp_path, "videos/run/a.mp4", "videos/b.mp4")
    (tmp_path / "lists").mkdir()
    text = f"../videos/run/a.mp4 run\n{shlex.quote(str(tmp_path / 'videos' / 'b.mp4'))}\n"
    source = load_source(list_file(tmp_path / "lists" / "list.txt", text))
    assert source.root == (tmp_path / "videos").resolve()
    assert paths_of(source) == ["b.mp4", "run/a.mp4"]


@pytest.mark.parametrize("src", ["builtin:mnist", "builtin:", "builtin:moving-digits:3", "builtin:moving-digits:a:b"])
def test_unknown_builtin_is_refused_with_the_expected_form(src: str) -> None:
    with pytest.raises(ValueError, match=r"builtin:moving-digits\[:TRAIN:TEST\]"):
        load_source(src)


def test_builtin_accepts_numbers_of_clips_and_refuses_zero() -> None:
    videos = load_source("builtin:moving-digits:9:2").videos
    assert [(v.split, v.label) for v in videos[:2]] == [("test", "left"), ("test", "right")]
    assert len(videos) == 11
    with pytest.raises(ValueError, match="at least one clip"):
        load_source("builtin:moving-digits:0:0")


@pytest.mark.parametrize("kind", HOSTILE_NAMES)
def test_hostile_name_is_read_from_folder_and_csv(tmp_path: Path, kind: str) -> None:
    name = os.fsdecode(HOSTILE_NAMES[kind])
    touch(tmp_path, f"label/{name}")
    assert load_source(str(tmp_path)).videos == (Video(f"label/{name}", 5, label="label"),)
    with open(tmp_path / "list.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["path", "label"], [f"label/{name}", name]])
    assert load_source(str(tmp_path / "list.csv")).videos == (Video(f"label/{name}", 5, label=name),)


@pytest.mark.parametrize("kind", [kind for kind, name in HOSTILE_NAMES.items() if not set(name) & set(b"\n\r")])
def test_hostile_name_on_one_line_is_read_from_a_quoted_list(tmp_path: Path, kind: str) -> None:
    name = os.fsdecode(HOSTILE_NAMES[kind])
    touch(tmp_path, name)
    with open(tmp_path / "list.txt", "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(f"{shlex.quote(name)} label\n")
    assert load_source(str(tmp_path / "list.txt")).videos == (Video(name, 5, label="label"),)


def test_names_that_differ_only_in_unicode_form_are_two_videos(tmp_path: Path) -> None:
    touch(tmp_path, "e\u0301.mp4", "\u00e9.mp4")
    if len(list(tmp_path.iterdir())) < 2:
        pytest.skip("this file system treats both forms as one name")
    assert len(load_source(str(tmp_path)).videos) == 2


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

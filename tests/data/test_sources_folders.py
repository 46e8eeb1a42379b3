"""Labels, splits and groups of videos in a folder, from the names of its subfolders."""

from pathlib import Path

import pytest

from data.sources import Video, load_source
from tests.data.test_sources import list_file, paths_of, touch


def test_first_folder_below_the_root_is_the_label(tmp_path: Path) -> None:
    source = load_source(str(touch(tmp_path, "run/b.mp4", "jump/high/a.AVI", "loose.mkv")))
    assert source.root == tmp_path.resolve()
    assert source.name == tmp_path.name
    assert source.videos == (
        Video("jump/high/a.AVI", 5, label="jump"),
        Video("loose.mkv", 5),
        Video("run/b.mp4", 5, label="run"),
    )
    (note,) = source.notes
    assert "1 of 3 videos" in note and "?group=folder" in note


def test_folders_below_the_label_are_groups_by_choice(tmp_path: Path) -> None:
    files = ["jump/anna/a.mp4", "jump/ben/day 2/b.mp4", "run/anna/c.mp4", "run/d.mp4", "e.mp4"]
    source = load_source(f"{touch(tmp_path / 'flat', *files)}?group=folder")
    found = {video.path[-5]: (video.label, video.group) for video in source.videos}
    assert found == {
        **{"a": ("jump", "anna"), "b": ("jump", "ben"), "c": ("run", "anna")},
        **{"d": ("run", None), "e": (None, None)},
    }
    assert source.notes == () and source.root == (tmp_path / "flat").resolve()
    splits = touch(tmp_path / "splits", "train/run/anna/a.mp4", "test/run/b.mp4")
    (first, second) = sorted(load_source(f"{splits}?group=folder").videos, key=lambda video: video.path[-5])
    assert (first.label, first.group, first.split) == ("run", "anna", "train")
    assert (second.label, second.group, second.split) == ("run", None, "test")


def test_the_option_of_groups_needs_a_folder(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "videos?group=folder/run/b.mp4")
    listed = list_file(tmp_path / "list.txt", "a.mp4 run\n")
    with pytest.raises(ValueError, match="group=folder needs a folder"):
        load_source(f"{listed}?group=folder")
    # A folder may have such a name.
    assert load_source(str(tmp_path / "videos?group=folder")).videos[0].label == "run"
    with pytest.raises(FileNotFoundError, match="absent: no such folder"):
        load_source(str(tmp_path / "absent?group=folder"))


def test_top_folders_named_after_splits_are_splits_not_labels(tmp_path: Path) -> None:
    touch(tmp_path, "train/run/a.mp4", "Validation/run/b.mp4", "testing/c.mp4", "train/train/d.mp4")
    videos = {video.path[-5]: (video.split, video.label) for video in load_source(str(tmp_path)).videos}
    assert videos == {"a": ("train", "run"), "b": ("val", "run"), "c": ("test", None), "d": ("train", "train")}


def test_folder_train_next_to_other_classes_is_a_label(tmp_path: Path) -> None:
    touch(tmp_path, "train/a.mp4", "car/b.mp4")
    videos = {video.path[-5]: (video.split, video.label) for video in load_source(str(tmp_path)).videos}
    assert videos == {"a": (None, "train"), "b": (None, "car")}


@pytest.mark.parametrize(
    "other", [".cache/x/train/a.mp4", ".git", "__MACOSX/train/run/._a.mp4", "annotations/list.txt"]
)
def test_splits_are_kept_beside_top_folders_without_videos(tmp_path: Path, other: str) -> None:
    touch(tmp_path, "train/run/a.mp4", "test/run/b.mp4", other)
    source = load_source(str(tmp_path))
    assert [(video.path, video.split, video.label) for video in source.videos] == [
        ("test/run/b.mp4", "test", "run"),
        ("train/run/a.mp4", "train", "run"),
    ]
    assert not any("not read as splits" in note for note in source.notes)


@pytest.mark.parametrize(
    "path",
    [
        *(".ipynb_checkpoints/a.mp4", "run/.ipynb_checkpoints/a.mp4", "@eaDir/a.mp4/x.mp4", "#recycle/run/a.mp4"),
        *(".Trash-0/files/run/a.mp4", "$RECYCLE.BIN/a.mp4", "System Volume Information/a.mp4", "run/._a.mp4"),
        *("~snapshot/run/a.mp4", "Network Trash Folder/a.mp4", "Temporary Items/a.mp4", "run/@tmp/a.mp4"),
        *("run/.x.mp4", ".~lock.x.mp4"),
    ],
)
def test_hidden_system_and_trash_folders_hold_no_videos(tmp_path: Path, path: str) -> None:
    touch(tmp_path, "run/a.mp4", path)
    source = load_source(str(tmp_path))
    assert source.videos == (Video("run/a.mp4", 5, label="run"),)
    (note,) = source.notes
    assert any(part in note for part in path.split("/"))


def test_source_in_a_hidden_folder_is_read(tmp_path: Path) -> None:
    touch(tmp_path, ".data/run/a.mp4")
    assert paths_of(load_source(str(tmp_path / ".data"))) == ["run/a.mp4"]


def test_files_with_other_endings_are_counted_in_one_note(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "a.gif", "run/b.GIF", "run/c.webp", "run/video")
    touch(tmp_path, ".DS_Store", "run/Thumbs.db", "run/desktop.ini", "run/._c.webp")
    (note,) = load_source(str(tmp_path)).notes
    assert note.startswith("4 files") and ".gif, " in note and ".webp" in note and "no ending" in note
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(ValueError, match=r"4 files .*\.gif"):
        load_source(str(tmp_path))


@pytest.mark.parametrize(
    "paths",
    [
        ("train/run/a.mp4", "test/run/b.mp4", "extra/c.mp4"),
        ("set/train/run/a.mp4", "set/test/run/b.mp4"),
        ("run/train/a.mp4", "run/val/b.mp4"),
        ("train_256/run/a.mp4", "val_256/run/b.mp4"),
        ("Train256/run/a.mp4", "extra/b.mp4"),
        ("train/run/a.mp4", "holdout/run/b.mp4"),
    ],
)
def test_folders_named_after_splits_that_are_none_are_noted(tmp_path: Path, paths: tuple[str, ...]) -> None:
    source = load_source(str(touch(tmp_path, *paths)))
    assert {video.split for video in source.videos} == {None}
    assert any("train" in note.lower() and "not read as splits" in note for note in source.notes)


@pytest.mark.parametrize("name", ["trainer", "valley", "evaluation of a", "developers", "run/train", "latest"])
def test_classes_that_are_not_named_like_splits_are_not_noted(tmp_path: Path, name: str) -> None:
    notes = load_source(str(touch(tmp_path, f"{name}/a.mp4", "run/b.mp4"))).notes
    assert not any("splits" in note for note in notes)


@pytest.mark.parametrize("name", ["dev", "Eval"])
def test_dev_and_eval_are_validation(tmp_path: Path, name: str) -> None:
    source = load_source(str(touch(tmp_path, "train/run/a.mp4", f"{name}/run/b.mp4", "test/run/c.mp4")))
    assert {video.path[-5]: video.split for video in source.videos} == {"a": "train", "b": "val", "c": "test"}
    listed = list_file(tmp_path / "list.csv", f"path,split\ntrain/run/a.mp4,train\n{name}/run/b.mp4,{name}\n")
    assert {video.split for video in load_source(listed).videos} == {"train", "val"}


def test_videos_beside_the_folders_of_splits_are_noted(tmp_path: Path) -> None:
    source = load_source(str(touch(tmp_path, "train/run/a.mp4", "test/run/b.mp4", "c.mp4")))
    assert {video.path[-5]: video.split for video in source.videos} == {"a": "train", "b": "test", "c": None}
    (note,) = source.notes
    assert "1 of 3" in note

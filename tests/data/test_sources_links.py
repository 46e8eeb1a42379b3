"""Links in a folder of videos: each file is listed once, under one name, and links that contradict each other are refused."""

import itertools
import os
import re
import time
from pathlib import Path

import pytest

import data.video_files
from data.sources import Source, Video, load_source

Names = tuple[str, ...]


def make(root: Path, files: Names, links: dict[str, str]) -> str:
    """Create files of five bytes, and symbolic links with their targets."""
    for path in (*files, *links):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
    for path in files:
        (root / path).write_bytes(b"video")
    for path, target in links.items():
        (root / path).symlink_to(target)
    return str(root)


def labels_of(source: Source) -> dict[str, str | None]:
    return {video.path: video.label for video in source.videos}


REPEATED: dict[str, tuple[Names, dict[str, str], str]] = {
    "mutual links": (("a/1.mp4", "b/2.mp4"), {"a/x": "../b", "b/y": "../a"}, r"2 links .*a/x, b/y"),
    "link to a sibling": (("a/1.mp4", "a/z/3.mp4", "b/2.mp4"), {"0": "a", "b/k": "../a/z"}, r"2 links .*0, b/k"),
    "link to a file beside it": (("a/1.mp4", "b/2.mp4"), {"a/0.mp4": "1.mp4"}, r"1 other name .*a/0\.mp4"),
    "link to a file of the same label": (("a/x/1.mp4",), {"a/0/1.mp4": "../x/1.mp4"}, r"1 .*a/0/1\.mp4"),
    "link above the root": (("a/1.mp4",), {"a/up": "../.."}, r"1 link .*a/up"),
    "alias of a split": (("train/a/1.mp4", "test/b/2.mp4"), {"latest": "train"}, r"1 link .*latest"),
    "link to itself": (("a/1.mp4",), {"a/self": "self"}, r"nowhere.*a/self"),
    "link to a folder that is missing": (("a/1.mp4",), {"b": "../not-mounted"}, r"nowhere.*b"),
}


@pytest.mark.parametrize("kind", REPEATED)
def test_each_file_is_listed_once_with_the_label_of_its_own_folder(tmp_path: Path, kind: str) -> None:
    files, links, expected = REPEATED[kind]
    source = load_source(make(tmp_path / "set", files, links))
    assert labels_of(source) == {path: path.split("/")[1 if "split" in kind else 0] for path in files}
    assert {video.split for video in source.videos} == ({"train", "test"} if "split" in kind else {None})
    notes = [note for note in source.notes if "below the folder of their label" not in note]
    assert len(notes) == 1 and re.search(expected, notes[0])


def test_set_of_links_to_a_store_keeps_the_names_of_the_links(tmp_path: Path) -> None:
    make(tmp_path / "store", ("0.mp4", "1.mp4", "c/2.mp4", "c/d/3.mp4"), {})
    store = tmp_path / "store"
    links = {
        "train/run/x.mp4": f"{store}/0.mp4",
        "test/jump/y.mp4": f"{store}/1.mp4",
        "test/swim": f"{store}/c",
    }
    source = load_source(make(tmp_path / "set", (), links))
    assert len(source.notes) == 1 and "1 of 4 videos are in folders below" in source.notes[0]
    assert source.videos == (
        Video("test/jump/y.mp4", 5, label="jump", split="test"),
        Video("test/swim/2.mp4", 5, label="swim", split="test"),
        Video("test/swim/d/3.mp4", 5, label="swim", split="test"),
        Video("train/run/x.mp4", 5, label="run", split="train"),
    )


def test_linked_folders_outside_that_link_to_each_other_are_read_under_their_own_links(tmp_path: Path) -> None:
    make(tmp_path, ("store/a/1.mp4", "store/b/2.mp4"), {"store/a/z": "../b", "store/b/0": "../a"})
    source = load_source(make(tmp_path / "set", (), {"run": "../store/a", "jump": "../store/b"}))
    assert labels_of(source) == {"run/1.mp4": "run", "jump/2.mp4": "jump"}


CONTRADICTIONS: dict[str, tuple[Names, dict[str, str], str]] = {
    "file in two splits": (
        ("train/a/1.mp4", "test/a/2.mp4"),
        {"test/a/3.mp4": "../../train/a/1.mp4"},
        r"train/a/1\.mp4 and test/a/3\.mp4 .*train and test",
    ),
    "folder in two splits": (("train/a/1.mp4",), {"val": "train"}, r"train and val .*train and val"),
    "class in two splits": (
        ("train/a/1.mp4", "test/b/2.mp4"),
        {"test/a": "../train/a"},
        r"train/a and test/a .*train and test",
    ),
    "file in the store and in a class": (("all/1.mp4",), {"run/1.mp4": "../all/1.mp4"}, r"labels: all and run"),
    "file in two classes": (
        (".store/1.mp4",),
        {"run/1.mp4": "../.store/1.mp4", "jump/2.mp4": "../.store/1.mp4"},
        r"jump/2\.mp4 and run/1\.mp4 .*labels: jump and run",
    ),
    "folder in two classes": ((".store/1.mp4",), {"run": ".store", "jump": ".store"}, r"labels: jump and run"),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_video_with_two_labels_or_splits_is_refused_with_both_names(tmp_path: Path, kind: str) -> None:
    files, links, message = CONTRADICTIONS[kind]
    with pytest.raises(ValueError, match=message):
        load_source(make(tmp_path, files, links))


def test_hard_links_are_one_file(tmp_path: Path) -> None:
    make(tmp_path, ("a/x/1.mp4", "a/y/3.mp4"), {})
    os.link(tmp_path / "a" / "x" / "1.mp4", tmp_path / "a" / "y" / "2.mp4")
    source = load_source(str(tmp_path))
    assert [video.path for video in source.videos] == ["a/x/1.mp4", "a/y/3.mp4"]
    assert any("a/y/2.mp4" in note for note in source.notes)
    (tmp_path / "list.txt").write_text("a/x/1.mp4 0\na/y/2.mp4 1\n")
    with pytest.raises(ValueError, match="line 2: lists a/y/2.mp4 more than once, first in line 1"):
        load_source(str(tmp_path / "list.txt"))


def test_files_of_one_inode_number_are_not_one_file_without_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network drives give all files the same number."""
    status_of = data.video_files.status_of

    def without_numbers(path: str) -> os.stat_result | None:
        status = status_of(path)
        return status and os.stat_result((status.st_mode, 0, *status[2:]))

    monkeypatch.setattr(data.video_files, "status_of", without_numbers)
    source = load_source(make(tmp_path, ("a/1.mp4", "b/2.mp4"), {"a/3.mp4": "1.mp4"}))
    assert labels_of(source) == {"a/1.mp4": "a", "b/2.mp4": "b"}


def test_links_between_all_folders_are_read_in_linear_time(tmp_path: Path) -> None:
    names = [f"{i:02}" for i in range(20)]
    links = {f"{a}/to {b}": f"../{b}" for a, b in itertools.permutations(names, 2)}
    root = make(tmp_path, tuple(f"{name}/1.mp4" for name in names), links)
    began = time.process_time()
    assert labels_of(load_source(root)) == {f"{name}/1.mp4": name for name in names}
    assert time.process_time() - began < 5


@pytest.mark.parametrize("unreadable", ["set", "set/a/1.mp4", "list.txt"])
def test_error_of_the_system_is_not_reported_as_a_missing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unreadable: str
) -> None:
    make(tmp_path, ("set/a/1.mp4",), {})
    (tmp_path / "list.txt").write_text("\nset/a/1.mp4 run\n")
    stat = os.stat

    def failing_stat(path: str | Path, **keywords: bool) -> os.stat_result:
        if str(path) == str(tmp_path / unreadable):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **keywords)

    monkeypatch.setattr(os, "stat", failing_stat)
    sources = ["list.txt"] if unreadable == "list.txt" else ["set"] if unreadable == "set" else ["set", "list.txt"]
    for name in sources:
        line = ", line 2: " if (name, unreadable) == ("list.txt", "set/a/1.mp4") else ""
        with pytest.raises(ValueError, match=rf"{line}.*{unreadable}.*Permission denied"):
            load_source(str(tmp_path / name))

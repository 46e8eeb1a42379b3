"""Sources read a folder, a list or the built-in set, and leave nothing out silently."""

import csv
import hashlib
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from data.moving_digits import VERSION
from data.sources import Source, Video, hold_out, load_source
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


def test_videomae_list_has_no_labels_and_no_groups(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{i:02}.mp4" for i in range(20)))
    source = load_source(list_file(tmp_path / "train.csv", "".join(f"{i:02}.mp4 0 -1\n" for i in range(20))))
    assert {(video.label, video.group) for video in source.videos} == {(None, None)}
    assert len(hold_out(source.videos)[1]) == 2
    assert any("0 -1" in note for note in source.notes)


def test_group_minus_one_is_no_group(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    source = load_source(list_file(tmp_path / "list.csv", "path,label,group\na.mp4,0,-1\nb.mp4,1,-1\nc.mp4,0,7\n"))
    assert [(video.label, video.group) for video in source.videos] == [("0", None), ("1", None), ("0", "7")]
    assert any("2 of 3" in note and "-1" in note for note in source.notes)


def test_home_folder_and_backslashes_are_found_if_the_name_as_written_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(touch(tmp_path / "home", "a.mp4")))
    touch(tmp_path, "run/b.mp4", "x\\y.mp4", "x/y.mp4", "~/c.mp4")
    text = "path\n~/a.mp4\nrun\\b.mp4\nx\\y.mp4\n~/c.mp4\n"
    expected = {str(tmp_path / path) for path in ("home/a.mp4", "run/b.mp4", "x\\y.mp4", "~/c.mp4")}
    for name, content in (("list.csv", text), ("list.txt", text.removeprefix("path\n"))):
        source = load_source(list_file(tmp_path / name, content))
        assert {str(source.root / path) for path in paths_of(source) if source.root} == expected


MISSING = {
    "path with a space": ("list.txt", b"a.mp4 run\nmy a.mp4 run\n", r"line 2: .*: my; .*quotes"),
    "commas without a header": ("list.txt", b"a.mp4,run\n", r"line 1: .*a\.mp4,run; .*header"),
    "drive of Windows": ("list.csv", b"path\nC:\\v\\a.mp4\n", r"line 2: .*Windows"),
    "Latin-1": ("list.txt", b"\xe9.mp4 run\n", r"line 1: .*UTF-8"),
    "folder": ("list.txt", b"a.mp4 run\nsub run\n", r"line 2: sub is a folder"),
    "huge": ("list.txt", b"x" * 10**6, r"line 1: "),
}


@pytest.mark.parametrize("kind", MISSING)
def test_missing_video_comes_with_its_line_and_the_likely_cause(tmp_path: Path, kind: str) -> None:
    name, content, message = MISSING[kind]
    touch(tmp_path, "a.mp4", "sub/b.mp4")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_source(str(tmp_path / name))
    assert len(str(error.value)) < 500 + len(str(tmp_path))


def test_values_that_are_not_used_are_noted(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    text = 'path,label,lable,split\na.mp4,run,x,train \nb.mp4," run",x,holdout\nc.mp4,,x,\n'
    source = load_source(list_file(tmp_path / "list.csv", text))
    assert [video.split for video in source.videos] == ["train", "holdout", None]
    facts = ["1 of 3 listed videos have no label", "1 of 3 listed videos have no split", "x20run'", "holdout", "lable"]
    assert len(source.notes) == len(facts)
    assert all(fact in note for fact, note in zip(facts, source.notes, strict=True))


def test_video_is_not_read_as_a_list(video_folder: Path) -> None:
    with pytest.raises(ValueError, match="text list"):
        load_source(str(video_folder / "left" / "clip 0.mp4"))


@pytest.mark.parametrize("again", ["a.mp4", "./a.mp4", "sub/../a.mp4", "link.mp4"])
def test_video_listed_twice_is_refused_with_both_lines(tmp_path: Path, again: str) -> None:
    touch(tmp_path, "a.mp4", "sub/b.mp4")
    (tmp_path / "link.mp4").symlink_to("a.mp4")
    with pytest.raises(ValueError, match=rf"line 4: lists {again} more than once, first in line 1 \(1 of 3"):
        load_source(list_file(tmp_path / "list.txt", f"a.mp4 run\n\nsub/b.mp4\n{again} jump\n"))


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


def test_digest_of_the_built_in_set_has_the_version_of_its_videos(tmp_path: Path) -> None:
    builtin = load_source("builtin:moving-digits:9:2")
    assert builtin.version == VERSION
    assert replace(builtin, version="digits-1").digest != builtin.digest
    files = load_source(str(touch(tmp_path, "run/a.mp4")))
    listed = "[('run/a.mp4', 5, 'run', None, None)]"
    assert files.digest == hashlib.sha256(listed.encode()).hexdigest(), "names of runs on files must not change"


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

"""Recorded places are found again: as recorded, below a folder near the record, or in the working folder."""

from pathlib import Path

import pytest

from data.recorded import locate, to_record


def folders(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).mkdir(parents=True)


def test_existing_places_are_recorded_as_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folders(tmp_path, "my videos")
    assert (
        to_record("my videos") == to_record("./my videos/") == to_record("~/my videos") == str(tmp_path / "my videos")
    )
    for other in ("builtin:moving-digits", "someone/model", "hf://datasets/a/b", "unknown", "a\0b"):
        assert to_record(other) == other


def test_relative_places_are_looked_for_near_the_record_before_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders(tmp_path, "p/caches/c", "p/runs/r", "here/caches/c", "here/caches/d")
    monkeypatch.chdir(tmp_path / "here")
    assert locate("caches/c", tmp_path / "p/runs/r") == str(tmp_path / "p/caches/c")
    assert Path(locate("caches/d", tmp_path / "p/runs/r")).resolve() == tmp_path / "here/caches/d"
    for nowhere in ("caches/e", "someone/model", "/gone/away", "", "a\0b"):
        assert locate(nowhere, tmp_path / "p/runs/r") == nowhere


def test_places_of_a_moved_project_are_found_by_the_end_of_their_path(tmp_path: Path) -> None:
    folders(tmp_path, "new/runs/t", "new/caches/c", "new/t", "old/runs/t")
    near = tmp_path / "new/caches/c"
    assert locate(str(tmp_path / "old/runs/t"), near) == str(tmp_path / "old/runs/t")
    (tmp_path / "old/runs/t").rmdir()
    assert locate(str(tmp_path / "old/runs/t"), near) == str(tmp_path / "new/runs/t")


def test_a_place_with_the_same_name_alone_is_taken_only_if_it_fits(tmp_path: Path) -> None:
    folders(tmp_path, "new/caches/videos", "new/videos", "new/caches/c")
    gone, near = str(tmp_path / "old/videos"), tmp_path / "new/caches/c"
    assert locate(gone, near) == gone
    fitting = str(tmp_path / "new/videos")
    assert locate(gone, near, fits=lambda place: place == fitting) == fitting


def test_the_option_of_a_folder_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "project/videos").mkdir(parents=True)
    recorded = to_record("project/videos?group=folder")
    assert recorded == f"{tmp_path}/project/videos?group=folder"
    assert locate(recorded) == recorded
    moved = (tmp_path / "project").rename(tmp_path / "moved")
    found = locate(
        f"{tmp_path}/project/videos?group=folder", moved / "caches", fits=lambda place: place.endswith("?group=folder")
    )
    assert found == f"{moved}/videos?group=folder"

"""Listed names are found in any Unicode form, and what cannot be seen in a name is shown in its error."""

import unicodedata
from pathlib import Path

import pytest

from data.sources import Video, load_source


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"video")


def listed(root: Path, text: str) -> str:
    (root / "list.csv").write_text(text, encoding="utf-8")
    return str(root / "list.csv")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize(
    "written", ["\u00e9/\u1ec7 1.mp4", "e\u0301/e\u0302\u0323 1.mp4", "\u00e9\\e\u0323\u0302 1.mp4"]
)
def test_name_is_found_in_another_unicode_form(tmp_path: Path, form: str, written: str) -> None:
    name = unicodedata.normalize(form, "\u00e9/\u1ec7 1.mp4")
    make(tmp_path, name)
    assert load_source(listed(tmp_path, f"path,label\n{written},0\n")).videos == (Video(name, 5, label="0"),)
    absolute = listed(tmp_path, f'path,label\n"{tmp_path}/{written}",0\n')
    assert load_source(absolute).videos == (Video(name, 5, label="0"),)


def test_name_as_written_comes_before_another_form(tmp_path: Path) -> None:
    make(tmp_path, "\u00e9.mp4", "e\u0301.mp4", "e\u0301/1.mp4", "\u00e9/2.mp4")
    text = "path\n\u00e9.mp4\ne\u0301.mp4\n\u00e9/1.mp4\ne\u0301/2.mp4\n"
    paths = {video.path for video in load_source(listed(tmp_path, text)).videos}
    assert paths == {"\u00e9.mp4", "e\u0301.mp4", "e\u0301/1.mp4", "\u00e9/2.mp4"}


def test_both_forms_of_one_file_are_a_repetition(tmp_path: Path) -> None:
    make(tmp_path, "\u00e9.mp4")
    with pytest.raises(ValueError, match="line 3: lists .* more than once, first in line 2"):
        load_source(listed(tmp_path, "path\n\u00e9.mp4\ne\u0301.mp4\n"))


UNSEEN = {
    "byte order mark": ("\ufeffb.mp4", ["b.mp4"], r"\ufeffb.mp4; there is b.mp4"),
    "zero width space": ("b\u200b.mp4", ["b.mp4"], r"b\u200b.mp4; there is b.mp4"),
    "zero width space in the file": ("b.mp4", ["b\u200b.mp4"], r"b.mp4; there is b\u200b.mp4"),
    "no-break space": ('"b\u00a0c.mp4"', ["b c.mp4"], r"b\xa0c.mp4; there is b c.mp4"),
    "two blanks": ("b c.mp4", ["b  c.mp4"], r"b c.mp4; there is b \x20c.mp4"),
    "capitals": ("sub/B.MP4", ["Sub/b.mp4"], "sub/B.MP4; there is Sub/b.mp4"),
    "two other forms": (
        "\u1ec7.mp4",
        ["e\u0323\u0302.mp4", "\u1eb9\u0302.mp4"],
        r"\u1ec7.mp4; there is e\u0323\u0302.mp4 and \u1eb9\u0302.mp4",
    ),
    "nothing alike": ("c\u200b\u2028.mp4", ["b.mp4"], r"c\u200b\u2028.mp4 (1 of 2"),
}


@pytest.mark.parametrize("kind", UNSEEN)
def test_missing_name_is_shown_with_what_cannot_be_seen(tmp_path: Path, kind: str) -> None:
    written, names, expected = UNSEEN[kind]
    make(tmp_path, "a.mp4", *names)
    with pytest.raises(ValueError) as error:
        load_source(listed(tmp_path, f"path\na.mp4\n{written}\n"))
    assert f"line 3: no such video: {expected}" in str(error.value)


def test_labels_and_groups_that_look_the_same_are_noted(tmp_path: Path) -> None:
    make(tmp_path, "a.mp4", "b.mp4", "\u00e9/1.mp4", "e\u0301/2.mp4")
    notes = load_source(listed(tmp_path, "path,label,group\na.mp4,run,g\nb.mp4,run\u200b,g\u00a0\n")).notes
    assert [r"run\u200b" in notes[0], r"g\xa0" in notes[1], len(notes)] == [True, True, 2]
    (tmp_path / "list.csv").unlink()
    (note,) = load_source(str(tmp_path)).notes
    assert r"e\u0301" in note and r"\xe9" in note

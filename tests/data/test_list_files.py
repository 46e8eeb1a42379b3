"""Rows of list files: fields, line numbers and encodings. What cannot be meant is refused with its line."""

import time
from pathlib import Path

import pytest

from data.list_files import Row, read_list


def rows(tmp_path: Path, content: str | bytes, name: str = "list.txt") -> list[Row]:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return read_list(tmp_path / name).rows


PLAIN = {
    "backslash of Windows": ("run\\a.mp4 run\n", "run\\a.mp4"),
    "escaped blank": ("my\\ a.mp4 run\n", "my a.mp4"),
    "escaped backslash": ("run\\\\a.mp4 run\n", "run\\a.mp4"),
    "backslash in quotes": ('"C:\\my videos\\a.mp4" run\n', "C:\\my videos\\a.mp4"),
    "escaped quote in quotes": ('"a \\"so\\".mp4" run\n', 'a "so".mp4'),
    "quotes inside a word": ("x/'a b'\"'c\".mp4 run\n", "x/a b'c.mp4"),
    "hash inside a word": ("a#1.mp4 run # comment\n", "a#1.mp4"),
    "no-break space": ("a\u00a0b.mp4 run\n", "a\u00a0b.mp4"),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_word_of_a_plain_list_is_read_as_written(tmp_path: Path, kind: str) -> None:
    text, path = PLAIN[kind]
    assert rows(tmp_path, text) == [Row(1, path, "run")]


def test_tabs_separate_fields_that_contain_blanks(tmp_path: Path) -> None:
    text = "my a.mp4\ttwo words\tg 1\nb.mp4\trun # c\n  c.mp4 run g\t# d\n'd\te.mp4'\t''\tg\t\n"
    assert rows(tmp_path, text) == [
        Row(1, "my a.mp4", "two words", "g 1"),
        Row(2, "b.mp4", "run"),
        Row(3, "c.mp4", "run", "g"),
        Row(4, "d\te.mp4", "", "g"),
    ]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_csv_of_any_separator_and_line_end_keeps_line_numbers(tmp_path: Path, delimiter: str, end: str) -> None:
    lines = ["path,label,note", "a.mp4,run,", "", ",,", 'b.mp4,"jump, high",x,,']
    text = end.join(lines).replace(",", delimiter).replace(f"jump{delimiter}", "jump,") + end
    expected = [Row(2, "a.mp4", "run"), Row(5, "b.mp4", "jump, high")]
    for name in ("list.csv", "list.txt"):
        assert rows(tmp_path, text, name) == expected
    assert read_list(tmp_path / "list.csv").other_columns == ("note",)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le with mark", "utf-16-be with mark"])
@pytest.mark.parametrize("text", ["path,label\n\u00e9.mp4,\u4e2d\n", "\n\u00e9.mp4 \u4e2d\r\n"])
def test_unicode_encodings_give_the_same_row(tmp_path: Path, encoding: str, text: str) -> None:
    codec, _, mark = encoding.partition(" with ")
    assert rows(tmp_path, f"{mark and chr(0xFEFF)}{text}".encode(codec)) == [Row(2, "\u00e9.mp4", "\u4e2d")]


@pytest.mark.parametrize("text", ["a.mp4 0 -1\n", "a.mp4\t0\t-1\n"])
def test_csv_name_without_separators_of_csv_is_a_plain_list(tmp_path: Path, text: str) -> None:
    assert rows(tmp_path, text, "train.csv") == [Row(1, "a.mp4", "0", "-1")]


PLAIN_IN_CSV = {
    "comma in the path": ("a,1.mp4 3\nb.mp4 2\n", [Row(1, "a,1.mp4", "3"), Row(2, "b.mp4", "2")]),
    "semicolon in the label": ("a.mp4 x;y -1\n", [Row(1, "a.mp4", "x;y", "-1")]),
}


@pytest.mark.parametrize("kind", PLAIN_IN_CSV)
def test_csv_name_is_a_plain_list_if_it_begins_with_a_file_and_a_blank(tmp_path: Path, kind: str) -> None:
    text, expected = PLAIN_IN_CSV[kind]
    assert rows(tmp_path, text, "train.csv") == expected


@pytest.mark.parametrize("text", ["my a.mp4,run\n", "a.mp4; run\n", "a.mp4 , run\n", "'a.mp4,run\n"])
def test_csv_without_a_header_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"list\.csv: .*column 'path'"):
        rows(tmp_path, text, "list.csv")


@pytest.mark.parametrize("above", ["sep=;\n", '"sep=;"\r\n', "# made by x; y\n\n", "# c\nSEP=;\n# path; label\n"])
@pytest.mark.parametrize("name", ["list.csv", "list.txt"])
def test_separator_line_and_comments_before_a_csv_header_are_passed_over(tmp_path: Path, above: str, name: str) -> None:
    text = f"{above}path;label\na, b.mp4;run\n\nc.mp4;jump\n"
    first = above.count("\n") + 2
    assert rows(tmp_path, text, name) == [Row(first, "a, b.mp4", "run"), Row(first + 2, "c.mp4", "jump")]
    with pytest.raises(ValueError, match=f"line {first + 1}: 1 field"):
        rows(tmp_path, f"{above}path;label\na.mp4;run\nb.mp4\n", name)


def test_csv_header_may_begin_with_a_column_of_numbers(tmp_path: Path) -> None:
    assert rows(tmp_path, "#,path,label\n1,a.mp4,run\n") == [Row(2, "a.mp4", "run")]


def test_blanks_around_separators_of_csv_are_no_part_of_the_fields(tmp_path: Path) -> None:
    text = 'path , label ,split\na.mp4 , run\t, train \n"b c.mp4",jump , test\n'
    expected = [Row(2, "a.mp4", "run", "", "train"), Row(3, "b c.mp4", "jump", "", "test")]
    assert rows(tmp_path, text, "list.csv") == expected


def test_apostrophes_in_fields_between_tabs_are_characters(tmp_path: Path) -> None:
    text = "it's.mp4\trun\nthe dog's.mp4\tit's x\tBob's # c'\n 'd e.mp4'\t\"a 'b'\"\nx\\ y\\'.mp4\trun\n"
    assert rows(tmp_path, text) == [
        Row(1, "it's.mp4", "run"),
        Row(2, "the dog's.mp4", "it's x", "Bob's"),
        Row(3, "d e.mp4", "a 'b'"),
        Row(4, "x y'.mp4", "run"),
    ]


@pytest.mark.parametrize("end", ["\x1a", "\x04\r\n", "\f\n\x1a\n \n"])
@pytest.mark.parametrize("text", ["path,label\na.mp4,run\n", "\na.mp4 run", "\na.mp4\trun\t"])
def test_control_characters_at_the_end_of_a_list_are_left_out(tmp_path: Path, text: str, end: str) -> None:
    assert rows(tmp_path, text + end) == [Row(2, "a.mp4", "run")]


def test_header_of_a_plain_list_is_no_row(tmp_path: Path) -> None:
    assert rows(tmp_path, "Path Label\na.mp4 run\n") == [Row(2, "a.mp4", "run")]


BREAKS = ("\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029")


@pytest.mark.parametrize("mark", BREAKS)
def test_line_break_of_other_programs_is_refused_outside_quotes(tmp_path: Path, mark: str) -> None:
    joined = [
        "a.mp4{}b.mp4",
        "a.mp4 0{}b.mp4 1",
        "a.mp4\t0{}b.mp4\t1",
        "a.mp4 0 # c{}b.mp4 1",
        "it's.mp4\t0{}Bob's.mp4\t1",
    ]
    for line in joined:
        with pytest.raises(ValueError, match=r"line 2: \\[rux]"):
            rows(tmp_path, f"c.mp4 0\n{line.format(mark)}\n")
    if mark != "\r":  # a line end of CSV
        with pytest.raises(ValueError, match=r"line 3: \\[rux]"):
            rows(tmp_path, f"path,label,group\nc.mp4,0,1\na.mp4,0{mark}b.mp4,1\n", "list.csv")
    for text in (f"'a{mark}.mp4' 'x{mark}y'\r\n", f"'a{mark}.mp4'\t\"x{mark}y\"\r\n"):
        assert rows(tmp_path, text) == [Row(1, f"a{mark}.mp4", f"x{mark}y")]
    assert rows(tmp_path, f'path,label\n"a{mark}.mp4","x{mark}""y"\n') == [Row(2, f"a{mark}.mp4", f'x{mark}"y')]


def test_carriage_returns_before_a_line_feed_are_no_part_of_the_line(tmp_path: Path) -> None:
    assert rows(tmp_path, "a.mp4 run\r\r\nb.mp4\trun\r \n") == [Row(1, "a.mp4", "run"), Row(2, "b.mp4", "run")]


REFUSED = {
    "missing field": ("list.csv", "path,label\na.mp4,run\nb.mp4\n", "line 3: 1 field,"),
    "field too many": ("list.csv", "path,label\na.mp4,b,c,d\n", "line 2: 4 fields"),
    "field too many after a field of two lines": (
        "list.csv",
        'path,label\na.mp4,"x\ny"\nb.mp4,y,z\n',
        "line 4: 3 fields",
    ),
    "no path": ("list.csv", "path,label\n,run\n", "line 2: .*path"),
    "no path in a plain list": ("list.txt", "a.mp4\n'' run\n", "line 2: .*path"),
    "column twice": ("list.csv", "path,label,label\na.mp4,x,y\n", "2 columns 'label'"),
    "other header": ("list.csv", "video,label\na.mp4,run\n", "column 'path'.*video,label"),
    "open quote": ("list.txt", "a.mp4 run\nBob's.mp4 run\n", "line 2: .*Bob's"),
    "open quote in CSV": ("list.csv", 'path,label\na.mp4,run\n"b.mp4,run\nc.mp4,run\n', "line 3: "),
    "empty field between tabs": ("list.txt", "a.mp4\t\tg1\n", "line 1: .*''"),
    "blank field between tabs": ("list.txt", "a.mp4\t \tg1\n", "line 1: .*''"),
    "open quote between tabs": ("list.txt", "a.mp4\t'run\n", "line 1: .*'run"),
    "separator without a header": ("list.txt", "sep=;\na.mp4;run\n", "column 'path'"),
    "NUL": ("list.txt", "a.mp4 run\nb\0.mp4 run\n", "line 2: NUL"),
    "UTF-16 without mark": ("list.csv", "path\na.mp4\n".encode("utf-16-le"), "line 1: NUL"),
    "half a character of UTF-16": ("list.csv", b"\xff\xfea", "UTF-16"),
    "million fields": ("list.txt", "x " * 10**6, "line 1: 1000000 fields"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_malformed_line_is_refused_with_its_number(tmp_path: Path, kind: str) -> None:
    name, text, message = REFUSED[kind]
    with pytest.raises(ValueError, match=rf"{name}[:,].*{message}") as error:
        rows(tmp_path, text, name)
    assert len(str(error.value)) < 500 + len(str(tmp_path))


@pytest.mark.soak
def test_time_grows_in_proportion_to_the_lines(tmp_path: Path) -> None:
    def seconds(count: int) -> float:
        text = "".join(f"'a {i}.mp4' run g{i} # \"comment\n" for i in range(count))
        start = time.process_time()
        assert len(rows(tmp_path, text)) == count
        return time.process_time() - start

    few = min(seconds(2000) for _ in range(3))
    assert seconds(20_000) < 40 * few

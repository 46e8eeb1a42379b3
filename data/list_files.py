"""List files of videos: text of a plain list or a CSV file, read into rows. Paths are not looked up here."""

import codecs
import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.text import escaped

COLUMNS = ("path", "label", "group", "split", "start", "end")
_DELIMITERS = ",;\t"
_BINARY_CHECK = 2**16
"""Number of bytes that are searched for NUL before a file is read as a whole: a video may be larger than the memory."""
_MOST_FIELDS = 3
_END_OF_FILE = "\x04\x1a\f\v"
"""Control characters that old programs write at the end of a text (Ctrl-D, Ctrl-Z) or of a page."""
_SEPARATOR_LINE = re.compile(f'"?sep=([{_DELIMITERS}])"?[\r ]*', re.IGNORECASE)
"""First line by which Excel learns the separator."""
_LINE_BREAK = re.compile("[\r\v\f\x1c-\x1e\x85\u2028\u2029]")
"""Characters that end a line in some programs, except the line feed (`str.splitlines`). They belong to a field only in quotes."""
_END_OF_LINE = re.compile("\r[ \t\r]*$")
_FILE_NAME = re.compile(r"\.\w+$")
# A word of a plain list: plain text, backslashes, quoted text, and # inside a word.
_ESCAPED, _INNER_HASH = r"""\\[ \t'"\\#]?""", r"(?<=[^ \t])#"
_QUOTING = rf"""{_ESCAPED}|'[^']*'|"(?:\\.|[^"\\])*"|{_INNER_HASH}"""
_WORD = {
    " \t": re.compile(rf"""(?:[^ \t'"\\#]+|{_QUOTING})+"""),
    # Between tabs, only a field that begins with a quote is quoted: others may have an apostrophe.
    "\t": re.compile(
        rf""" *(?:(?=['"])(?:[^\t'"\\#]+|{_QUOTING})+|(?![ '"])(?:[^\t\\#]+|{_ESCAPED}|{_INNER_HASH})*)"""
    ),
}
_PART = re.compile(r"""'([^']*)'|"((?:\\.|[^"\\])*)"|\\([ \t'"\\#])""")
_ESCAPE = re.compile(r"""\\([ \t'"\\#])""")


@dataclass(frozen=True, slots=True)
class Row:
    """One entry of a list. `line` is the number of its first line, from 1. An empty string means no value."""

    line: int
    path: str
    label: str = ""
    group: str = ""
    split: str = ""
    start: str = ""
    end: str = ""


@dataclass(frozen=True)
class Listing:
    """Rows of a list file, and the names of its columns that are not read."""

    rows: list[Row]
    other_columns: tuple[str, ...]


def read_list(file: Path) -> Listing:
    """Read a plain list (lines `path [label [group]]`) or a CSV file (separated by commas, semicolons or tabs).

    In a plain list, fields are separated by blanks, or by tabs alone in a line in which a tab separates two fields. Quotes
    and # comments are those of a shell; between tabs, a quote inside a field is a character like any other. A backslash
    escapes only blanks, quotes, # and backslashes, so that paths of Windows stay as they are.
    A CSV file has a header with a column `path`. Before it, there may be # comments, and a line such as `sep=;` (Excel).
    Blanks at the end of a field are left out. A file that ends in .csv is a plain list if its first line has no separator of
    CSV, or begins with the name of a file and a blank.
    Characters that end a line in other programs, such as U+2028, are part of a field only in quotes. (They are accepted in a
    path of a CSV file, because it would not be found if it was wrong.)
    Text is UTF-8 (undecodable bytes are kept) or UTF-16 with a byte order mark.

    Raises:
        ValueError: with the line number, if the file is not text, or a line does not have the fields it must have.
    """
    text = _text(file)
    above, first_line, declared = _first_line(text)
    delimiter = _delimiter(first_line, declared or _DELIMITERS)
    if delimiter is None and (declared or (file.suffix.lower() == ".csv" and not _is_plain(first_line))):
        columns = f"{', '.join(COLUMNS[1:-1])} and {COLUMNS[-1]}"
        raise ValueError(
            f"{file}: its header must have a column 'path', and may have {columns}; got {shown(first_line)}"
        )
    return Listing(list(_plain_rows(file, text)), ()) if delimiter is None else _csv(file, text, delimiter, above)


def shown(text: str) -> str:
    """Return a part of a list for a message: without characters that cannot be seen, and at most 200 characters."""
    text = escaped(text[:201])
    return text if len(text) <= 200 else f"{text[:200]}…"


def _text(file: Path) -> str:
    """Return the content of a list file."""
    try:
        with open(file, "rb") as stream:
            content = stream.read(_BINARY_CHECK)
            is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            if is_utf16 or b"\0" not in content:
                content += stream.read()
        text = content.decode("utf-16") if is_utf16 else content.decode("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: begins like UTF-16, but is not: {error.reason}; save it as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{file}, line {line}: NUL byte: is neither a folder nor a text list of videos (UTF-8)")
    kept = text.rstrip(_END_OF_FILE + "\r\n\t ")
    end = next((i for i in range(len(kept), len(text)) if text[i] in _END_OF_FILE), len(text))
    return text[:end]


def _lines(text: str) -> list[str]:
    # Only old files separate lines with \r alone. In others, \r may be part of a name.
    return text.split("\n") if "\n" in text else text.split("\r")


def _first_line(text: str) -> tuple[int, str, str | None]:
    """Return the number of lines above the first row or header, that line, and the separator declared by a line `sep=`."""
    declared = None
    for number, line in enumerate(_lines(text)):
        text_of_line = line.strip()
        # A header may begin with a column #, but not with a sentence.
        is_comment = text_of_line[:2] == "# " or (text_of_line[:1] == "#" and _delimiter(line, _DELIMITERS) is None)
        if declared is None and (match := _SEPARATOR_LINE.fullmatch(line)):
            declared = match[1]
        elif text_of_line and not is_comment:
            return number, text_of_line, declared
    return 0, "", declared


def _delimiter(header: str, possible: str) -> str | None:
    """Return the separator with which the first line is a header with a column `path`; None if there is none."""
    return next((mark for mark in possible if "path" in _names(header, mark)), None)


def _is_plain(line: str) -> bool:
    """Return whether the first line of a file that ends in .csv, which is no header, is a row of a plain list."""
    if not any(mark in line for mark in ",;"):
        return True
    try:
        path, *others = _fields(line)
    except ValueError:
        return False
    return bool(others and _FILE_NAME.search(path)) and not any(field[:1] in ("", *",;") for field in others)


def _names(header: str, delimiter: str) -> list[str]:
    try:
        (names,) = csv.reader([header], delimiter=delimiter, skipinitialspace=True)
    except (csv.Error, ValueError):
        return []
    return [name.strip().lower() for name in names]


def _csv(file: Path, text: str, delimiter: str, above: int) -> Listing:
    records = _records(file, text, delimiter, above)
    _, names, _ = next(records)
    names = [name.strip().lower() for name in names]
    for name in COLUMNS:
        if names.count(name) > 1:
            raise ValueError(f"{file}: its header has {names.count(name)} columns {name!r}, expected one")
    rows = []
    for line, fields, raw in records:
        # Spreadsheets add empty fields at the end of rows.
        if len(fields) < len(names) or any(fields[len(names) :]):
            count = f"{len(fields)} field{'s' * (len(fields) != 1)}"
            raise ValueError(f"{file}, line {line}: {count}, but the header has {len(names)} columns")
        try:
            _check_line_breaks(names, fields, raw)
        except ValueError as error:
            raise ValueError(f"{file}, line {line}: {error}") from None
        values = dict(zip(names, fields, strict=False))
        # The reader leaves out blanks after a separator. In front of one, they cannot be seen either.
        row = Row(line, **{name: values.get(name, "").rstrip(" \t") for name in COLUMNS})
        if not row.path:
            raise ValueError(f"{file}, line {line}: the path is empty")
        rows.append(row)
    return Listing(rows, tuple(name for name in names if name and name not in COLUMNS))


def _records(file: Path, text: str, delimiter: str, above: int) -> Iterator[tuple[int, list[str], str]]:
    """Yield the number of the first line, the fields and the text of each row that is not empty, below the lines `above`."""
    raw_lines: list[str] = []

    def read_lines() -> Iterator[str]:
        for raw_line in io.StringIO("\n".join(_lines(text)[above:]), newline=""):
            raw_lines.append(raw_line)
            yield raw_line

    reader = csv.reader(read_lines(), delimiter=delimiter, skipinitialspace=True, strict=True)
    line = above + 1
    try:
        for fields in reader:
            if any(fields):
                yield line, fields, "".join(raw_lines)
            raw_lines.clear()
            line = above + reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{file}, line {line}: {error}") from None


def _check_line_breaks(names: Sequence[str], fields: Sequence[str], raw: str) -> None:
    """Refuse a character that ends a line in other programs outside quotes, except in a path.

    Raises:
        ValueError: with the character and the field.
    """
    for name, field in zip(names, fields, strict=False):
        if name != "path" and _LINE_BREAK.search(field) and '"{}"'.format(field.replace('"', '""')) not in raw:
            _check_line_break(field)


def _plain_rows(file: Path, text: str) -> Iterator[Row]:
    is_first = True
    for number, line in enumerate(_lines(text), start=1):
        try:
            fields = _fields(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from None
        if len(fields) > _MOST_FIELDS:
            expected = "expected 'path [label [group]]'; quote a path with spaces"
            raise ValueError(f"{file}, line {number}: {len(fields)} fields, {expected}")
        if not fields:
            continue
        if not fields[0]:
            raise ValueError(f"{file}, line {number}: the path is empty")
        is_header = is_first and len(fields) > 1 and [field.lower() for field in fields] == list(COLUMNS[: len(fields)])
        is_first = False
        if not is_header:
            yield Row(number, *fields)


def _fields(line: str) -> list[str]:
    """Split a line of a plain list. Raises ValueError for an open quote, a line break, or an empty field between tabs."""
    line = _END_OF_LINE.sub("", line)
    if "\t" in line:
        fields = _words(line.strip(" "), "\t")
        if len(fields) > 1:
            return fields
    return _words(line, " \t")


def _check_line_break(text: str) -> None:
    """Raise ValueError if a part of a line outside quotes contains a character that ends a line in other programs."""
    if match := _LINE_BREAK.search(text):
        raise ValueError(
            f"{shown(match[0])} in {shown(text)} ends a line in some programs; replace it by a line feed, or quote the name"
        )


def _words(line: str, blanks: str) -> list[str]:
    words: list[str] = []
    end = 0
    while True:
        start = _skip(blanks, line, end)
        first = _skip(" ", line, start)
        if first == len(line) or line[first] == "#":
            _check_line_break(line[first:])
            return words
        match = _WORD[blanks].match(line, start)
        if match is None or line[match.end() : match.end() + 1] not in ("", "#", *blanks):
            raise ValueError(f"no closing quotation: {shown(line[start:])}")
        raw = match.group().strip(" ")
        if not raw or (words and " " not in blanks and line.count("\t", end, start) > 1):
            raise ValueError("an empty field between two tabs; write '' for a missing label")
        is_literal = " " not in blanks and raw[0] not in "'\""
        _check_line_break(raw if is_literal else _PART.sub("", raw))
        words.append(_ESCAPE.sub(r"\1", raw) if is_literal else _PART.sub(_unquoted, raw))
        end = match.end()


def _skip(blanks: str, line: str, start: int) -> int:
    """Return the position of the first character from `start` on that is not blank."""
    while start < len(line) and line[start] in blanks:
        start += 1
    return start


def _unquoted(part: re.Match[str]) -> str:
    single, double, escaped = part.groups()
    if double is not None:
        return re.sub(r'\\(["\\])', r"\1", double)
    return escaped if single is None else single

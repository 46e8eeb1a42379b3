"""Text for users: tables, sizes, error messages in one line, printable names, names that look alike."""

import os
import re
import sys
import unicodedata

_CONTROLS = {"Cc", "Cs", "Zl", "Zp"}
"""Unicode categories of control characters (escape sequences start with one), surrogates, and line and paragraph separators."""
_INVISIBLE = {"Cc", "Cf", "Cn", "Cs", "Zl", "Zp"}
"""Unicode categories of characters that show nothing, or a replacement."""
_DIRECTIONS = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}
"""Bidirectional classes of characters that reorder the text after them (Unicode Standard Annex 9, section 2)."""
_OTHER_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
"""Characters that show nothing although Unicode counts them as letters or marks: fillers, joiners, variation selectors."""
_EDGE_OR_DOUBLE_BLANK = re.compile("^ | $|(?<= ) ")


def one_line(message: object, max_length: int | None = None) -> str:
    """Return an error or a text in one printable line of at most `max_length` characters.

    All whitespace becomes single spaces.
    """
    return printable(" ".join(str(message).split()))[:max_length]


def table(head: list[str] | None, rows: list[list[str]]) -> str:
    """Format rows as aligned text columns under the titles `head`. Columns of numbers are aligned to the right."""
    lines = [[printable(cell) for cell in row] for row in rows]
    if head:
        lines.insert(0, [printable(title) for title in head])
    columns = list(zip(*lines, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    numeric = [head is not None and all(cell[:1].isdigit() for cell in column[1:]) for column in columns]
    texts = []
    for line in lines:
        cells = zip(line, widths, numeric, strict=True)
        texts.append("  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells))
    return "\n".join(text.rstrip() for text in texts)


def size(byte_count: float) -> str:
    """Format a number of bytes with a binary unit, such as 1.5 MiB."""
    if byte_count < 1024:
        return f"{byte_count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        byte_count /= 1024
        if byte_count < 1024:
            return f"{byte_count:.1f} {unit}"
    return f"{byte_count / 1024:.1f} TiB"


def printable(text: str) -> str:
    """Replace characters that break table rows or control the terminal. File names and messages may contain such characters.

    Letters, marks and spaces of all scripts stay as they are, including the joiners of Persian text and of emoji.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join("\N{REPLACEMENT CHARACTER}" if _is_control(c) else c for c in text)


def printable_lines(text: str) -> str:
    """Apply `printable` to each line of a text."""
    return "\n".join(map(printable, text.split("\n")))


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in _CONTROLS or unicodedata.bidirectional(character) in _DIRECTIONS


def escaped(text: str) -> str:
    """Return a name in which each character that cannot be seen is an escape: \\u200b, \\xa0, \\t; \\xff for an undecodable byte.

    Blanks are escaped at both ends and after another blank.
    """
    if not (text.isascii() and text.isprintable()):
        text = "".join(_escape(c) if _is_invisible(c) else c for c in text)
    return _EDGE_OR_DOUBLE_BLANK.sub(r"\\x20", text)


def appearance(text: str) -> str:
    """Return the same text for names that look the same: they differ in Unicode form, blanks or characters that show nothing."""
    seen = ((" " if c.isspace() else c) for c in text if c.isspace() or not _is_invisible(c))
    return unicodedata.normalize("NFC", re.sub(" +", " ", "".join(seen)).strip())


def told_apart(*names: str) -> list[str]:
    """Return names for a message in which no two of them look the same."""
    shown = [escaped(name) for name in names]
    if len({unicodedata.normalize("NFC", name) for name in shown}) == len(set(names)):
        return shown
    return [name if name.isascii() else "".join(c if c.isascii() else _escape(c) for c in name) for name in shown]


def _is_invisible(character: str) -> bool:
    category = unicodedata.category(character)
    return category in _INVISIBLE or (category == "Zs" and character != " ") or bool(_OTHER_INVISIBLE.match(character))


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def print_text(text: str) -> None:
    """Print a text on stdout. Names in it may have characters that the terminal's encoding lacks, and `| head` may close it."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        print(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Without this line, Python reports the error again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

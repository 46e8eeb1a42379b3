"""Text for users: tables, sizes, error messages in one line, printable names."""

import unicodedata

_CONTROLS = {"Cc", "Cs", "Zl", "Zp"}
"""Unicode categories of control characters (escape sequences start with one), surrogates, and line and paragraph separators."""
_DIRECTIONS = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}
"""Bidirectional classes of characters that reorder the text after them (Unicode Standard Annex 9, section 2)."""


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

"""Text for people: tables, sizes, printable names."""


def table(head: list[str] | None, rows: list[list[str]]) -> str:
    """Columns of text; numbers to the right."""
    lines = [[printable(cell) for cell in row] for row in ([head] if head else []) + rows]
    widths = [max(len(line[c]) for line in lines) for c in range(len(lines[0]))]
    right = [head is not None and all(line[c][:1].isdigit() for line in lines[1:]) for c in range(len(widths))]
    texts = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True))
        for line in lines
    ]
    return "\n".join(text.rstrip() for text in texts)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def printable(text: str) -> str:
    """Names hold anything; a line of a table must not."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)

"""Output for people on stderr: progress bars, messages, boxes, one-line errors."""

from __future__ import annotations

import os
import sys
import textwrap
from typing import TYPE_CHECKING

from tqdm import tqdm

from data.text import one_line, printable, printable_lines

if TYPE_CHECKING:
    from accelerate import Accelerator

    from data.sources import Source


def fail(name: str, message: str) -> int:
    """Print an error as one line on stderr; return 2, the exit code for a user's mistake."""
    print(f"{printable(name)}: error: {one_line(message)}", file=sys.stderr)
    return 2


def progress(accelerator: Accelerator, total: int, title: str, start: int = 0) -> tqdm:
    """Create a progress bar on stderr, on the main process only. If stderr is not a terminal, print a line every 10 s."""
    terminal = sys.stderr.isatty()
    return tqdm(
        file=sys.stderr if terminal else _LineWriter(),
        total=total,
        initial=start,
        desc=printable(title),
        mininterval=0.2 if terminal else 10,
        ascii=not terminal,
        dynamic_ncols=terminal,
        disable=not accelerator.is_main_process,
    )


class _LineWriter:
    """File object for a stderr that is not a terminal: each redraw of a progress bar becomes a line."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.strip("\r\n") + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def say(accelerator: Accelerator, text: str) -> None:
    """Print a text on stderr, on the main process only, without breaking a progress bar."""
    if accelerator.is_main_process:
        tqdm.write(printable_lines(text), file=sys.stderr)


def say_newest(flag: str, given: object, taken: object) -> None:
    """Print which cache or run is taken if none is given by its flag. The first process prints it, before it has started."""
    if given is None and os.environ.get("RANK", "0") == "0":
        tqdm.write(printable(f"no {flag} given: taking the newest, {taken}"), file=sys.stderr)


def say_notes(accelerator: Accelerator, videos: str, source: Source) -> None:
    """Print the notes on the reading of a source, which was given as `videos`."""
    for note in source.notes:
        say(accelerator, f"{videos}: {note}")


def boxed(text: str) -> str:
    """Return a warning in a box, wrapped to 100 columns."""
    lines = textwrap.wrap(text, 100)
    width = max(map(len, lines))
    edge = f"+{'-' * (width + 2)}+"
    return "\n".join([edge, *(f"| {line:<{width}} |" for line in lines), edge])

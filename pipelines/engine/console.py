"""What a person sees on stderr: progress bars, messages, one line for an error."""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from accelerate import Accelerator


def fail(name: str, message: str) -> int:
    """Print one line to stderr; returns the exit code of a user's mistake."""
    print(f"{name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


def progress(accelerator: Accelerator, total: int, what: str, start: int = 0) -> tqdm:
    """A progress bar on stderr, of the main process only; a line every ten seconds where stderr is no terminal."""
    lines = not sys.stderr.isatty()
    return tqdm(
        file=_Lines() if lines else sys.stderr,
        total=total,
        initial=start,
        desc=what,
        mininterval=10 if lines else 0.2,
        ascii=lines,
        dynamic_ncols=not lines,
        disable=not accelerator.is_main_process,
    )


class _Lines:
    """stderr for logs: what a bar would draw over itself becomes lines."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.strip("\r\n") + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def say(accelerator: Accelerator, text: str) -> None:
    """A line for people, on stderr."""
    if accelerator.is_main_process:
        tqdm.write(text, file=sys.stderr)


def boxed(text: str) -> str:
    """The text in a box, for what should not be overlooked."""
    lines = textwrap.wrap(text, 100)
    width = max(map(len, lines))
    edge = f"+{'-' * (width + 2)}+"
    return "\n".join([edge, *(f"| {line:<{width}} |" for line in lines), edge])

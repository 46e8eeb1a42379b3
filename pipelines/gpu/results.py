"""Files that a GPU check writes: gpu.json and gpu.md, both rewritten after every result.

Only the standard library is imported, so that a missing package does not stop the check.
"""

import json
import os
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipelines.benchmarks import Row

HEADINGS = ("what", "result", "compared with", "ratio", "reach")


@dataclass
class PartResult:
    """Result of one part.

    Attributes:
        status: "ok", or why the part did not finish.
        seconds: Wall time of the part.
    """

    number: int
    title: str
    status: str = "running"
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)


@dataclass
class Results:
    """Results of a GPU check, kept on disk in `folder`; a check that is killed leaves the results so far.

    Attributes:
        about: Facts about the machine and the check, by name.
    """

    folder: Path
    about: dict[str, Any]
    parts: list[PartResult] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def write(self) -> None:
        """Replace both files. Threads may call this at the same time."""
        with self._lock:
            self.folder.mkdir(parents=True, exist_ok=True)
            document = {**self.about, "parts": [asdict(part) for part in self.parts]}
            _replace(self.folder / "gpu.json", json.dumps(document, indent=1) + "\n")
            _replace(self.folder / "gpu.md", self._markdown())

    def _markdown(self) -> str:
        lines = [f"{name}: {value}  " for name, value in self.about.items()]
        for part in self.parts:
            lines += ["", f"**{part.number}. {part.title}** ({part.status}, {part.seconds:.0f} s)"]
            if part.rows:
                lines += ["", _table_line(HEADINGS), _table_line(["---"] * len(HEADINGS))]
                lines += [_table_line(row.texts()) for row in part.rows]
        return "\n".join(lines) + "\n"


def _table_line(cells: "list[str] | tuple[str, ...]") -> str:
    return f"| {' | '.join(' '.join(cell.split()).replace('|', '/') for cell in cells)} |"


def _replace(path: Path, text: str) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)

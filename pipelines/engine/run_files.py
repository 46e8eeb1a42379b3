"""Reading of run folders, also of those that somebody else has made."""

import math
from pathlib import Path
from typing import Any

from data.cache.storage import is_address, json_object
from data.recorded import locate
from data.schema import LARGEST
from data.text import one_line
from pipelines.engine.console import say_newest

RUNS = Path("runs")


def summary_of(folder: Path) -> dict[str, Any]:
    """Return the summary of a finished run."""
    return read_json(folder / "summary.json")


def metrics_of(folder: Path) -> list[dict[str, float]]:
    """Return all log lines of a run, except an incomplete last line, which a killed process may leave.

    Raises:
        ValueError: if a line is not JSON, has no step, or holds anything but numbers, of which the finite ones are at most
            `data.schema.LARGEST`.
    """
    file = folder / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    logged = [json_object(line, str(file)) for line in lines if line.endswith(b"\n")]
    if not all(type(line.get("step")) is int and all(map(_is_metric, line.values())) for line in logged):
        problem = "a line has no step, or holds something else than numbers up to"
        raise ValueError(f"{file}: cannot be read: {problem} {LARGEST:g}")
    return logged


def _is_metric(value: Any) -> bool:
    # A run logs a loss that is not finite before it stops.
    return value is None or (type(value) in (int, float) and not LARGEST < abs(value) < math.inf)


def environment_of(folder: Path) -> dict[str, Any]:
    """Return versions, device and command line of the last start of a run."""
    return read_json(folder / "environment.json")


def cache_of(folder: Path) -> str:
    """Return the folder or address of the cache that a finished run has recorded, from any working folder."""
    recorded = str(summary_of(folder).get("cache"))
    if is_address(recorded):
        return recorded
    # Runs of earlier versions have not recorded their working folder.
    started_in = environment_of(folder).get("folder")
    return locate(recorded, folder, *([started_in] if isinstance(started_in, str) else []))


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a run folder. Raises ValueError if the file contains anything else."""
    return json_object(file.read_bytes(), str(file))


def find_run(folder: Path | None, pipeline: str, flag: str = "--run") -> Path:
    """Return the run folder that a flag gives, or the newest finished run of a command.

    Raises:
        ValueError: if the folder is not a finished run of the command, or there is no finished run.
    """
    if folder is not None:
        if not (folder / "environment.json").exists():
            raise ValueError(f"{flag} {folder}: not a run folder, it has no environment.json")
        actual = environment_of(folder).get("pipeline")
        if actual != pipeline:
            raise ValueError(f"{flag} {folder}: must be a run of {pipeline}, got a run of {actual}")
        if not (folder / "summary.json").exists():
            raise ValueError(f"{flag} {folder}: not finished; start its command again to resume the run")
        return folder
    summaries, unreadable = [], ""
    for file in RUNS.glob("*/summary.json"):
        # A folder of something else, or a damaged run, must not prevent finding others.
        try:
            if environment_of(file.parent).get("pipeline") == pipeline:
                summaries.append(file)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            unreadable = f" ({one_line(error, 200)})"
    if not summaries:
        raise ValueError(
            f"no finished run of {pipeline} in {RUNS}/{unreadable}; "
            f"start pipelines/{pipeline}.py, or name a run folder with {flag}"
        )
    newest = max(summaries, key=lambda file: file.stat().st_mtime).parent
    say_newest(flag, folder, newest)
    return newest

"""Check this project on an NVIDIA GPU: nine parts, each in a process of its own and with a time limit of its own.

`make gpu` starts it; docs/gpu.md explains it. Only the standard library is imported here, so that a missing package makes one
part fail and not all of them.
"""

import argparse
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pipelines.benchmarks import Row
from pipelines.engine.run_lock import lock
from pipelines.engine.signals import Stopped, StopSignals, child_environment
from pipelines.gpu.results import PartResult, Results

ROOT = Path(__file__).parent.parent.parent
SECONDS = 540
"""Time limit of all parts together."""
DRY_FACTOR = 5
"""Factor of all time limits in a dry run: a few busy cores are slower than a GPU machine."""
USAGE_ERROR = 2
"""Exit code of a part for a user's mistake, such as a machine without a GPU. It ends the check."""


@dataclass(frozen=True)
class Part:
    """One part: the module that measures it, its title and its time limit in seconds."""

    module: str
    title: str
    seconds: int


PARTS = {
    1: Part("pipelines.gpu.versions", "Versions, and what xformers can run", 40),
    2: Part("pipelines.gpu.kernel_tests", "Attention kernels against the reference (pytest -m gpu)", 70),
    3: Part("pipelines.gpu.kernels", "Times of the attention kernels, ViT-B", 40),
    4: Part("pipelines.gpu.training_speed", "Training step of ViT-B", 140),
    5: Part("pipelines.gpu.from_disk", "Training from disk", 50),
    6: Part("pipelines.gpu.head", "Chunks of the cross-entropy of a large vocabulary", 20),
    7: Part("pipelines.gpu.resume", "DDP and FSDP: kill, resume, equal losses", 60),
    8: Part("pipelines.gpu.tokenizer", "Tokenizer: training, encoding, decoding of videos", 105),
    9: Part("pipelines.gpu.real_run", "A small run from videos to probe", SECONDS),
}
"""The parts, most informative first. Part 9 uses the time that is left."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen parts.

    Returns:
        0 if all of them finished, 1 if one did not, 2 for a user's mistake, 130 after Ctrl-C, 143 after SIGTERM, 138 after
        SIGUSR1.
    """
    options = _parse(arguments)
    results = Results(options.out, _about(options))
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        held = lock(options.out)
    except ValueError as error:
        return _fail(str(error), USAGE_ERROR)
    except OSError as error:
        return _fail(f"--out {options.out}: {error}", USAGE_ERROR)
    try:
        with held, StopSignals(lambda stop: _fail(str(stop), stop.exit_code)):
            return _run_all(options, results)
    except (KeyboardInterrupt, Stopped) as stop:
        how, code = (str(stop), stop.exit_code) if isinstance(stop, Stopped) else ("interrupted", 130)
        for part in results.parts[-1:]:
            part.status = how
        results.write()
        return _fail(f"{how}; the results so far are in {options.out}", code)
    except OSError as error:
        return _fail(f"--out {options.out}: {error}", USAGE_ERROR)


def _run_all(options: argparse.Namespace, results: Results) -> int:
    results.write()
    factor = DRY_FACTOR if options.dry else 1
    end = time.monotonic() + factor * options.seconds
    log_file = options.out / "gpu.log"
    # Parts share the videos and caches that they make.
    with tempfile.TemporaryDirectory(prefix="arvideo-gpu-") as work, open(log_file, "w", encoding="utf-8") as log:
        for number in options.parts:
            part, left = PARTS[number], end - time.monotonic()
            result = PartResult(number, part.title)
            results.parts.append(result)
            _say(f"{number}. {part.title}")
            code = _run(part, result, results, min(factor * part.seconds, left), Path(work), options, log)
            _say(f"   {result.status}, {result.seconds:.0f} s")
            if code == USAGE_ERROR:
                return _fail(result.status, USAGE_ERROR)
    _say(f"results: {options.out / 'gpu.md'}, {options.out / 'gpu.json'}; output of the parts: {log_file}")
    return 0 if all(result.status == "ok" for result in results.parts) else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    description = "Check this project on an NVIDIA GPU, in at most nine minutes."
    parser = argparse.ArgumentParser("gpu", description=description, allow_abbrev=False)
    parser.add_argument(
        "--parts", type=_part_numbers, default=list(PARTS), help="numbers of parts, such as 1,2,4; by default all"
    )
    parser.add_argument("--dry", action="store_true", help="run the same code on the CPU with small models")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of gpu.json, gpu.md and gpu.log")
    parser.add_argument("--videos", type=Path, help="folder of videos, one sub-folder per class; by default generated")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit of all parts together")
    options = parser.parse_args(arguments)
    if options.videos is not None and not options.videos.is_dir():
        parser.error(f"--videos {options.videos} is not a folder")
    if not 0 < options.seconds < math.inf:
        parser.error(f"--seconds must be finite and above 0, got {options.seconds}")
    return options


def _part_numbers(text: str) -> list[int]:
    numbers = [int(word) if word.strip().isdigit() else word for word in text.split(",")]
    if wrong := [number for number in numbers if number not in PARTS]:
        raise argparse.ArgumentTypeError(f"no part {wrong[0]!r}; the parts are 1 to {len(PARTS)}")
    return [int(number) for number in numbers]


def _about(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "device": "CPU, dry run" if options.dry else _gpu_name(),
        "host": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "commit": _output("git", "rev-parse", "--short", "HEAD") or "unknown",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def _gpu_name() -> str:
    return _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader") or "nvidia-smi not found"


def _output(*command: str) -> str:
    """Return the first line that a command prints, or an empty text if it does not run."""
    if not shutil.which(command[0]):
        return ""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip().partition("\n")[0]


def _run(
    part: Part, result: PartResult, results: Results, seconds: float, work: Path, options: argparse.Namespace, log: Any
) -> int:
    """Run a part in a new process, record its rows as they come, and stop it at its time limit; return its exit code."""
    if seconds < 1:
        result.status = "not run: no time left"
        results.write()
        return 1
    command = [sys.executable, "-m", part.module, "--end", str(time.monotonic() + seconds), "--work", str(work)]
    command += ["--dry"] * options.dry + (["--videos", str(options.videos.resolve())] if options.videos else [])
    began = time.monotonic()
    # A session of its own: its process group holds everything that the part starts.
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    last_line = [""]

    def add_row(line: str) -> None:
        result.rows.append(Row(**json.loads(line)))
        result.seconds = time.monotonic() - began
        results.write()
        _say(f"   {'  '.join(cell for cell in result.rows[-1].texts() if cell)}")

    def add_log(line: str) -> None:
        log.write(line)
        log.flush()
        last_line[0] = line.strip() or last_line[0]

    readers = [_Reader(process.stdout, add_row), _Reader(process.stderr, add_log)]
    code: int | None = None
    with suppress(subprocess.TimeoutExpired):
        try:
            code = process.wait(timeout=seconds)
        finally:
            _kill_group(process)
    for reader in readers:
        reader.join(timeout=10)
        if reader.error is not None:
            raise reader.error
    if code is None:
        result.status = f"stopped at its time limit of {seconds:.0f} s"
    elif code == USAGE_ERROR:
        result.status = last_line[0]
    else:
        result.status = "ok" if code == 0 else f"failed: {last_line[0][:500]}"
    result.seconds = time.monotonic() - began
    results.write()
    return 1 if code is None else code


class _Reader(threading.Thread):
    """Thread that reads lines to the end of a stream, since a part that cannot write would hang.

    Attributes:
        error: Error in the use of a line, after which further lines are not used.
    """

    def __init__(self, stream: Any, use: Callable[[str], None]) -> None:
        super().__init__(daemon=True)
        self._stream, self._use = stream, use
        self.error: OSError | TypeError | ValueError | None = None
        self.start()

    def run(self) -> None:
        for line in self._stream:
            if self.error is None:
                try:
                    self._use(line)
                except (OSError, TypeError, ValueError) as error:
                    self.error = error


def _kill_group(process: subprocess.Popen) -> None:
    """Kill what is left of a part and of the processes that it started, also those with a process group of their own."""
    children = []
    # Launchers put their workers into groups of their own. Without psutil only the group of the part is killed.
    with suppress(ImportError):
        import psutil

        with suppress(psutil.Error):
            children = psutil.Process(process.pid).children(recursive=True)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
    process.wait()


def _fail(message: str, code: int) -> int:
    _say(f"gpu: error: {message}")
    return code


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Part 1: versions, and what xformers can run before and after our workaround for its CUDA runtime."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from pipelines.benchmarks import Row
from pipelines.engine.environment import checks
from pipelines.gpu.part import Setting, attempt, run


def measure(setting: Setting) -> Iterator[Row]:
    """Yield the xformers operators that are available, then one row per fact that `python -m pipelines.doctor` reports."""
    for what, module in (
        ("xformers.info", "xformers.info"),
        ("xformers.info after our import", "pipelines.gpu.xformers_info"),
    ):
        yield from attempt(what, partial(_operators, what, module, setting))
    for check in checks():
        yield Row(check.name, "", check.state)


def _operators(what: str, module: str, setting: Setting) -> Iterator[Row]:
    """Yield one row with the attention operators that the output of xformers.info lists as available."""
    limit = max(1.0, min(20.0, setting.left() - 3))
    done = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True, timeout=limit)
    pairs = [line.split(":", 1) for line in done.stdout.splitlines() if line.startswith("memory_efficient_attention")]
    names = [name.removeprefix("memory_efficient_attention.") for name, state in pairs if state.strip() == "available"]
    last_line = (done.stderr.strip().splitlines() or ["no output"])[-1]
    yield Row(f"{what}: available operators", "", ", ".join(names) or (f"none of {len(pairs)}" if pairs else last_line))


if __name__ == "__main__":
    run(measure)

"""Run this project's commands from a part of the GPU check."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.engine.signals import child_environment
from pipelines.gpu.part import Setting

ROOT = Path(__file__).parent.parent.parent


def start(setting: Setting, command: str, *flags: object, launch: Sequence[str] = ()) -> subprocess.Popen:
    """Start a command of pipelines/ in the shared folder, with a launcher such as ["-m", "torch.distributed.run", ...]."""
    words = [sys.executable, *launch, ROOT / "pipelines" / f"{command}.py", *flags]
    # A folder of wheels may be on PYTHONPATH; the repository itself need not be installed.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**child_environment(), "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen(
        [str(word) for word in words], cwd=setting.work, env=environment, stdout=subprocess.PIPE, text=True
    )


def summary(process: subprocess.Popen, setting: Setting) -> dict[str, Any]:
    """Wait for a command and return its summary, the last line of its stdout.

    Raises:
        RuntimeError: if the command fails or takes longer than the part may.
    """
    try:
        out, _ = process.communicate(timeout=max(1.0, setting.left() - 3))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise RuntimeError(f"{_name(process)} was stopped, because the time of the part is over") from None
    if process.returncode:
        raise RuntimeError(f"{_name(process)} ended with exit code {process.returncode}; see gpu.log")
    return json.loads(out.strip().splitlines()[-1])


def _name(process: subprocess.Popen) -> str:
    return next(Path(str(word)).stem for word in process.args if str(word).endswith(".py"))  # type: ignore[union-attr]

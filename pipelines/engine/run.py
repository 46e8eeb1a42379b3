"""A run: its folder, what it was started with, what it measured, what it says at the end.

runs/<pipeline>-<hash of the configuration>/
  config.yaml        everything that decides the result; a valid --config
  environment.json   versions, device, command
  choices.json       what the settings leave open: key of the newest cache, precision and attention for this hardware
  metrics.jsonl      one line per logged step
  checkpoints/       pipelines/checkpoints.py
  model/             from_pretrained
  samples/           pictures
  summary.json       the last line of stdout again; with it the run is finished
"""

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from data.files import remove_left_overs, write_bytes, write_json
from pipelines.engine.config import load_settings, read_settings
from pipelines.engine.device import device_name

RUNS = Path("runs")
FREE = frozenset({"out", "workers", "tracker", "trust", "plan"})
"""Settings that may differ when a run is continued: they do not change its numbers."""


class Run:
    """The folder of one run. Opening the folder of an earlier run with the same configuration continues it.

    Raises:
        ValueError: if the folder holds a run of another configuration.
    """

    def __init__(self, pipeline: str, config: Any, settings: str, *, about: str = "", parent: Path = RUNS) -> None:
        """`about` is what the configuration does not say but the result depends on: the cache's key, the list of videos."""
        self.pipeline = pipeline
        chosen = {k: v for k, v in load_settings(settings).items() if k not in FREE}
        identity = hashlib.sha256(json.dumps([pipeline, about, chosen], sort_keys=True).encode()).hexdigest()[:8]
        self.folder: Path = config.out or parent / f"{pipeline}-{identity}"
        self._settings, self._about = settings, about
        self._choices = self.folder / "choices.json"
        self._metrics = self.folder / "metrics.jsonl"

    @property
    def finished(self) -> bool:
        return (self.folder / "summary.json").exists()

    def begin(self, accelerator: Accelerator) -> None:
        """Make the folder and write down what is started; of a finished run nothing is changed."""
        if (self.folder / "config.yaml").exists():
            self._check_other(read_settings(self.folder / "config.yaml"))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process and not self.finished:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_left_overs(self.folder)
            for left_over in self.folder.glob("model/.tmp*"):  # so safetensors names what it is writing
                left_over.unlink(missing_ok=True)
            write_bytes(self.folder / "config.yaml", self._settings.encode(errors="surrogateescape"))
            write_json(self.folder / "environment.json", _environment(self.pipeline, accelerator))
        self.choose(accelerator, "about", lambda: self._about)

    def choose(self, accelerator: Accelerator, name: str, decide: Callable[[], str]) -> str:
        """A choice that the settings leave open: made once, written down, and kept when the run is continued."""
        choices = self._read_choices()
        if name not in choices:
            choices[name] = decide()
            if accelerator.is_main_process:
                write_json(self._choices, choices)
        accelerator.wait_for_everyone()
        return choices[name]

    def chosen(self, name: str, default: str) -> str:
        """What an earlier start of this run chose."""
        return self._read_choices().get(name, default)

    def _read_choices(self) -> dict[str, str]:
        return read_json(self._choices) if self._choices.exists() else {}

    def _check_other(self, earlier: dict[str, Any]) -> None:
        if self.chosen("about", self._about) != self._about:
            raise ValueError(
                f"--out {self.folder}: holds a run on other videos, another cache or other entries; choose another --out"
            )
        now = load_settings(self._settings)
        differ = [k for k in {**earlier, **now} if k not in FREE and earlier.get(k) != now.get(k)]
        if differ:
            key = sorted(differ)[0]
            raise ValueError(
                f"--out {self.folder}: holds a run of another configuration "
                f"({key} was {earlier.get(key)}, is {now.get(key)}); choose another --out"
            )

    def log(self, accelerator: Accelerator, step: int, values: dict[str, float]) -> None:
        """Append to metrics.jsonl, and to the tracker if there is one."""
        accelerator.log(values, step=step)
        if accelerator.is_main_process:
            with open(self._metrics, "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def rewind(self, step: int, steps: int) -> None:
        """Forget what was logged after a step: the run continues from there. The validation after the last step is done again."""
        kept = [line for line in metrics_of(self.folder) if line["step"] <= step]
        if step == steps:
            kept = [line for line in kept if line["step"] < steps or "val_loss" not in line and "val_psnr" not in line]
        if self._metrics.exists():
            write_bytes(self._metrics, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def finish(self, accelerator: Accelerator, summary: dict[str, Any]) -> dict[str, Any]:
        if accelerator.is_main_process:
            write_json(self.folder / "summary.json", summary)
        accelerator.wait_for_everyone()
        return summary

    def summary(self) -> dict[str, Any]:
        """What the finished run said."""
        return summary_of(self.folder)


def summary_of(folder: Path) -> dict[str, Any]:
    """What a finished run said."""
    return read_json(folder / "summary.json")


def metrics_of(folder: Path) -> list[dict[str, float]]:
    """All that a run logged; a line that was being written when the run was killed is left out."""
    file = folder / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    logged = [_object(file, line) for line in lines if line.endswith(b"\n")]
    if not all("step" in line for line in logged):
        raise ValueError(f"{file}: cannot be read: a line has no step")
    return logged


def environment_of(folder: Path) -> dict[str, Any]:
    """Where and how a run was last started."""
    return read_json(folder / "environment.json")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a run folder.

    Raises:
        ValueError: if the file holds anything else.
    """
    return _object(file, file.read_bytes())


def _object(file: Path, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: cannot be read: no JSON object")
    return value


def find_run(wanted: Path | None, pipeline: str) -> Path:
    """The run folder given, or the newest finished one of a pipeline.

    Raises:
        ValueError: if there is none.
    """
    if wanted is not None:
        if not (wanted / "environment.json").exists():
            raise ValueError(f"--run {wanted}: is no run folder")
        found = environment_of(wanted).get("pipeline")
        if found != pipeline:
            raise ValueError(f"--run {wanted}: is a run of {found}, not of {pipeline}")
        if not (wanted / "summary.json").exists():
            raise ValueError(f"--run {wanted}: is not finished; run its command again to continue it")
        return wanted
    finished = [
        path.parent for path in RUNS.glob("*/summary.json") if environment_of(path.parent).get("pipeline") == pipeline
    ]
    if not finished:
        raise ValueError(
            f"no finished run of {pipeline} in {RUNS}/; start one with pipelines/{pipeline}.py, or name a folder with --run"
        )
    return max(finished, key=lambda path: (path / "summary.json").stat().st_mtime)


def _environment(pipeline: str, accelerator: Accelerator) -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for package in (
        "torch",
        "accelerate",
        "vector-quantize-pytorch",
        "webdataset",
        "av",
        "numpy",
        "scikit-learn",
        "xformers",
    ):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    command = [os.path.relpath(sys.argv[0]), *sys.argv[1:]]
    return {
        "pipeline": pipeline,
        "command": command,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "distributed": accelerator.distributed_type.value,
        "python": platform.python_version(),
        "versions": versions,
    }

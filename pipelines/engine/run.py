"""Run folders: settings, environment, choices, metrics and summary of one run.

runs/<command>-<hash of the settings>/
  config.yaml        all settings; a valid --config
  environment.json   versions, device, command line
  choices.json       choices left open by the settings: key of the newest cache, precision, attention kernel, threads on a CPU
  lock               locked while a process works on the run; see pipelines/engine/run_lock.py
  metrics.jsonl      one line per logged step
  checkpoints/       see pipelines/engine/checkpoints.py
  model/             a folder for from_pretrained
  samples/           pictures
  summary.json       last line of stdout; its existence marks a finished run
"""

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from data.files import remove_left_overs, write_bytes, write_json
from pipelines.engine.config import read_settings
from pipelines.engine.console import say
from pipelines.engine.device import device_name
from pipelines.engine.run_files import RUNS, metrics_of, read_json, summary_of
from pipelines.engine.run_lock import lock

FREE = frozenset({"out", "workers", "tracker", "trust", "plan"})
"""Settings that may change when a run is resumed, because they do not affect its numbers."""
LATER: dict[str, Any] = {
    "betas": [0.9, 0.95],
    "lr_floor": 0.01,
    "decay": "cosine",
    "init": None,
    "clip.fps": None,
    "clip.scales": None,
    "clip.seconds": None,
    "clip.span": None,
    "loss.discriminator_betas": None,
    "loss.motion": 0.0,
    "objective.init_args.dropped_only": False,
    "pretrain": 0,
    "pretrain_seeds": 1,
}
"""Settings that were added after runs existed, with the defaults that keep the behaviour. A setting at this default does not
change the name of a run folder, and earlier runs can be resumed."""
_PACKAGES = ["torch", "accelerate", "vector-quantize-pytorch", "webdataset", "av", "numpy", "scikit-learn", "xformers"]
"""Packages whose versions environment.json records."""


class Run:
    """Folder of one run. Starting a command again with the same settings resumes its run."""

    def __init__(
        self,
        pipeline: str,
        config: Any,
        settings: str,
        *,
        about: str = "",
        parent: Path = RUNS,
        shared: bool = False,
        wait: bool = False,
    ) -> None:
        """Choose the folder: `config.out`, or a name in `parent` that contains a hash of settings and `about`.

        Args:
            settings: YAML dump of `config`.
            about: identity of the inputs that the settings do not fix, such as the cache key or a digest of the videos.
            shared: several starts of the command may work on the run at once.
            wait: `begin` waits while another process works on the run.
        """
        self.pipeline = pipeline
        fixed = {key: value for key, value in _without_later(yaml.safe_load(settings)).items() if key not in FREE}
        identity = hashlib.sha256(json.dumps([pipeline, about, fixed], sort_keys=True).encode()).hexdigest()[:8]
        self.folder: Path = config.out or parent / f"{pipeline}-{identity}"
        self._settings, self._about = settings, about
        self._choices = self.folder / "choices.json"
        self._metrics = self.folder / "metrics.jsonl"
        self._shared, self._wait = shared, wait
        self._lock: IO[str] | None = None

    @property
    def finished(self) -> bool:
        return (self.folder / "summary.json").exists()

    def begin(self, accelerator: Accelerator) -> None:
        """Create the folder, lock it, and record settings and environment. The folder of a finished run is not changed.

        Raises:
            ValueError: if the folder contains a run with other settings or other inputs, another process works on it, or it
                cannot be written. All processes raise the error of the main process.
        """
        self._check_same()
        failure: str | None = None
        if accelerator.is_main_process and not self.finished:
            try:
                self._begin_alone(accelerator)
            except (OSError, ValueError) as error:
                failure = str(error)
        if (failure := broadcast_object_list([failure])[0]) is not None:
            raise ValueError(failure)
        self.choose(accelerator, "about", lambda: self._about)

    def _begin_alone(self, accelerator: Accelerator) -> None:
        """Do the work of `begin` on the main process, for all processes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._shared:
            self._lock = lock(self.folder, partial(self._say_waiting, accelerator) if self._wait else None)
            # The owner that this process has waited for may have finished the run, or begun another one.
            if self.finished:
                self._lock.close()
            self._check_same()
        if self.finished:
            return
        remove_left_overs(self.folder)
        # Unfinished files of safetensors.
        for temporary in self.folder.glob("model/.tmp*"):
            temporary.unlink(missing_ok=True)
        write_bytes(self.folder / "config.yaml", self._settings.encode(errors="surrogateescape"))
        write_json(self.folder / "environment.json", _environment(self.pipeline, accelerator))

    def _say_waiting(self, accelerator: Accelerator, owner: str) -> None:
        say(accelerator, f"waiting for {owner}, which works on {self.folder}")

    def begin_unless_finished(self, accelerator: Accelerator) -> bool:
        """Begin the run and return True; if it is finished, print a message and return False. Raises ValueError as `begin`."""
        self.begin(accelerator)
        if not self.finished:
            return True
        say(accelerator, f"{self.folder} is finished: nothing is left to do")
        return False

    def choose(self, accelerator: Accelerator, name: str, decide: Callable[[], str]) -> str:
        """Return a choice that the settings leave open. `decide` is called once per run; a resumed run reads choices.json."""
        choices = self._read_choices()
        if name not in choices:
            choices[name] = decide()
            if accelerator.is_main_process:
                write_json(self._choices, choices)
        accelerator.wait_for_everyone()
        return choices[name]

    def chosen(self, name: str, default: str) -> str:
        """Return the choice that an earlier start of this run recorded, or the default."""
        return self._read_choices().get(name, default)

    def _read_choices(self) -> dict[str, str]:
        return read_json(self._choices) if self._choices.exists() else {}

    def _check_same(self) -> None:
        if not (self.folder / "config.yaml").exists():
            return
        earlier = read_settings(self.folder / "config.yaml")
        if self.chosen("about", self._about) != self._about:
            raise ValueError(
                f"--out {self.folder}: contains a run on other videos, another cache, other entries or other rules of probes; "
                "choose another --out"
            )
        earlier, current = _without_later(earlier), _without_later(yaml.safe_load(self._settings))
        for key in sorted({*earlier, *current} - FREE):
            if earlier.get(key) != current.get(key):
                raise ValueError(
                    f"--out {self.folder}: contains a run with other settings "
                    f"({key} was {earlier.get(key)}, is now {current.get(key)}); choose another --out"
                )

    def log(self, accelerator: Accelerator, step: int, values: dict[str, float]) -> None:
        """Append numbers of a step to metrics.jsonl, and to the tracker if there is one."""
        accelerator.log(values, step=step)
        if accelerator.is_main_process:
            with open(self._metrics, "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def rewind(self, step: int, steps: int) -> None:
        """Remove the log lines after `step`, where the run is resumed.

        If all `steps` steps are done, the final validation runs again, so its line is removed too.
        """
        kept = [line for line in metrics_of(self.folder) if line["step"] <= step]
        if step == steps:
            kept = [line for line in kept if line["step"] < steps or not {"val_loss", "val_psnr"} & line.keys()]
        if self._metrics.exists():
            write_bytes(self._metrics, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def finish(self, accelerator: Accelerator, summary: dict[str, Any]) -> dict[str, Any]:
        """Write the summary, which marks the run as finished, and return it."""
        if accelerator.is_main_process:
            self.finish_alone(summary)
        accelerator.wait_for_everyone()
        return summary

    def finish_alone(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Do the same on the main process, without a wait for the other processes."""
        write_json(self.folder / "summary.json", summary)
        if self._lock is not None:
            self._lock.close()
        return summary

    def summary(self) -> dict[str, Any]:
        """Return the summary of the finished run."""
        return summary_of(self.folder)


def _without_later(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the settings without those of LATER that have their default."""
    kept = {}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            kept[name] = _without_later(value, f"{key}.")
        elif key not in LATER or value != LATER[key]:
            kept[name] = value
    return kept


def _environment(pipeline: str, accelerator: Accelerator) -> dict[str, Any]:
    versions: dict[str, str | None] = dict.fromkeys(_PACKAGES)
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "pipeline": pipeline,
        "folder": os.getcwd(),
        "command": [os.path.relpath(sys.argv[0]), *sys.argv[1:]],
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "distributed": accelerator.distributed_type.value,
        "python": platform.python_version(),
        "versions": versions,
    }

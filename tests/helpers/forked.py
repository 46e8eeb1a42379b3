"""Python programs in new processes that do not import torch again.

The processes are forked from the fork server of multiprocessing. The server imports torch and the modules of the commands once,
which takes each new interpreter 3 to 4 s of CPU time, and runs nothing, so it has no threads of torch. At least one test starts
each of the forked commands in a new interpreter, as a user does.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
PACKAGES = ("tokenizer", "data", "ar_model", "pipelines")
IMPORTED = [
    *("pipelines.commands.compare", "pipelines.commands.evaluate_tokenizer", "pipelines.commands.export"),
    *("pipelines.commands.pretrain_ar", "pipelines.commands.probe", "pipelines.commands.report"),
    *("pipelines.commands.tokenize", "pipelines.commands.train_tokenizer", "pipelines.engine.cpu_processes"),
]

# Waiting threads must sleep: with more threads than cores, spinning threads make tiny steps a hundred times slower.
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}

START_METHOD = "forkserver"
"""Way of multiprocessing to start a process."""

Result = subprocess.CompletedProcess[str]


class Forked:
    """A program that was started: a script with flags, "-m" with a module and flags, or "-c" with code."""

    def __init__(self, arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
        self._arguments = arguments
        self._output = tempfile.TemporaryDirectory()
        self._files = [Path(self._output.name, name) for name in ("stdout", "stderr")]
        work = (arguments, str(folder), environment, *map(str, self._files))
        self._process = multiprocessing.get_context(START_METHOD).Process(target=_run, args=work)
        self._process.start()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self, timeout: float) -> Result:
        """Return the exit code and the output. A process that does not end in time is killed."""
        self._process.join(timeout)
        if self._process.is_alive():
            self._process.kill()
            raise subprocess.TimeoutExpired(self._arguments, timeout)
        out, errors = (file.read_text() for file in self._files)
        self._output.cleanup()
        assert self._process.exitcode is not None
        return Result(self._arguments, self._process.exitcode, out, errors)


def _run(arguments: list[str], folder: str, environment: dict[str, str], out: str, errors: str) -> None:
    """Become the process of a program: its files, environment, folder, arguments and module `__main__`."""
    for descriptor, file in ((1, out), (2, errors)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    first, *others = arguments
    if Path(first).parent != ROOT / "pipelines":
        # A program must import every module of this project that it uses. (Commands are checked by tests/test_structure.py.)
        for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
            del sys.modules[name]
    if first == "-c":
        sys.argv = ["-c", *others[1:]]
        sys.path.insert(0, "")
        exec(compile(others[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = others
        sys.path.insert(0, "")
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(first))
        runpy.run_path(first, run_name="__main__")


def start_server() -> None:
    """Start the server. Called before the first test, because the data workers of a test would start it without these imports."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    # Its modules come from this repository, not from where the package is installed.
    with mock.patch.dict(os.environ, {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}):
        forkserver.ensure_running()

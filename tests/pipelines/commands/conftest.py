"""Fixtures of the tests of commands that start training runs."""

import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from pipelines.engine import sweep
from tests.helpers.forked import ENVIRONMENT, START_METHOD, Forked, Result


@pytest.fixture
def forked_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the training runs and probes of a comparison in this process."""

    def run(command: list[str], **_: Any) -> Result:
        return Forked(command[command.index(sys.executable) + 1 :], Path.cwd(), ENVIRONMENT).wait(300)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sweep, "get_context", lambda _: get_context(START_METHOD))

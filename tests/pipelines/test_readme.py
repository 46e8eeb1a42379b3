"""The Python snippets of the README run."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import ENVIRONMENT, ROOT

SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.splitlines()[0])
def test_python_of_the_readme_runs(snippet: str, finished_project: Path, answers: dict[str, Any]) -> None:
    cache = answers["tokenize"]["cache"]
    code = snippet.replace("CACHE", cache)
    if "facts = " in code:
        code += "    print(sample['__key__'], codes.shape, facts['path'])\n"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=finished_project,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "(1, 8, 8, 8)" in result.stdout


def test_the_webdataset_snippet_has_six_lines_and_does_not_import_this_project() -> None:
    (plain,) = [snippet for snippet in SNIPPETS if "webdataset" in snippet]
    assert len([line for line in plain.splitlines() if line]) == 6
    assert "arvideo" not in plain
    assert "data." not in plain

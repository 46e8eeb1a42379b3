"""pipelines/tokenize.py must not hide Python's own `tokenize`, which inspect, dataclasses and torch import."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FILES = sorted(path for path in (ROOT / "pipelines").glob("*.py") if path.name != "__init__.py")
SCRIPTS = [path for path in FILES if '__name__ == "__main__"' in path.read_text()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_every_script_starts_with_the_header(script: Path) -> None:
    body = ast.parse(script.read_text()).body
    assert isinstance(body[1], ast.If), "the header follows the docstring"
    assert ast.unparse(body[1].test) == "not __package__"
    assert "sys.path[0] = " in ast.unparse(body[1])
    assert "os.path.dirname(os.path.dirname(os.path.abspath(__file__)))" in ast.unparse(body[1])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
@pytest.mark.parametrize("place", ["repository", "pipelines", "elsewhere"])
def test_help_works_from_anywhere(script: Path, place: str, tmp_path: Path) -> None:
    folder = {"repository": ROOT, "pipelines": ROOT / "pipelines", "elsewhere": tmp_path}[place]
    result = subprocess.run(
        [sys.executable, str(script), "--help"], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "usage: " in result.stdout


def test_children_of_a_started_script_import_the_real_tokenize(tmp_path: Path) -> None:
    """Compile workers and spawned data workers inherit sys.path, without pipelines/ in it."""
    source = (ROOT / "pipelines" / "tokenize.py").read_text()
    header = ast.unparse(ast.parse(source).body[1])
    probe = ROOT / "pipelines"
    code = f"__package__ = ''\n__file__ = {str(probe / 'tokenize.py')!r}\n"
    code += f"import sys\nsys.path.insert(0, {str(probe)!r})\n{header}\n"
    code += "import os; print(os.pathsep.join(sys.path))"
    path = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout.strip()
    assert str(probe) not in path.split(os.pathsep)
    child = "import tokenize; print(tokenize.__file__)"
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(
        [sys.executable, "-c", child], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
    )
    assert "pipelines" not in result.stdout


def test_no_other_script_has_a_standard_library_name() -> None:
    assert {path.stem for path in FILES} & set(sys.stdlib_module_names) == {"tokenize"}

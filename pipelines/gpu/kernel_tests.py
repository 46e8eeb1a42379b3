"""Part 2: the attention tests on the GPU; flex, which may leave a broken CUDA context, runs after the others, alone."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from data.text import one_line
from pipelines.benchmarks import Row
from pipelines.gpu.part import Setting, attempt, run


def measure(setting: Setting) -> Iterator[Row]:
    """Yield the number of passed tests, and one row per failure with its reason."""
    # Without a GPU the other tests would be skipped.
    mark = "not gpu" if setting.dry else "gpu"
    names = ("refused_by_name_on_a_cpu",) if setting.dry else ("not flex", "flex")
    for name in names:
        what = f"tests marked {mark}, {name}"
        yield from attempt(what, partial(_tests, what, mark, name, setting))


def _tests(what: str, mark: str, name: str, setting: Setting) -> Iterator[Row]:
    report = setting.work / "tests.xml"
    report.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        mark,
        "-k",
        name,
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
    ]
    limit = max(1.0, setting.left() - 3)
    done = subprocess.run([*command, "tests/ar_model/test_backends.py"], stdout=sys.stderr, timeout=limit)
    if not report.exists():
        raise RuntimeError(f"pytest ended with exit code {done.returncode} and wrote no report")
    yield from report_rows(what, report)


def report_rows(what: str, report: Path) -> Iterator[Row]:
    """Yield the rows of a JUnit XML report: the counts, then the failed and the skipped tests with their reasons."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    problems = [(case, child) for case in cases for child in case if child.tag in ("failure", "error", "skipped")]
    failed = sum(child.tag != "skipped" for _, child in problems)
    passed, skipped = len(cases) - len(problems), len(problems) - failed
    yield Row(what, "", f"{passed} passed, {failed} failed, {skipped} skipped", reach="0 failed")
    for case, child in problems:
        reason = one_line(child.get("message") or "", 300)
        yield Row(f"{case.get('name')}", "", f"{child.tag}: {reason}")


if __name__ == "__main__":
    run(measure)

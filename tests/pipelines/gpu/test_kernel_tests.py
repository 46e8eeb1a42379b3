"""The report of pytest becomes rows: counts, and the reason of each failure."""

from pathlib import Path

from pipelines.gpu.kernel_tests import report_rows

REPORT = """<testsuites><testsuite name="pytest">
<testcase classname="a" name="test_good[x]"/>
<testcase classname="a" name="test_bad[flex]"><failure message="RuntimeError:  no
kernel | image">trace</failure></testcase>
<testcase classname="a" name="test_other"><skipped message="needs two GPUs"/></testcase>
<testcase classname="a" name="test_broken"><error message="fixture failed"/></testcase>
</testsuite></testsuites>"""


def test_failures_and_skips_are_rows_with_their_reasons(tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(REPORT)
    counts, *problems = report_rows("tests", tmp_path / "tests.xml")
    assert counts.ours == "1 passed, 2 failed, 1 skipped"
    assert [(row.what, row.ours) for row in problems] == [
        ("test_bad[flex]", "failure: RuntimeError: no kernel | image"),
        ("test_other", "skipped: needs two GPUs"),
        ("test_broken", "error: fixture failed"),
    ]

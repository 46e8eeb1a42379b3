"""The verdict and the caveats on the page of a comparison follow from its results."""

from pathlib import Path
from typing import Any

import pytest

from data.files import write_json
from pipelines.reporting.comparison_page import caveats, verdict, write_comparison


def row(
    entry: str,
    mean: float,
    untrained: float = 0.3,
    *,
    error: float | None = 0.0,
    seconds: float = 60,
    warmup: int = 10,
    knn: float = 0.3,
) -> dict[str, Any]:
    """A row of the summary of a comparison."""
    accuracy, untrained_accuracy = ({"mean": value, "stderr": error} for value in (mean, untrained))
    return {
        "entry": entry,
        "attentive": accuracy,
        "untrained_attentive": untrained_accuracy,
        "linear": accuracy,
        "untrained_linear": untrained_accuracy,
        "knn": {"mean": knn, "stderr": error},
        "seconds": {"mean": seconds, "stderr": error},
        "warmup": warmup,
        "steps": 90,
        "clips": 900,
        "bits_per_code": None,
        "clips_per_second": {"mean": 15.0, "stderr": error},
        "peak_memory": 2**30,
        "layers": {"attentive": [accuracy], "linear": [accuracy]},
        "curve": [{"step": step, "seconds": step / 2, **accuracy} for step in (0, 90)],
    }


def summary(*rows: dict[str, Any], seeds: int = 5) -> dict[str, Any]:
    return {
        **{"table": list(rows), "seeds": seeds, "n": 600, "folds": 1, "groups": 0, "classes": 5, "chance": 0.2},
        **{"videos": 700, "labelled": 600, "cache": "caches/digits", "protocol": "ridge", "device": "cpu"},
        **{"one_frame": {"mean": 0.41, "stderr": 0.02}, "motion_energy": {"mean": 0.2, "stderr": 0.02}},
        "budget": "60 seconds",
    }


@pytest.mark.parametrize(("error", "exceeds"), [(0.01, True), (0.03, False)])
def test_a_lead_is_compared_with_the_errors_of_both_entries(error: float, exceeds: bool) -> None:
    facts = verdict([row("a", 0.5, error=error), row("b", 0.48, error=error)], tested=60_000)
    assert facts["lead"] == pytest.approx(0.02)
    assert facts["exceeds_seed_error"] == exceeds and not facts["exceeds_lead"]


@pytest.mark.parametrize(("tested", "exceeds"), [(60, True), (6000, False)])
def test_a_lead_is_compared_with_the_sampling_error_of_the_tested_clips(tested: int, exceeds: bool) -> None:
    facts = verdict([row("a", 0.5), row("b", 0.47)], tested)
    assert facts["sampling_error"] == pytest.approx(0.5 / tested**0.5)
    assert facts["exceeds_lead"] == exceeds


def test_one_entry_has_no_lead() -> None:
    facts = verdict([row("a", 0.5)], tested=100)
    assert facts["lead"] is None and not facts["exceeds_lead"]


def test_each_caveat_names_its_entries() -> None:
    rows = [row("a", 0.5), row("b", 0.4, 0.97, seconds=80, warmup=50, knn=0.05), row("c", 0.5, 0.48, error=0.03)]
    assert [entries for _, entries in caveats(rows, summary(*rows))] == [
        ["b (0.970)", "c (0.480)"],  # against the untrained network
        ["b"],  # against the best baseline
        ["b (80)"],  # seconds
        ["b (50 of 90 steps)"],  # warm-up
        ["b (0.050)"],  # nearest neighbours
    ]
    assert "(0.410)" in caveats(rows, summary(*rows))[1][0], "the better of the two baselines"
    assert caveats(rows[:1], summary(rows[0])) == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_json(tmp_path / "environment.json", {"versions": {"torch": "2.6"}})
    return tmp_path


def test_a_page_of_one_seed_gives_no_standard_errors_and_no_lead(folder: Path) -> None:
    rows = [row("a", 0.5, error=None), row("b", 0.4, error=None)]
    page = write_comparison(folder, summary(*rows, seeds=1)).read_text()
    text = page[page.index("<h1>") : page.index("<svg")]
    assert "With one seed" in text and "ahead of" not in text and text.count("±") == 1, "only the sampling error"


def test_names_are_escaped(folder: Path) -> None:
    rows = [row("a<b>&", 0.5), row("c", 0.4)]
    page = write_comparison(folder, {**summary(*rows), "cache": "<i>"}).read_text()
    assert "a&lt;b&gt;&amp;" in page and "&lt;i&gt;" in page
    assert "<b>&" not in page and "<i>" not in page and "<svg" in page

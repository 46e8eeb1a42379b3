"""The verdict and the caveats on the page of a comparison follow from its results."""

from pathlib import Path
from typing import Any

import pytest

from data.files import write_json
from pipelines.reporting.comparison_page import bits_by_conditioning, caveats, verdict, write_comparison
from pipelines.reporting.pages import pretraining_in_words


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
    gain = {"mean": mean - untrained, "ahead": None if error is None else mean - untrained > 2 * error}
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
        "conditioning": "codes from codes",
        "gain": dict.fromkeys(("attentive", "linear"), gain),
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
        **{
            "budget": "60 seconds",
            "leads": dict.fromkeys(("attentive", "linear"), lead(0.1, None if seeds == 1 else True)),
        },
    }


def lead(mean: float, ahead: bool | None) -> dict[str, Any]:
    error = None if ahead is None else 0.01
    return {
        "best": "a",
        "second": "b",
        "mean": mean,
        "stderr": error,
        "sampling": 0.02,
        "tied": mean == 0,
        "ahead": ahead,
    }


@pytest.mark.parametrize(
    ("difference", "facts"),
    [
        (lead(0.02, True), ["a is ahead", "of 2 entries", "2.0 points above b", "1.0 over seeds", "2.0 over tested"]),
        (lead(0.02, False), ["no entry is ahead", "of 2 entries", "2.0 points above b", "1.0 over seeds"]),
        (lead(0.0, False), ["a and b are tied", "of 2 entries"]),
        (lead(0.02, None), ["one seed", "unknown", "2.0 points above b"]),
    ],
)
def test_the_verdict_follows_from_the_difference(difference: dict[str, Any], facts: list[str]) -> None:
    text = verdict([row("b", 0.48), row("a", 0.5)], "linear", difference)
    assert text.startswith("Linear probe") and "0.500" in text
    for fact in facts:
        assert fact in text, text


def test_one_entry_has_no_lead() -> None:
    text = verdict([row("a", 0.5)], "attentive", None)
    assert "0.500" in text and "ahead" not in text and "above" not in text


def test_bits_are_listed_by_what_they_are_predicted_from() -> None:
    rows = [row("a", 0.5), row("b", 0.4), row("c", 0.3), row("d", 0.2)]
    for one, (conditioning, bits) in zip(rows, [("x", 5.0), ("y", 3.0), ("x", 4.0), ("y", None)], strict=True):
        one |= {"conditioning": conditioning, "bits_per_code": bits}
    assert bits_by_conditioning(rows) == {"y": {"b": 3.0}, "x": {"c": 4.0, "a": 5.0}}


def test_each_caveat_names_its_entries() -> None:
    rows = [row("a", 0.5), row("b", 0.4, 0.97, seconds=80, warmup=50, knn=0.05), row("c", 0.5, 0.48, error=0.03)]
    assert [entries for _, entries in caveats(rows, summary(*rows))] == [
        ["b (-57.0 points)", "c (+2.0 points)"],  # against the untrained network, attentive probe
        ["b (-57.0 points)", "c (+2.0 points)"],  # the same with the linear probe
        ["b"],  # against the best baseline
        ["b (80)"],  # seconds
        ["b (50 of 90 steps)"],  # warm-up
        ["b (0.050)"],  # nearest neighbours
    ]
    assert "(0.410)" in caveats(rows, summary(*rows))[2][0], "the better of the two baselines"
    assert caveats(rows[:1], summary(rows[0])) == []


def test_notes_from_before_the_training_come_first(folder: Path) -> None:
    rows = [row("a", 0.5), row("b", 0.4, 0.97)]
    content = {**summary(*rows), "notes": {"WARNING: nothing <held> out": [], "equal views": ["a", "b"]}}
    found = caveats(rows, content)
    assert found[:2] == [("nothing <held> out", []), ("equal views", ["a", "b"])] and len(found) == 5
    page = write_comparison(folder, content).read_text()
    assert "<b>nothing &lt;held&gt; out</b>" in page and "<b>equal views:</b> a, b" in page


def test_a_page_says_how_many_tested_clips_were_in_pretraining(folder: Path) -> None:
    page = write_comparison(folder, {**summary(row("a", 0.5)), "in_pretraining": 540}).read_text()
    (line,) = [line for line in page.splitlines() if "600 clips" in line]
    assert "held out from the probes" in line and "540 of them were in pre-training" in line
    assert "none of them" in pretraining_in_words(0) and "unknown" in pretraining_in_words(None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_json(tmp_path / "environment.json", {"versions": {"torch": "2.6"}})
    return tmp_path


def test_a_page_of_one_seed_gives_no_standard_errors_and_no_lead(folder: Path) -> None:
    rows = [row("a", 0.5, error=None), row("b", 0.4, error=None)]
    page = write_comparison(folder, summary(*rows, seeds=1)).read_text()
    text = page[page.index("<h1>") : page.index("<svg")]
    assert "one seed" in text and "ahead" not in text and "±" not in text


def test_names_are_escaped(folder: Path) -> None:
    rows = [row("a<b>&", 0.5), row("c", 0.4)]
    page = write_comparison(folder, {**summary(*rows), "cache": "<i>"}).read_text()
    assert "a&lt;b&gt;&amp;" in page and "&lt;i&gt;" in page
    assert "<b>&" not in page and "<i>" not in page and "<svg" in page


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("chance", 10**400),
        ("chance", None),
        ("budget", 5),
        ("leads", {"attentive": None}),
        ("one_frame", {"mean": "x", "stderr": None}),
        ("table", [5]),
        ("table", [{**row("a", 0.5), "curve": [{"step": 1}]}]),
        ("table", [{**row("a", 0.5), "layers": {"attentive": 1, "linear": []}}]),
    ],
)
def test_summary_of_other_content_is_one_error(folder: Path, part: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"summary\.json: {part}") as caught:
        write_comparison(folder, {**summary(row("a", 0.5)), part: value})
    assert len(str(caught.value).splitlines()) == 1
    assert not (folder / "index.html").exists()

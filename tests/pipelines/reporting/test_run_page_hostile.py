"""Pages about runs and caches of somebody else: every value is escaped, and a file with other fields is one error."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ar_model.inputs import CodeSpec
from ar_model.objectives import ARVideo
from data.files import write_json
from data.sources import Video
from pipelines.reporting.pictures import bar_chart, line_chart
from pipelines.reporting.run_page import write_run_page
from tests.helpers.caches import MakeCache

X = "<script>alert(1)</script>"
EXPANDED = "{{ commands }} {% for x in y %} $\\frac{ $x$"
HOSTILE = f"{X}{EXPANDED}\"'&"
MEAN = {"mean": 0.5, "stderr": 0.1}
FILES: dict[str, dict[str, Any]] = {
    "summary.json": {
        **{"objective": HOSTILE, "cache": "CACHE", "tokenizer": HOSTILE, "step": 5, "loss": 1.0, "bits_per_code": 5.0},
        **{"unigram_bits": 6.0, "seconds": 3.0, "clips_per_second": 7},
    },
    "environment.json": {
        **{"pipeline": "pretrain_ar", "command": [HOSTILE], "started": HOSTILE, "device": HOSTILE, "processes": 1},
        **{"python": HOSTILE, "versions": {HOSTILE: HOSTILE, "torch": None}},
    },
    "choices.json": {HOSTILE: HOSTILE, "about": "x"},
    "probe/summary.json": {
        **{"cache": HOSTILE, "linear": MEAN, "untrained": MEAN, "knn": MEAN, "chance": 0.1, "folds": 1, "n": HOSTILE},
        **dict.fromkeys(("seeds", "skipped", "unlabelled", "layer", "protocol"), HOSTILE),
        **{"layers": [MEAN], "untrained_layers": [MEAN], "in_pretraining": 7, "notes": [HOSTILE]},
    },
}


class Tags(HTMLParser):
    """Names of all elements, and all attributes that run code."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {tag, *(name for name, _ in attrs if name.startswith("on"))}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, make_cache: MakeCache) -> Path:
    """A cache in which names, labels, sources and the tokenizer are hostile."""
    videos = [Video(f"{i}{HOSTILE}.mp4", i, label=HOSTILE, group=HOSTILE) for i in range(3)]
    folder = make_cache(tmp_path_factory.mktemp("caches"), videos, levels=((8, 8),), skip=[videos[0].path])
    write_json(folder / "made_with.json", {"videos": HOSTILE, "tokenizer": HOSTILE})
    return folder


@pytest.fixture
def run(tmp_path: Path, cache: Path) -> Path:
    folder = tmp_path / "run"
    codes = CodeSpec(shape=(2, 3, 3), vocab_size=64, levels=((8, 8),))
    ARVideo(codes, clusters=(1, 3, 3), width=24, depth=1, heads=2, decoder_width=24, decoder_heads=2).save(
        folder / "model"
    )
    (folder / "probe").mkdir()
    for name, content in FILES.items():
        write_json(folder / name, content)
    write_json(folder / "summary.json", {**FILES["summary.json"], "cache": str(cache)})
    (folder / "metrics.jsonl").write_text('{"step": 1, "bits_per_code": 5}\n{"step": 2, "val_bits_per_code": 5}\n')
    return folder


def test_every_value_is_escaped_and_none_is_expanded(run: Path, tmp_path: Path) -> None:
    write_run_page(run, tmp_path / "index.html", trust=False)
    page = (tmp_path / "index.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert X not in page
    assert not {"script", "iframe", "object", "embed", "link"} & tags.found
    assert not [name for name in tags.found if name.startswith("on")]
    escaped = "&lt;script&gt;alert(1)&lt;/script&gt;"
    assert page.count(f"{escaped}{{{{ commands }}}} {{% for x in y %}}") > 10
    assert "held out from the probe" in page and "7 of them were in pre-training" in page


def test_names_in_charts_are_escaped_and_no_formulas() -> None:
    points = ([1, 2], [1, 2])
    for chart in (
        line_chart({HOSTILE: points, "b": points}, x="x", y="y"),
        bar_chart({HOSTILE: (0.1, 0.1)}, x="x", level=(X, 0.5)),
    ):
        assert X not in chart
        assert "&lt;script&gt;" in chart
    assert "$x$" in line_chart({"$x$": points, "b": points}, x="x", y="y")


OPTIONAL = {"knn", "layers", "untrained_layers", "in_pretraining", "notes"}
OTHER: dict[type, list[Any]] = {
    str: [[1], {"a": 1}],
    int: ["x", [1]],
    float: ["x", [1], 10**400, 1e101],
    dict: ["x", 5],
    list: ["x", 5, [[[]]]],
}


@pytest.mark.parametrize("name", FILES)
def test_missing_field_or_other_type_is_one_error(run: Path, tmp_path: Path, name: str) -> None:
    """All files are checked before anything is drawn, so this takes little time."""
    original = json.loads((run / name).read_text())
    for key in original:
        for value in ["missing", *OTHER[type(original[key])]]:
            content = {k: v for k, v in original.items() if k != key}
            if value != "missing":
                content[key] = value
            elif key in OPTIONAL or name == "choices.json":
                continue
            write_json(run / name, content)
            with pytest.raises(ValueError, match=name) as caught:
                write_run_page(run, tmp_path / "index.html", trust=False)
            assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "index.html").exists()


@pytest.mark.parametrize(
    "line",
    [
        *("5", "null", "{}", '{"step": "x"}', '{"step": 1, "loss": [1]}', '{"a": ' + "[" * 2000),
        *('{"step": 1, "loss": %s}' % ("9" * 401), '{"step": %s}' % ("9" * 401), '{"step": 1, "loss": -1e101}'),
    ],
)
def test_line_of_metrics_that_is_none_is_one_error(run: Path, tmp_path: Path, line: str) -> None:
    (run / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl") as caught:
        write_run_page(run, tmp_path / "index.html", trust=False)
    assert len(str(caught.value).splitlines()) == 1

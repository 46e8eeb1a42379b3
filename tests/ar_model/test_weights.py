"""The configuration of a saved model is compared with its weights before anything large is built."""

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ar_model import load_objective
from tests.helpers.small_objectives import MODELS

MEMORY = 2**27
TEXTS = ["5", "null", '"abc"', "[]", "", "{}", '{"objective": []}', "[" * 900 + "]" * 900, '{"objective": NaN}']
TEXTS += [
    '{"objective": "VideoMAE", "codes": ' + "[" * 980 + "]" * 980 + "}",
    '{"width": ' + "9" * 5000 + "}",
    " " * 2**17,
]
LARGE = (0, -3, 10**9, 10**30, "x", None, [10**9] * 3, 1e308, {})


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    MODELS[request.param]().save(tmp_path)
    return tmp_path


def refused(folder: Path, config: dict[str, Any]) -> None:
    """Check that the model is refused in one line, in a short time and without much memory."""
    (folder / "config.json").write_text(json.dumps(config))
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=folder.name) as caught:
        load_objective(folder)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 600
    assert time.monotonic() - start < 3
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


def test_numbers_of_any_size_are_refused_before_the_model_is_built(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    sizes = {"width", "depth", "decoder_depth", "decoder_width", "regressor_depth", "code_patch", "clusters"}
    for name in sizes & config.keys():
        for value in LARGE:
            refused(folder, {**config, name: value})


@pytest.mark.parametrize(
    "change",
    [
        *({"vocab_size": n} for n in (10**9, 10**30, 0, "x")),
        *({"shape": n} for n in ([10**4] * 3, [0, 0, 0], [-8, 8, 8], [2**24, 1, 1], [2**16, 2**8, 1], "x", 5)),
        *({"levels": n} for n in ([0], "a", [1] * 20_000, [-5, -2], [[2]])),
        *({"codebook_shape": n} for n in ([10**9, 10**3], [-1, -1], 5)),
    ],
)
def test_codes_of_any_size_are_refused_before_the_model_is_built(tmp_path: Path, change: dict[str, Any]) -> None:
    MODELS["VideoMAE"]().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    refused(tmp_path, {**config, "codes": {**config["codes"], **change}})


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:20])
def test_text_that_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    MODELS["VideoMAE"]().save(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=tmp_path.name) as caught:
        load_objective(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def _another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "width": 2 * config["width"]}))


def _more_tensors(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "depth": 1}))


@pytest.mark.parametrize(("change", "part"), [(_another_shape, "shape"), (_more_tensors, "unknown.*blocks")])
def test_first_difference_from_the_weights_is_named(tmp_path: Path, change: Callable[[Path], None], part: str) -> None:
    MODELS["VideoMAE"]().save(tmp_path)
    change(tmp_path)
    for trained in (True, False):
        with pytest.raises(ValueError, match=part):
            load_objective(tmp_path, trained=trained)

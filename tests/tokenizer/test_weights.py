"""The configuration of a saved tokenizer is compared with its weights before anything large is built."""

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.small_tokenizers import build
from tokenizer import load_tokenizer

TEXTS = ["5", "null", '"abc"', "[]", "", "[" * 900 + "]" * 900, '{"depth": ' + "9" * 5000 + "}", " " * 2**17]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "change",
    [
        *({"depth": value} for value in (10**9, 10**30, 300, "x", None, 1e308)),
        *({"width": value} for value in (10**9, 8 * 10**30, 4096, "x", [8])),
        *({"name": value} for value in (5, "vq3d-2x4x4-emavq1048576", "vq3d-2x4x4-fsq" + "9" * 5000)),
        {"name": "vq3d-2x4x4-emavq512", "options": {"channels": 10**9}},
        {"options": [10**9]},
    ],
    ids=lambda change: str(change)[:40],
)
def test_numbers_of_any_size_are_refused_before_the_tokenizer_is_built(folder: Path, change: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=folder.name) as caught:
        load_tokenizer(str(folder))
    assert len(str(caught.value).splitlines()) == 1
    assert time.monotonic() - start < 3
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2**27


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:20])
def test_text_that_is_no_configuration_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=folder.name) as caught:
        load_tokenizer(str(folder))
    assert len(str(caught.value).splitlines()) == 1


def test_first_difference_from_the_weights_is_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "depth": 3}))
    with pytest.raises(ValueError, match=r"model\.safetensors has an unknown .decoder\.2"):
        load_tokenizer(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        load_tokenizer(str(folder))

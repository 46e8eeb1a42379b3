"""JSON text that would take far more memory than JSON of its size has is refused; any names are allowed."""

import json

import pytest

from data import json_text
from data.json_text import parse_json

SIZE = 2**20


@pytest.mark.parametrize("part", ["[]", "{}", "[0]", '{"a":0}', "[[[[]]]]", '[{},"a"]', '""'])
def test_text_of_many_small_parts_is_refused(part: str) -> None:
    content = f'{{"a":[{",".join([part] * (SIZE // len(part)))}]}}'.encode()
    with pytest.raises(ValueError, match=r"more than [34]\d MiB"):
        parse_json(content)


@pytest.mark.parametrize(
    "row",
    [
        ["a", 1, None, None, None],
        ["0/1.mp4", 1, "b", "c", "d"],
        ["[[[{{{,,,:::" * 4, 1, None, None, None],
        [',\\\\",["[' * 9, 1, "\\", '"', None],
        ["\u00fc\U0001f600\udcff", 1, "\n", None, None],
        {"path": "a", "reason": "not a video"},
        [0] * 1000,
        [1.5] * 1000,
    ],
)
def test_content_of_real_manifests_is_read(monkeypatch: pytest.MonkeyPatch, row: object) -> None:
    monkeypatch.setattr(json_text, "_FREE", 0)
    monkeypatch.setattr(json_text, "_PIECE", 1000)
    content = [row] * (SIZE // 8 // len(json.dumps(row)))
    text = json.dumps(content, separators=(",", ":")).encode()
    assert parse_json(text) == content


def test_small_content_may_have_any_parts() -> None:
    assert parse_json(b"[" + b"[]," * 9999 + b"[]]") == [[]] * 10_000


@pytest.mark.parametrize("content", [b"", b"[", b"\xff", b"[1]]", b'"' + b"\\" * 9])
def test_other_text_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="."):
        parse_json(content)

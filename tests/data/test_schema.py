"""JSON content is checked against types, and the error names the first part that differs."""

import json
from typing import Any, Literal, TypedDict

import pytest

from data.schema import conform


class Clip(TypedDict):
    """Part of the content below."""

    size: int
    views: int | Literal["dense"]


class Entry(TypedDict, total=False):
    """Optional fields."""

    note: str


class Content(Entry):
    """Content of the tests."""

    name: str
    rate: float | None
    shape: tuple[int, int]
    clips: list[Clip]
    counts: dict[str, int]
    rows: list[Any]


VALID: dict[str, Any] = {
    "name": "x",
    "rate": 1,
    "shape": [1, 2],
    "clips": [{"size": 1, "views": "dense"}, {"size": 2, "views": 3, "more": None}],
    "counts": {"a": 1},
    "rows": [1, "a", None],
    "further": 5,
}


def test_valid_content_is_returned_unchanged() -> None:
    assert conform(VALID, Content, "file") is VALID
    conform({**VALID, "note": "y", "rate": None}, Content, "file")
    for rate in (0, -1e100, 10**99, 5e-324):
        conform({**VALID, "rate": rate}, Content, "file")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"name": 5}, "name is 5, expected a text"),
        ({"name": None}, "name is null"),
        ({"note": 5}, "note is 5"),
        ({"rate": True}, "rate is true, expected a number .* or null"),
        ({"rate": "1"}, "rate is '1'"),
        (
            {"rate": 10**400},
            "rate is an integer of more than 64 bits, expected a number from -1e.100 to 1e.100 or null",
        ),
        ({"rate": -(10**400)}, "rate is an integer"),
        ({"rate": float("inf")}, "rate is Infinity"),
        ({"rate": float("nan")}, "rate is NaN"),
        ({"rate": 1e300}, r"rate is 1e\+300"),
        ({"shape": [1, 2, 3]}, "shape is a list, expected a list of 2"),
        ({"shape": [1, 2.0]}, r"shape\[1\] is 2.0, expected a whole number"),
        ({"shape": [1, 2**63]}, r"shape\[1\] is an integer of more than 64 bits"),
        ({"shape": [1, True]}, r"shape\[1\] is true"),
        ({"clips": {}}, "clips is an object, expected a list"),
        ({"clips": [{"size": 1}]}, r"clips\[0\].views is missing"),
        ({"clips": [{"size": 1, "views": "all"}]}, r"clips\[0\].views is 'all', expected a whole number or 'dense'"),
        ({"clips": [5]}, r"clips\[0\] is 5, expected an object"),
        ({"counts": {"a": "1"}}, "counts.a is '1'"),
        ({"rows": "abc"}, "rows is 'abc', expected a list"),
        ({"rows": json.loads("[" * 900 + "]" * 900), "name": []}, "name is a list"),
    ],
)
def test_first_part_of_another_type_is_named(change: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=f"^file: {part}"):
        conform({**VALID, **change}, Content, "file")


@pytest.mark.parametrize("content", [None, 5, "x", [], [VALID]])
def test_content_that_is_no_object_is_refused(content: Any) -> None:
    with pytest.raises(ValueError, match="^file: content is .*, expected an object"):
        conform(content, Content, "file")


def test_missing_field_is_named() -> None:
    with pytest.raises(ValueError, match="^file: name is missing"):
        conform({}, Content, "file")

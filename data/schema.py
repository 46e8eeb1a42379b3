"""Check of JSON content against types. A file of somebody else may hold anything, so its reader states what it expects."""

import functools
import json
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

_MAX_INTEGER = 2**63
LARGEST = 1e100
"""Largest number. A double can hold its square, and an integer of JSON may have any number of digits."""
_FLOAT = f"a number from {-LARGEST:g} to {LARGEST:g}"
_NAMES = {str: "a text", int: "a whole number", float: _FLOAT, bool: "true or false", NoneType: "null"}


def conform(value: Any, kind: Any, where: str) -> Any:
    """Return JSON content unchanged if it has a type.

    Args:
        value: content from `json.loads` or `yaml.safe_load`.
        kind: str, int (below 2^63), float (or int; finite, at most `LARGEST`), bool, None, Any, a Literal, a union, list[X],
            dict[str, X], tuple[X, Y] (a list of this length), or a TypedDict (an object with these fields, and perhaps others).
        where: name of the content, at the start of the error.

    Raises ValueError that names the first part of another type, for example `FILE: shards[3].bytes is 'x', expected a whole
    number`.
    """
    try:
        _check(value, kind, "")
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).removeprefix('.')}") from None
    return value


def _check(value: Any, kind: Any, path: str) -> None:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is list and isinstance(value, list):
        if parts[0] is not Any:
            for i, item in enumerate(value):
                _check(item, parts[0], f"{path}[{i}]")
    elif origin is tuple and isinstance(value, list) and len(value) == len(parts):
        for i, part in enumerate(parts):
            _check(value[i], part, f"{path}[{i}]")
    elif origin is dict and isinstance(value, dict):
        for key, item in value.items():
            _check(key, parts[0], f"{path}, a name,")
            _check(item, parts[1], f"{path}.{key:.60}")
    elif is_typeddict(kind) and isinstance(value, dict):
        for key, (part, required) in _fields(kind).items():
            if key in value:
                _check(value[key], part, f"{path}.{key}")
            elif required:
                raise ValueError(f"{path}.{key} is missing")
    elif not _is_plain(value, kind, origin, parts):
        raise ValueError(f"{path or 'content'} is {short(value)}, expected {_name(kind)}")


def _is_plain(value: Any, kind: Any, origin: Any, parts: tuple[Any, ...]) -> bool:
    """Return whether a value without parts, or a value of a union, has a type."""
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if kind is float:
        return type(value) in (int, float) and -LARGEST <= value <= LARGEST
    if kind is int:
        return type(value) is int and -_MAX_INTEGER <= value < _MAX_INTEGER
    return kind is Any or type(value) is (NoneType if kind is None else kind)


def _fits(value: Any, kind: Any) -> bool:
    try:
        _check(value, kind, "")
    except ValueError:
        return False
    return True


@functools.cache
def _fields(kind: Any) -> dict[str, tuple[Any, bool]]:
    """Return the type of each field, and whether the field is required."""
    return {key: (hint, key in kind.__required_keys__) for key, hint in get_type_hints(kind).items()}


def _name(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(map(_name, parts))
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin in (list, tuple):
        return "a list" if origin is list else f"a list of {len(parts)}"
    return "an object" if origin is dict or is_typeddict(kind) else _NAMES.get(kind, str(kind))


def short(value: Any) -> str:
    """Return a short text for JSON content. Lists and objects are named by their type, because they may be nested deeply."""
    if isinstance(value, str):
        return repr(value[:60])
    if isinstance(value, int) and abs(value) >= _MAX_INTEGER:
        return "an integer of more than 64 bits"
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"

"""Parsing of JSON text of somebody else, whose lists and objects may take far more memory than the text."""

import json
from typing import Any

import numpy as np

_COST = {b"[": 100, b"{": 150, b'"': 30, b":": 80, b",": 32}
"""Bytes of Python objects that a character stands for: lists, objects, strings, entries of objects, and values."""
_MOST_COST = 20
"""Most bytes of objects for each byte of text. The shortest rows of a list of videos cost 14."""
_FREE = 2**24
_PIECE = 2**20


def parse_json(content: bytes | bytearray) -> Any:
    """Parse JSON text. Raises ValueError if it is not JSON or would take far more memory than JSON of its size has."""
    limit = _FREE + _MOST_COST * len(content)
    if _cost(content) > limit and _cost_outside_texts(content) > limit:
        raise ValueError(f"its lists, objects and texts would take more than {limit >> 20} MiB")
    return json.loads(content)


def _cost(content: bytes | bytearray) -> int:
    return sum(content.count(character) * cost for character, cost in _COST.items())


def _cost_outside_texts(content: bytes | bytearray) -> int:
    """Return the cost without the characters within texts, such as commas in names."""
    # Without escapes, every quote begins or ends a text.
    plain = np.frombuffer(content.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
    total, inside = 0, 0
    for start in range(0, len(plain), _PIECE):
        piece = plain[start : start + _PIECE]
        quotes = piece == ord('"')
        within = (np.cumsum(quotes) + inside) % 2 == 1
        inside = int(within[-1])
        total += _cost(piece[~within].tobytes()) + int((quotes & within).sum()) * _COST[b'"']
    return total

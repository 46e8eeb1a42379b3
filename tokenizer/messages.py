"""Short, single-line texts for error messages."""

import unicodedata
from pathlib import Path

NEEDS_TAMING = "needs the package taming-transformers-rom1504: pip install --no-deps taming-transformers-rom1504"
_LONGEST = 300
_CONTROLS = {"Cc", "Cs", "Zl", "Zp"}
"""Unicode categories of control characters, surrogates, and line and paragraph separators."""
_DIRECTIONS = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}
"""Bidirectional classes of characters that reorder the text after them."""
_SELF_EXPLAINING = (ValueError, RuntimeError, OSError)
"""Exceptions whose message is clear without the type name. The message of a KeyError, for example, is only the key."""


def require_trust(file: Path, trust: bool) -> None:
    """Raise ValueError unless the user trusts this file, which contains code that runs when it is loaded."""
    if not trust:
        raise ValueError(f"{file} contains code that runs when it is loaded; pass --trust if you trust its origin")


def one_line(error: Exception) -> str:
    """Return the message of an exception in one line.

    Both ends of a long message are kept: a TorchScript error starts with the source position and ends with the reason.
    """
    text = " ".join(str(error).split())
    if not isinstance(error, _SELF_EXPLAINING):
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= _LONGEST else f"{text[:100]} ... {text[-200:]}"


def first_sentence(error: Exception) -> str:
    """Return the first sentence of a PyTorch error. The rest is advice, some of it dangerous (weights_only=False)."""
    reason, _, _ = " ".join(str(error).split()).partition(". ")
    return (reason or type(error).__name__)[:_LONGEST]


def show(value: object) -> str:
    """Return a short representation of a value from an untrusted file.

    Containers are represented by their type only, since aliases in a YAML file can make them exponentially large.
    """
    if isinstance(value, str):
        return repr(value[:60])
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 10**12):
        return repr(value)
    return f"a {type(value).__name__}"


def printable(text: str) -> str:
    """Replace characters that control the terminal; a path may contain them. Letters of all scripts stay as they are."""
    return "".join("\N{REPLACEMENT CHARACTER}" if _is_control(c) else c for c in text)


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in _CONTROLS or unicodedata.bidirectional(character) in _DIRECTIONS


def show_name(name: str) -> str:
    """Return a name from an untrusted file without control characters, cut to 120 characters."""
    return name[:120].encode("unicode_escape").decode()

"""Bug reports of users with their videos, which lie beside the checkout on some machines."""

from pathlib import Path

import pytest

_CASES = Path(__file__).parents[3] / "shared" / "cases"


def case(name: str) -> Path:
    """Return a file of the bug reports. Skips the test where it is absent."""
    path = _CASES / name
    if not path.exists():
        pytest.skip(f"needs {path}")
    return path

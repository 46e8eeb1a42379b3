"""Measurements of pipelines/benchmark.py, one module per subject. Each `measure` function yields the rows of a table."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TypeVar

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Row:
    """One row of a benchmark table."""

    what: str
    """The measured quantity and its settings."""
    unit: str
    """Unit of `ours`, `error` and `peer`."""
    ours: float | str
    """Value of this project, or a text, such as the reason why there is no value."""
    error: float | None = None
    """Standard error of `ours`."""
    peer: float | None = None
    """Value of the alternative in the same run, or None if it was not measured."""
    alternative: str = ""
    """Name of the alternative."""
    ratio: float | None = None
    """`ours / peer`; for values in dB, `ours - peer`."""
    reach: str = ""
    """Target as text, for example "≥ 3"."""

    def texts(self) -> list[str]:
        """Return the cells of the printed table: what, ours, alternative, ratio, reach."""
        peer = "" if self.peer is None else f"{_number(self.peer)} {self.unit}  {self.alternative}"
        ratio = "" if self.ratio is None else f"{self.ratio:.3g}"
        error = "" if self.error is None else f" ± {_number(self.error)}"
        return [self.what, f"{_number(self.ours)}{error} {self.unit}", peer or self.alternative, ratio, self.reach]


def comparison(what: str, unit: str, ours: float, peer: float, alternative: str, reach: str = "") -> Row:
    """Return a row with the ratio of two values, `ours / peer`."""
    return Row(what=what, unit=unit, ours=ours, peer=peer, alternative=alternative, ratio=ours / peer, reach=reach)


def in_new_process(function: Callable[..., _Result], *arguments: object) -> _Result:
    """Call a function in a new process, whose heap is not fragmented by other work, and return its result."""
    # Imported here, because the GPU check imports this module without any package.
    from data.processes import end_with_parent

    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=end_with_parent) as process:
        return process.submit(function, *arguments).result()


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    # From 999.5 on, .3g would print an exponent.
    return f"{value:,.0f}" if abs(value) >= 999.5 or float(value).is_integer() else f"{value:.3g}"

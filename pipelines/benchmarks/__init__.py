"""What pipelines/benchmark.py measures, a file for each subject. Each measure gives rows, ours beside the alternative."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    what: str
    unit: str
    ours: float
    error: float | None = None
    """Its standard error."""
    peer: float | None = None
    """The alternative, measured in the same run; None where there is none."""
    alternative: str = ""
    """Which one."""
    ratio: float | None = None
    reach: str = ""
    """What is wanted."""

    def texts(self) -> list[str]:
        """The line for people."""
        peer = "" if self.peer is None else f"{_number(self.peer)} {self.unit}  {self.alternative}"
        ratio = "" if self.ratio is None else f"{self.ratio:.3g}"
        error = "" if self.error is None else f" ± {_number(self.error)}"
        return [self.what, f"{_number(self.ours)}{error} {self.unit}", peer or self.alternative, ratio, self.reach]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 999.5 or float(value).is_integer() else f"{value:.3g}"

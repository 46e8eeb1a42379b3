"""A tokenizer whose codes have collapsed onto a few: noticed, and what to do about it."""

COLLAPSED = 0.05
"""Share of the codes in use below which nothing that comes later means much."""
_LONGER = "train the tokenizer longer (pipelines/train_tokenizer.py --steps)"


def collapse_warning(used: int, vocabulary: int, advice: str = _LONGER) -> str:
    """One line for people."""
    return (
        f"WARNING: only {used} of {vocabulary} codes are in use. Bits per code will look good and mean little: "
        f"{advice}, and look at the tokenizer's pictures first."
    )


class CollapseAlarm:
    """Watches the share of codes in use over a training; warns when it is tiny, and when it falls to half of what it was.

    Args:
        vocabulary: codes that there are.
        codes: that each validation looks at.
        advice: what to do.
    """

    def __init__(self, vocabulary: int, codes: int, advice: str) -> None:
        self._vocabulary, self._most, self._advice = vocabulary, min(vocabulary, codes), advice
        self._best = 0.0
        self._said: set[str] = set()

    def check(self, step: int, dead: float) -> str | None:
        """A warning, if there is a new one, of a validation in which so many codes are not used."""
        used = self._vocabulary - dead
        self._best = max(self._best, used)
        if used < COLLAPSED * self._most:
            return self._once("few", collapse_warning(round(used), self._vocabulary, self._advice))
        if used < self._best / 2:
            now, best = (f"{100 * count / self._vocabulary:.0f} %" for count in (used, self._best))
            return self._once(
                "fall",
                f"WARNING: at step {step} {now} of the codes are in use, after {best}: the codebook is collapsing; "
                f"{self._advice}.",
            )
        return None

    def _once(self, kind: str, text: str) -> str | None:
        if kind in self._said:
            return None
        self._said.add(kind)
        return text
